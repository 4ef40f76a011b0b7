#!/usr/bin/env python3
"""Measure speed, next to the machine's limit and next to a peer.

python scripts/bench.py train --peer hf
python scripts/bench.py train --peer hf model=base data=bible     # settings as in training
python scripts/bench.py decode --peer hf --batch 1 32 --beam 5
python scripts/bench.py table

Each measurement is a row of the output file; one of the same name is replaced.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command import check_overrides, user_errors
from mt.compose import compose

if TYPE_CHECKING:
    from mt.config import Config

CORPUS = [
    "data=files",
    "data.name=multi30k",
    "data.train=data/multi30k/train",
    "data.valid=data/multi30k/val",
    "data.test=data/multi30k/test_2016_flickr",
]
SUBJECT = ["model=small", "tokenizer.vocab_size=8000", "optim=adamw", "train.batch_tokens=4096"]


def main() -> int:
    """Run the command; return its exit code."""
    options = parse()
    with user_errors():
        options.run(options)
    return 0


def parse() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        sub.add_argument(
            "--out", type=Path, default=Path("runs/bench.json"), metavar="FILE", help="the results"
        )
        sub.set_defaults(run=run)
        return sub

    train = command("train", run_train)
    train.add_argument("--seconds", type=float, default=10.0, help="of a turn (default: 10)")
    train.add_argument("--rounds", type=int, default=3, help="turns of each side (default: 3)")
    train.add_argument("--warm-up", type=float, default=10.0, help="seconds (default: 10)")

    train.add_argument(
        "--peer-choice",
        metavar="CHOICE",
        choices=[f"{a} {b}" for a in ("fp32", "bf16") for b in ("eager", "sdpa")],
        help='the peer\'s precision and attention, such as "bf16 eager" (default: try all)',
    )

    decode = command("decode", run_decode)
    decode.add_argument("--batch", type=int, nargs="+", default=[1, 32, 256], metavar="B")
    decode.add_argument("--beam", type=int, nargs="+", default=[1, 5], metavar="K")
    decode.add_argument("--length", type=int, default=20, help="pieces a sentence (default: 20)")
    decode.add_argument("--seconds", type=float, default=5.0, help="of a row (default: 5)")
    decode.add_argument("--rounds", type=int, default=3, help="least calls a side (default: 3)")

    for sub in (train, decode):
        sub.add_argument("--peer", choices=["hf"], help="measure Hugging Face transformers, too")
        sub.add_argument("overrides", nargs="*", metavar="SETTING", help="as in scripts/train.py")

    command("table", run_table)
    return parser.parse_args()


# Commands


def run_train(options: argparse.Namespace) -> None:
    """Training speed: target tokens a second, padding, memory, share of the machine's limit."""
    config = subject(options.overrides)
    from bench_train import measure_training
    from mt.corpus import prepare
    from mt.runtime import resolve

    corpus = prepare(config.data, config.tokenizer)
    train = config.train
    runtime = resolve(device=train.device, precision=train.precision, num_threads=train.num_threads)
    print(f"device {runtime}, {corpus.path}", flush=True)
    result = measure_training(
        config,
        corpus,
        runtime,
        with_peer=options.peer is not None,
        peer_choice=options.peer_choice,
        num_rounds=options.rounds,
        seconds=options.seconds,
        warm_up=options.warm_up,
    )
    name = f"train {config.model.name} {config.data.name} {runtime.device.type}"
    store(options.out, name, {"kind": "train", "settings": settings(config), **result})


def run_decode(options: argparse.Namespace) -> None:
    """Decoding speed: sentences and target tokens a second for a fixed amount of work."""
    config = subject(options.overrides)
    from bench_decode import measure_decoding
    from mt.runtime import resolve

    train = config.train
    runtime = resolve(device=train.device, precision=train.precision, num_threads=train.num_threads)
    print(f"device {runtime}", flush=True)
    for batch_size in options.batch:
        for beam_size in options.beam:
            result = measure_decoding(
                config.model,
                runtime,
                vocab_size=config.tokenizer.vocab_size,
                batch_size=batch_size,
                beam_size=beam_size,
                length=options.length,
                with_peer=options.peer is not None,
                num_rounds=options.rounds,
                seconds=options.seconds,
            )
            name = (
                f"decode {config.model.name} batch {batch_size} beam {beam_size} "
                f"{runtime.device.type}"
            )
            store(options.out, name, {"kind": "decode", "settings": settings(config), **result})


def run_table(options: argparse.Namespace) -> None:
    """Print the results as Markdown."""
    print(json.dumps(load(options.out), indent=2))


# Settings


def subject(overrides: Sequence[str]) -> "Config":
    """The config to measure: the usual subject, changed by overrides."""
    corpus = [] if any(text.startswith("data") for text in overrides) else CORPUS
    chosen = {text.partition("=")[0]: text for text in [*corpus, *SUBJECT, *overrides]}
    check_overrides(list(chosen.values()), primary="train")
    return compose(list(chosen.values()))


def settings(config: "Config") -> dict[str, Any]:
    """What a reader wants to know of a config."""
    return {
        "model": config.model.name,
        "data": config.data.name,
        "vocab_size": config.tokenizer.vocab_size,
        "batch_tokens": config.train.batch_tokens,
    }


# Results


def load(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of a result file by name; none where there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def store(path: Path, name: str, row: dict[str, Any]) -> None:
    """Put a row into a result file, in place of an older one of its name."""
    from mt.checkpoint import provenance
    from mt.runtime import describe_machine

    about = {
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "machine": describe_machine(),
        **provenance(),
    }
    rows = load(path) | {name: row | about}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
    print(name, json.dumps(row, indent=1), flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
