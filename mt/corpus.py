"""From raw text to training data: clean, split, guard against leaks, tokenize, keep.

A pair's way is the body of ``_build``. What comes out is kept under a fingerprint of everything
that shaped it, and is found again by that.
"""

import dataclasses
import hashlib
import itertools
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import (
    Dataset,
    Features,
    List,
    Value,
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from filelock import FileLock, Timeout
from tqdm import tqdm

from mt import sources
from mt.cleaning import SPLITS, Sieve, clean_heldout, clean_training, cut, examine, guard, table
from mt.config import DataConfig, TokenizerConfig
from mt.digests import digests
from mt.tokenizer import Tokenizer, train_tokenizer

FORMAT = 2  # raised whenever this code makes something else of the same text
TEXT = "text.arrow"  # in the folder of a split
MEMORY = ".digests.json"  # what digests.py remembers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Corpus:
    """Prepared text. Each split has the columns source, target (text) and source_ids,
    target_ids (pieces, without BOS and EOS), mapped from disk."""

    path: Path
    train: Dataset
    valid: Dataset
    test: Dataset
    tokenizer: Tokenizer
    num_leaked: dict[str, int]  # of valid and test: sentences that the training text repeated,
    # before the leak guard
    fingerprint: str
    report: dict[str, Any]


def prepare(data: DataConfig, tokenizer: TokenizerConfig, *, root: Path = Path("data")) -> Corpus:
    """The corpus in its prepared form, made on first use and found again afterwards.

    ValueError, with what to do, where the text cannot be had or nothing of it is left.
    """
    (root / "prepared").mkdir(parents=True, exist_ok=True)
    fingerprint = _fingerprint(data, tokenizer, root=root)
    name = f"{data.name}-{data.source_lang}-{data.target_lang}-{fingerprint}"
    path = root / "prepared" / name
    with _alone(path):  # a second process waits, then finds it done
        if path.exists() and not _is_whole(path):
            log.warning("%s is damaged; preparing it again", path)
            shutil.rmtree(path)
        if not path.exists():
            partial = path.with_name(f".{name}.partial")
            shutil.rmtree(partial, ignore_errors=True)  # of a preparation that was killed
            partial.mkdir()
            try:
                with _progress_on_terminals():
                    _build(data, tokenizer, root=root, path=partial, fingerprint=fingerprint)
                os.replace(partial, path)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
            log.info("prepared %s\n%s", path, table(_report(path)))
    return _open(path)


def find(path: str | Path) -> Corpus | None:
    """A corpus that was prepared before; None where there is none, or a damaged one."""
    return _open(Path(path)) if _is_whole(Path(path)) else None


def _open(path: Path) -> Corpus:
    report = _report(path)
    train, valid, test = (Dataset.from_file(str(path / split / TEXT)) for split in SPLITS)
    return Corpus(
        path=path,
        train=train,
        valid=valid,
        test=test,
        tokenizer=Tokenizer.load(path / "tokenizer.model"),
        num_leaked=report["leaked"],
        fingerprint=report["fingerprint"],
        report=report,
    )


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keeps other processes from preparing the same."""
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        log.warning("another process is preparing %s; waiting for it", path)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _progress_on_terminals() -> Iterator[None]:
    """Keeps the bars of ``datasets`` out of log files."""
    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _build(
    data: DataConfig, tokenizer: TokenizerConfig, *, root: Path, path: Path, fingerprint: str
) -> None:
    """Writes the prepared corpus into the empty directory ``path``."""
    work = path / "work"
    work.mkdir()
    raw = sources.load(data, root=root, cache=work)
    limit = len(raw.train) if data.max_pairs is None else min(data.max_pairs, len(raw.train))
    given = {"train": raw.train.select(range(limit)), "valid": raw.valid, "test": raw.test}
    examined = {
        name: None if split is None else examine(split, data.clean, file=work / f"{name}.arrow")
        for name, split in given.items()
    }
    sieves = cut(examined["train"], examined["valid"], examined["test"], data)

    clean_heldout(sieves["valid"], data.clean)
    clean_heldout(sieves["test"], data.clean)
    clean_training(sieves["train"], data.clean)
    leaked = guard(sieves, data.clean)
    for name, sieve in sieves.items():
        if not sieve.keep.any():
            raise ValueError(
                f"no {name} pair is left of {data.name} {data.source_lang}-{data.target_lang}:"
                f" {sieve.summary()}; check the data and the rules in data.clean"
            )

    model = train_tokenizer(_sentences(sieves["train"].kept()), tokenizer)
    model.save(path / "tokenizer.model")
    for name, sieve in sieves.items():
        _encode(sieve, model, path / name)
    report = {
        "fingerprint": fingerprint,
        "data": _plain(data),
        "tokenizer": _plain(tokenizer),
        "vocab_size": len(model),
        "revision": raw.revision,
        "repairs": raw.repairs,
        "leaked": leaked,
        "splits": {name: sieve.report() for name, sieve in sieves.items()},
    }
    (path / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False))
    shutil.rmtree(work)
    names = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
    (path / "files.json").write_text(json.dumps(_digests(path, names), indent=2))


# Pieces

_IDS = List(Value("int32"))
_PREPARED = Features(
    {"source": Value("string"), "target": Value("string"), "source_ids": _IDS, "target_ids": _IDS}
)


def _sentences(batches: Iterable[pa.RecordBatch]) -> Iterator[str]:
    for batch in batches:
        for column in batch.columns:
            yield from column.to_pylist()


def _encode(sieve: Sieve, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the text and its ids into the new ``folder``."""
    folder.mkdir()
    schema = _PREPARED.arrow_schema
    total = int(sieve.keep.sum())
    with (
        pa.ipc.new_stream(str(folder / TEXT), schema) as stream,
        tqdm(total=total, desc=f"tokenizing {folder.name}", unit=" pairs", disable=None) as bar,
    ):
        for batch in sieve.kept():
            ids = [_lists(tokenizer.encode(text.to_pylist())) for text in batch.columns]
            stream.write_batch(pa.record_batch([*batch.columns, *ids], schema=schema))
            bar.update(len(batch))


def _lists(rows: Sequence[Sequence[int]]) -> pa.ListArray:
    """The same as pa.array(rows), in half the time."""
    lengths = np.fromiter(map(len, rows), dtype=np.int32, count=len(rows))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.fromiter(itertools.chain.from_iterable(rows), dtype=np.int32, count=offsets[-1])
    kind = _PREPARED.arrow_schema.field("source_ids").type
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(ids), type=kind)


