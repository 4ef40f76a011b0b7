"""What happens to text before it is learned from: normalization, rules, leak guard, report.

Every pair is examined once, in batches; the rules then work on columns of numbers. All rules
apply to training text. Held-out text is only normalized, and loses only its empty pairs, because
it says how good a model is: a test that was cleaned like the training text flatters.
"""

import hashlib
import logging
import os
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Value
from numpy.typing import NDArray

from mt.config import CleanConfig, DataConfig
from mt.tokenizer import normalize

SPLITS = ("train", "valid", "test")
NUM_EXAMPLES = 3  # pairs shown for each rule
NUM_ROWS = 10_000  # pairs examined at once
PAIRS_A_PROCESS = 200_000  # fewer are not worth starting one

log = logging.getLogger(__name__)


def examine(split: Dataset, clean: CleanConfig, *, file: Path) -> Dataset:
    """Normalizes the text and adds the numbers that the rules look at; Arrow goes to ``file``,
    or to several files of similar names, where the text is so large that processes share it."""
    if len(split) == 0:  # map would not add the columns
        return Dataset.from_dict({name: [] for name in _EXAMINED}, features=_EXAMINED)
    num_processes = min(os.cpu_count() or 1, len(split) // PAIRS_A_PROCESS)
    examined = split.with_format("arrow").map(
        examine_batch,
        batched=True,
        batch_size=NUM_ROWS,
        writer_batch_size=NUM_ROWS,
        fn_kwargs={"nfc": clean.nfc, "control": clean.control},
        features=_EXAMINED,
        cache_file_name=str(file),
        new_fingerprint=file.stem,
        num_proc=num_processes if num_processes > 1 else None,
        desc=f"cleaning {file.stem}",
    )
    return examined.with_format(None)


_EXAMINED = Features(
    {
        "source": Value("string"),
        "target": Value("string"),
        "nfc": Value("bool"),  # whether the rule changed the pair
        "control": Value("bool"),
        "source_chars": Value("int32"),
        "target_chars": Value("int32"),
        "source_key": Value("int64"),  # equal for texts that the leak guard holds equal
        "target_key": Value("int64"),
        "pair_key": Value("int64"),  # equal for exact repetitions
        "identical": Value("bool"),
    }
)


def examine_batch(batch: pa.Table, *, nfc: bool, control: bool) -> pa.Table:
    """Pairs -> the same with the columns of ``_EXAMINED``."""
    columns: dict[str, Any] = {"nfc": False, "control": False}
    for side in ("source", "target"):
        texts, changed = _normalize(batch[side].fill_null(""), nfc=nfc, control=control)
        columns[side] = texts
        columns[f"{side}_chars"] = [len(text.strip()) for text in texts]
        columns[f"{side}_key"] = _hashes(leak_keys(texts))
        for rule in ("nfc", "control"):
            columns[rule] |= changed[rule]
    pairs = list(zip(columns["source"], columns["target"], strict=True))
    columns["pair_key"] = _hashes([f"{source}\n{target}" for source, target in pairs])
    columns["identical"] = [source == target for source, target in pairs]
    return pa.table(columns, schema=_EXAMINED.arrow_schema)


def _normalize(
    column: pa.ChunkedArray, *, nfc: bool, control: bool
) -> tuple[list[str], dict[str, NDArray[np.bool_]]]:
    """(the texts as ``normalize`` makes them, which of them each rule changed)

    Most texts are in order already, which is quickly seen, and stay as they are.
    """
    texts = column.to_pylist()
    changed = {rule: np.zeros(len(texts), dtype=bool) for rule in ("nfc", "control")}
    doubtful = np.zeros(len(texts), dtype=bool)
    if nfc and not unicodedata.is_normalized("NFC", "\n".join(texts)):
        doubtful |= [not unicodedata.is_normalized("NFC", text) for text in texts]
    if control:
        doubtful |= pc.match_substring_regex(column, _UNTIDY).to_numpy()
    for row in np.flatnonzero(doubtful).tolist():
        raw = texts[row]
        composed = normalize(raw, nfc=nfc, control=False)
        texts[row] = normalize(composed, nfc=False, control=control)
        changed["nfc"][row] = composed != raw
        changed["control"][row] = texts[row] != composed
    return texts, changed


# What the rule ``control`` may change: control characters, white space that is not one space
# between other characters. (The expression is RE2's.)
_UNTIDY = (
    r"[\x00-\x1f\x7f-\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}"
    r"\x{feff}]|  |^ | $"
)


def leak_key(text: str) -> str:
    """What the leak guard compares: the text without case, punctuation and extra space."""
    return leak_keys([text])[0]


def leak_keys(texts: Sequence[str]) -> list[str]:
    """``leak_key`` of each text."""
    if not texts:
        return []
    # As lines of one text: for each by itself the calls would take most of the time.
    joined = "\n".join(text.replace("\n", " ") for text in texts)
    folded = unicodedata.normalize("NFC", joined.casefold())
    bare = folded
    for character in _punctuation() & set(folded):
        bare = bare.replace(character, " ")
    lines = zip(bare.split("\n"), folded.split("\n"), strict=True)
    return [" ".join(bare.split()) or " ".join(folded.split()) for bare, folded in lines]


@cache
def _punctuation() -> frozenset[str]:
    """Punctuation, controls, format characters and white space but plain spaces and newlines;
    no other symbols."""
    every = map(chr, range(sys.maxunicode + 1))
    return frozenset(c for c in every if unicodedata.category(c) in _PUNCTUATION) - {" ", "\n"}


_PUNCTUATION = {"Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po", "Sk", "Zs", "Zl", "Zp", "Cc", "Cf"}


def _hashes(texts: Iterable[str]) -> NDArray[np.int64]:
    """64 bits of each text, the same everywhere."""
    data = (text.encode("utf-8", "surrogatepass") for text in texts)
    digests = [hashlib.blake2b(text, digest_size=8).digest() for text in data]
    return np.frombuffer(b"".join(digests), dtype="<i8")


class Sieve:
    """A split on its way through the rules: which pairs are still in, and why others are not."""

    def __init__(self, examined: Dataset, rows: NDArray[np.bool_] | None = None) -> None:
        """The split is all of what was examined, or those ``rows`` of it."""
        self.examined = examined
        self.rows = np.ones(len(examined), dtype=bool) if rows is None else rows
        self.keep = self.rows.copy()
        self.dropped: dict[str, dict[str, Any]] = {}

    def __getitem__(self, column: str) -> NDArray[Any]:
        """The numbers of all that was examined, the rows of other splits included."""
        return self.examined.data.column(column).to_numpy()

    def drop(self, rule: str, mask: NDArray[np.bool_]) -> None:
        """Takes out the pairs where ``mask`` is true, and keeps a few as examples."""
        hit = self.keep & mask
        examples = self.examined.select(np.flatnonzero(hit)[:NUM_EXAMPLES])
        self.dropped[rule] = {
            "count": int(hit.sum()),
            "examples": [[pair["source"][:200], pair["target"][:200]] for pair in examples],
        }
        self.keep &= ~hit

    def kept(self) -> Iterator[pa.RecordBatch]:
        """The text of the pairs that are still in, part by part.

        It is read from the files: what a process has mapped counts as its memory.
        """
        start = 0
        for file in self.examined.cache_files:
            with pa.OSFile(file["filename"]) as stream:
                for batch in pa.ipc.open_stream(stream):
                    keep = pa.array(self.keep[start : start + len(batch)])
                    start += len(batch)
                    yield batch.select(["source", "target"]).filter(keep)

    def summary(self) -> str:
        """The counts in one line."""
        counts = [f"{rule} {entry['count']}" for rule, entry in self.dropped.items()]
        return ", ".join([f"read {self.rows.sum()}", *counts])

    def report(self) -> dict[str, Any]:
        """The counts and examples of every rule."""
        return {
            "read": int(self.rows.sum()),
            "normalized": {r: int(self[r][self.rows].sum()) for r in ("nfc", "control")},
            "dropped": self.dropped,
            "kept": int(self.keep.sum()),
        }


def clean_heldout(sieve: Sieve, clean: CleanConfig) -> None:
    """Held-out text is normalized but otherwise stays as it is: it says how good a model is."""
    if clean.empty:
        sieve.drop("empty", (sieve["source_chars"] == 0) | (sieve["target_chars"] == 0))


def clean_training(sieve: Sieve, clean: CleanConfig) -> None:
    """All rules but the leak guard, in the order of ``CleanConfig``."""
    shorter = np.minimum(sieve["source_chars"], sieve["target_chars"])
    longer = np.maximum(sieve["source_chars"], sieve["target_chars"])
    if clean.empty:
        sieve.drop("empty", shorter == 0)
    if clean.max_chars is not None:
        sieve.drop("max_chars", longer > clean.max_chars)
    if clean.max_length_ratio is not None:
        sieve.drop("max_length_ratio", longer > clean.max_length_ratio * shorter)
    if clean.identical:
        sieve.drop("identical", sieve["identical"])
    if clean.duplicates:
        kept = np.flatnonzero(sieve.keep)
        _, first = np.unique(sieve["pair_key"][kept], return_index=True)
        repeated = sieve.keep.copy()
        repeated[kept[first]] = False
        sieve.drop("duplicates", repeated)


def guard(sieves: dict[str, Sieve], clean: CleanConfig) -> dict[str, int]:
    """Drops training pairs that share a side with a held-out pair.

    Returns how many held-out pairs of each split the training text had a side of before that.
    """
    train = sieves["train"]
    leaked = {}
    leaks = np.zeros(len(train.rows), dtype=bool)
    for name in ("valid", "test"):
        heldout = sieves[name]
        affected = np.zeros(len(heldout.rows), dtype=bool)
        for column in ("source_key", "target_key"):
            keys = train[column]
            shared = _isin(keys, heldout[column][heldout.keep])
            affected |= np.isin(heldout[column], keys[shared & train.keep])
            leaks |= shared
        leaked[name] = int((affected & heldout.keep).sum())
    if clean.leaks:
        train.drop("leaks", leaks)
    return leaked


def _isin(many: NDArray[Any], few: NDArray[Any]) -> NDArray[np.bool_]:
    """``np.isin``, which would sort both."""
    if len(few) == 0:
        return np.zeros(len(many), dtype=bool)
    few = np.sort(few)
    places = np.searchsorted(few, many)
    return few[np.minimum(places, len(few) - 1)] == many


def cut(
    train: Dataset, valid: Dataset | None, test: Dataset | None, data: DataConfig
) -> dict[str, Sieve]:
    """Cuts off the held-out splits that the source lacks.

    Pairs are chosen by a hash of their source, so the choice neither depends on their order nor
    moves much when text is added. One pair stands for all that share its source; the leak guard
    takes the others out of the training text.
    """
    sieve = Sieve(train)
    if valid is not None and test is not None:
        return {"train": sieve, "valid": Sieve(valid), "test": Sieve(test)}
    numbers = [data.num_valid if valid is None else 0, data.num_test if test is None else 0]
    full = np.flatnonzero((sieve["source_chars"] > 0) & (sieve["target_chars"] > 0))
    _, first = np.unique(sieve["source_key"][full], return_index=True)
    chosen = full[first]  # in the order of the keys, which are hashes
    if sum(numbers) > len(chosen) // 5:
        numbers = [min(number, len(chosen) // 10) for number in numbers]
        log.warning("little text: only %d validation and %d test pairs are cut off", *numbers)
    num_valid, num_test = numbers
    valid_rows, test_rows = np.zeros((2, len(train)), dtype=bool)
    valid_rows[chosen[:num_valid]] = True
    test_rows[chosen[num_valid : num_valid + num_test]] = True
    return {
        "train": Sieve(train, ~(valid_rows | test_rows)),
        "valid": Sieve(train, valid_rows) if valid is None else Sieve(valid),
        "test": Sieve(train, test_rows) if test is None else Sieve(test),
    }


def table(report: dict[str, Any]) -> str:
    """What each rule did, as a short table."""
    splits = report["splits"]
    lines = [["", *SPLITS], ["read", *(splits[name]["read"] for name in SPLITS)]]
    for rule in ("nfc", "control"):
        lines.append([f"changed: {rule}", *(splits[s]["normalized"][rule] for s in SPLITS)])
    for rule in splits["train"]["dropped"]:
        dropped = [splits[name]["dropped"].get(rule, {}).get("count", "") for name in SPLITS]
        lines.append([f"dropped: {rule}", *dropped])
    lines.append(["kept", *(splits[name]["kept"] for name in SPLITS)])
    lines.append(["leaked before", "", report["leaked"]["valid"], report["leaked"]["test"]])
    rows = [f"{row[0]:<26}" + "".join(f"{cell:>10}" for cell in row[1:]) for row in lines]
    rows += [f"repaired: {rule}: {count}" for rule, count in report["repairs"].items() if count]
    for rule, dropped in splits["train"]["dropped"].items():
        rows += [
            f"dropped, for example: {rule}: {_short(source)} ||| {_short(target)}"
            for source, target in dropped["examples"][:1]
        ]
    return "\n".join([*rows, f"vocabulary: {report['vocab_size']}"])


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
