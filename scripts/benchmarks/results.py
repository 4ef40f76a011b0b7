"""Measurements in a file, and as Markdown tables."""

import json
import os
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def load(path: Path) -> dict[str, Row]:
    """The rows of a result file by name; none where there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def store(path: Path, row: Row) -> None:
    """Put a row into a result file, in place of an older one of its name, and show it."""
    from mt.checkpoint import provenance
    from mt.runtime import describe_machine

    about = {
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "machine": describe_machine(),
        **provenance(),
    }
    rows = load(path) | {row["name"]: row | about}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
    print(table({row["name"]: row}), flush=True)


def table(rows: Mapping[str, Row]) -> str:
    """All rows as Markdown, a table for each kind of measurement."""
    makers = {"train": _train, "decode": _decode, "quality": _quality, "corpus": _corpus}
    tables = []
    for kind, make in makers.items():
        chosen = [row for row in rows.values() if row["kind"] == kind]
        if chosen:
            tables.append(make(chosen))
    return "\n\n".join(tables)


def _markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    cells = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _train(rows: Sequence[Row]) -> str:
    head = ["training", "precision", "tokens/s", "of the limit", "padding", "memory", "ratio"]
    lines = []
    for row in rows:
        for side, title in (("ours", row["subject"]), ("muon", "… with Muon"), ("peer", None)):
            if (part := row.get(side)) is None:
                continue
            memory = part.get("peak_memory")
            lines.append(
                [
                    title or f"… {part['library']}",
                    part["precision"] if side != "peer" else part["choice"],
                    f"{part['tokens_per_second']:,.0f}",
                    f"{100 * part['share_of_limit']:.1f} % of {part['limit'] / 1e9:,.0f} GFLOP/s",
                    f"{100 * part['padding_share']:.1f} %",
                    "" if memory is None else f"{memory / 1e9:.2f} GB",
                    f"{row['ratio']:.2f}" if side == "ours" and "ratio" in row else "",
                ]
            )
    return _markdown(head, lines)


def _decode(rows: Sequence[Row]) -> str:
    head = ["decoding", "batch", "beam", "precision", "tokens/s", "sentences/s", "ms a batch"]
    head += ["peer", "tokens/s", "ratio"]
    lines = []
    for row in rows:
        ours, peer = row["ours"], row.get("peer")
        line = [
            row["subject"],
            str(row["batch_size"]),
            str(row["beam_size"]),
            ours["choice"],
            f"{ours['tokens_per_second']:,.0f}",
            f"{ours['sentences_per_second']:,.1f}",
            f"{1000 * ours['seconds']:,.1f}",
        ]
        line += ["", "", ""]
        if peer is not None:
            line[-3:] = [
                f"{peer['library']}, {peer['choice']}",
                f"{peer['tokens_per_second']:,.0f}",
                f"{row['ratio']:.2f}",
            ]
        lines.append(line)
    return _markdown(head, lines)


def _quality(rows: Sequence[Row]) -> str:
    head = ["quality", "seed", "BLEU", "training alone", "with validation and checkpoints"]
    subjects = dict.fromkeys(row["subject"] for row in rows)
    lines = []
    for subject in subjects:
        own = [row for row in rows if row["subject"] == subject]
        lines += [
            [
                subject,
                str(row["seed"]),
                f"{row['bleu']:.2f}",
                f"{row['step_seconds'] * row['num_steps']:.0f} s",
                f"{row['seconds']:.0f} s",
            ]
            for row in own
        ]
        if len(own) > 1:
            mean = statistics.mean(row["bleu"] for row in own)
            lines.append([subject, f"mean of {len(own)}", f"{mean:.2f}", "", ""])
    return _markdown(head, lines)


def _corpus(rows: Sequence[Row]) -> str:
    about = {"kind", "name", "time", "machine", "git_revision", "python", "packages"}
    lines = [
        [row["name"], ", ".join(f"{key} {_short(row[key])}" for key in row if key not in about)]
        for row in rows
    ]
    return _markdown(["corpus", "figures"], lines)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