# Keeping


def _fingerprint(data: DataConfig, tokenizer: TokenizerConfig, *, root: Path) -> str:
    """Names everything that shapes the result: settings, the content of the files, this code."""
    shaped_by = {
        "format": FORMAT,
        "data": _plain(data),
        "tokenizer": _plain(tokenizer),
        "sources": sources.content_hashes(data, memory=root / "prepared" / MEMORY),
    }
    return hashlib.sha256(json.dumps(shaped_by, sort_keys=True).encode()).hexdigest()[:12]


def _plain(config: DataConfig | TokenizerConfig) -> dict[str, Any]:
    def value(item: Any) -> Any:
        return item.value if isinstance(item, Enum) else item

    return dataclasses.asdict(config, dict_factory=lambda items: {k: value(v) for k, v in items})


def _report(path: Path) -> dict[str, Any]:
    return json.loads((path / "report.json").read_text())


def _digests(path: Path, names: Iterable[str]) -> dict[str, str]:
    found = digests((path / name for name in names), memory=path / MEMORY)
    return {file.relative_to(path).as_posix(): digest for file, digest in found.items()}


def _is_whole(path: Path) -> bool:
    """Whether every file is as it was written; read in full only where it looks changed."""
    try:
        expected = json.loads((path / "files.json").read_text())
        if _digests(path, expected) == expected:
            return True
        (path / MEMORY).unlink(missing_ok=True)  # perhaps only that is wrong
        return _digests(path, expected) == expected
    except (OSError, ValueError):
        return False
