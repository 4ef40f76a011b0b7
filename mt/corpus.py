"""From raw text to training data: clean, split, guard against leaks, tokenize, keep.

A pair's way is the body of ``_build``. What comes out is kept under a fingerprint of everything
that shaped it, and is found again by that.
"""

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

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

from mt import sources
from mt.cleaning import SPLITS, Sieve, clean_heldout, clean_training, cut, examine, guard, table
from mt.config import DataConfig, TokenizerConfig
from mt.tokenizer import Tokenizer, train_tokenizer

FORMAT = 1  # raised whenever this code makes something else of the same text

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
    fingerprint = _fingerprint(data, tokenizer)
    name = f"{data.name}-{data.source_lang}-{data.target_lang}-{fingerprint}"
    path = root / "prepared" / name
    path.parent.mkdir(parents=True, exist_ok=True)
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
    train, valid, test = (Dataset.load_from_disk(str(path / split)) for split in SPLITS)
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
    train, valid, test = cut(examined["train"], examined["valid"], examined["test"], data)

    sieves = {"train": Sieve(train), "valid": Sieve(valid), "test": Sieve(test)}
    clean_heldout(sieves["valid"], data.clean)
    clean_heldout(sieves["test"], data.clean)
    clean_training(sieves["train"], data.clean)
    leaked = guard(sieves, data.clean)
    splits = {name: sieve.kept() for name, sieve in sieves.items()}
    for name, split in splits.items():
        if len(split) == 0:
            raise ValueError(
                f"no {name} pair is left of {data.name} {data.source_lang}-{data.target_lang}:"
                f" {sieves[name].summary()}; check the data and the rules in data.clean"
            )

    model = train_tokenizer(_sentences(splits["train"]), tokenizer)
    model.save(path / "tokenizer.model")
    for name, split in splits.items():
        _encode(split, model, work / f"{name}-ids.arrow").save_to_disk(str(path / name))
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
    (path / "files.json").write_text(json.dumps(_checksums(path), indent=2))


# Pieces


def _sentences(split: Dataset) -> Iterator[str]:
    for batch in split.iter(1000):
        yield from batch["source"]
        yield from batch["target"]


def _encode(split: Dataset, tokenizer: Tokenizer, file: Path) -> Dataset:
    ids = List(Value("int32"))
    return split.map(
        _encode_batch,
        batched=True,
        fn_kwargs={"tokenizer": tokenizer},
        features=Features({**split.features, "source_ids": ids, "target_ids": ids}),
        cache_file_name=str(file),
        new_fingerprint=file.stem,
        desc=f"tokenizing {file.stem}",
    )


def _encode_batch(batch: dict[str, list[str]], *, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "source_ids": tokenizer.encode(batch["source"]),
        "target_ids": tokenizer.encode(batch["target"]),
    }


# Keeping


def _fingerprint(data: DataConfig, tokenizer: TokenizerConfig) -> str:
    """Names everything that shapes the result: settings, the content of the files, this code."""
    shaped_by = {
        "format": FORMAT,
        "data": _plain(data),
        "tokenizer": _plain(tokenizer),
        "sources": sources.content_hashes(data),
    }
    return hashlib.sha256(json.dumps(shaped_by, sort_keys=True).encode()).hexdigest()[:12]


def _plain(config: DataConfig | TokenizerConfig) -> dict[str, Any]:
    def value(item: Any) -> Any:
        return item.value if isinstance(item, Enum) else item

    return dataclasses.asdict(config, dict_factory=lambda items: {k: value(v) for k, v in items})


def _report(path: Path) -> dict[str, Any]:
    return json.loads((path / "report.json").read_text())


def _checksums(path: Path) -> dict[str, int]:
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {file.relative_to(path).as_posix(): _checksum(file) for file in files}


def _checksum(file: Path) -> int:
    checksum = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _is_whole(path: Path) -> bool:
    try:
        expected = json.loads((path / "files.json").read_text())
        return expected == {name: _checksum(path / name) for name in expected}
    except (OSError, ValueError):
        return False
