"""What happens to text before it is learned from: normalization, rules, leak guard, report.

Every pair is examined once, in batches; the rules then work on columns of numbers. All rules
apply to training text. Held-out text is only normalized, and loses only its empty pairs, because
it says how good a model is: a test that was cleaned like the training text flatters.
"""

import hashlib
import logging
import re
import sys
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value
from numpy.typing import NDArray

from mt.config import CleanConfig, DataConfig
from mt.tokenizer import normalize

SPLITS = ("train", "valid", "test")
NUM_EXAMPLES = 3  # pairs shown for each rule

log = logging.getLogger(__name__)


def examine(split: Dataset, clean: CleanConfig, *, file: Path) -> Dataset:
    """Normalizes the text and adds the numbers that the rules look at; Arrow goes to ``file``."""
    if len(split) == 0:  # map would not add the columns
        return Dataset.from_dict({name: [] for name in _EXAMINED}, features=_EXAMINED)
    return split.map(
        _examine_batch,
        batched=True,
        fn_kwargs={"nfc": clean.nfc, "control": clean.control},
        features=_EXAMINED,
        cache_file_name=str(file),
        desc=f"cleaning {file.stem}",
    )


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


def _examine_batch(batch: dict[str, list[str]], *, nfc: bool, control: bool) -> dict[str, Any]:
    rows: dict[str, list[Any]] = {name: [] for name in _EXAMINED}
    for pair in zip(batch["source"], batch["target"], strict=True):
        raw = [text or "" for text in pair]
        composed = [normalize(text, nfc=nfc, control=False) for text in raw]
        source, target = clear = [normalize(text, nfc=False, control=control) for text in composed]
        rows["source"].append(source)
        rows["target"].append(target)
        rows["nfc"].append(composed != raw)
        rows["control"].append(clear != composed)
        rows["source_chars"].append(len(source.strip()))
        rows["target_chars"].append(len(target.strip()))
        rows["source_key"].append(_digest(leak_key(source)))
        rows["target_key"].append(_digest(leak_key(target)))
        rows["pair_key"].append(_digest(f"{source}\n{target}"))
        rows["identical"].append(source == target)
    return rows


def leak_key(text: str) -> str:
    """What the leak guard compares: the text without case, punctuation and extra space."""
    folded = unicodedata.normalize("NFC", text.casefold())
    return " ".join(_punctuation().sub(" ", folded).split()) or " ".join(folded.split())


@cache
def _punctuation() -> re.Pattern[str]:
    """Matches punctuation, white space, controls and format characters, but no other symbols."""
    return re.compile(
        "["
        + "".join(
            re.escape(character)
            for character in map(chr, range(sys.maxunicode + 1))
            if unicodedata.category(character) in _PUNCTUATION
        )
        + "]+"
    )


_PUNCTUATION = {"Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po", "Sk", "Zs", "Zl", "Zp", "Cc", "Cf"}


def _digest(text: str) -> int:
    data = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


class Sieve:
    """A split on its way through the rules: which pairs are still in, and why others are not."""

    def __init__(self, split: Dataset) -> None:
        self.split = split
        self.keep = np.ones(len(split), dtype=bool)
        self.dropped: dict[str, dict[str, Any]] = {}

    def __getitem__(self, column: str) -> NDArray[Any]:
        kind = self.split.features[column].dtype  # given, because an empty column shows none
        return np.asarray(self.split.with_format("numpy")[column][:], dtype=kind)

    def drop(self, rule: str, mask: NDArray[np.bool_]) -> None:
        """Takes out the pairs where ``mask`` is true, and keeps a few as examples."""
        hit = self.keep & mask
        examples = self.split.select(np.flatnonzero(hit)[:NUM_EXAMPLES])
        self.dropped[rule] = {
            "count": int(hit.sum()),
            "examples": [[pair["source"][:200], pair["target"][:200]] for pair in examples],
        }
        self.keep &= ~hit

    def kept(self) -> Dataset:
        """The text of the pairs that are still in."""
        return self.split.select(np.flatnonzero(self.keep)).select_columns(["source", "target"])

    def summary(self) -> str:
        """The counts in one line."""
        counts = [f"{rule} {entry['count']}" for rule, entry in self.dropped.items()]
        return ", ".join([f"read {len(self.split)}", *counts])

    def report(self) -> dict[str, Any]:
        """The counts and examples of every rule."""
        return {
            "read": len(self.split),
            "normalized": {rule: int(self[rule].sum()) for rule in ("nfc", "control")},
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
    columns = ("source_key", "target_key")
    train = sieves["train"]
    leaked = {}
    leaks = np.zeros(len(train.split), dtype=bool)
    for name in ("valid", "test"):
        heldout = sieves[name]
        affected = np.zeros(len(heldout.split), dtype=bool)
        for column in columns:
            affected |= np.isin(heldout[column], train[column][train.keep])
            leaks |= np.isin(train[column], heldout[column][heldout.keep])
        leaked[name] = int((affected & heldout.keep).sum())
    if clean.leaks:
        train.drop("leaks", leaks)
    return leaked


def cut(
    train: Dataset, valid: Dataset | None, test: Dataset | None, data: DataConfig
) -> tuple[Dataset, Dataset, Dataset]:
    """Cuts off the held-out splits that the source lacks.

    Pairs are chosen by a hash of their source, so the choice neither depends on their order nor
    moves much when text is added. One pair stands for all that share its source; the leak guard
    takes the others out of the training text.
    """
    if valid is not None and test is not None:
        return train, valid, test
    numbers = [data.num_valid if valid is None else 0, data.num_test if test is None else 0]
    sieve = Sieve(train)
    full = np.flatnonzero((sieve["source_chars"] > 0) & (sieve["target_chars"] > 0))
    _, first = np.unique(sieve["source_key"][full], return_index=True)
    chosen = full[first]  # in the order of the keys, which are hashes
    if sum(numbers) > len(chosen) // 5:
        numbers = [min(number, len(chosen) // 10) for number in numbers]
        log.warning("little text: only %d validation and %d test pairs are cut off", *numbers)
    num_valid, num_test = numbers
    if valid is None:
        valid = train.select(np.sort(chosen[:num_valid]))
    if test is None:
        test = train.select(np.sort(chosen[num_valid : num_valid + num_test]))
    rest = np.ones(len(train), dtype=bool)
    rest[chosen[: num_valid + num_test]] = False
    return train.select(np.flatnonzero(rest)), valid, test


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
