"""A pair's way from raw text to ids, and that what is kept can be trusted."""

import json
import multiprocessing
import os
import random
import shutil
import sys
import time
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from mt import cleaning, digests
from mt import corpus as corpus_module
from mt.cleaning import examine_batch, leak_key, leak_keys, table
from mt.config import CleanConfig, DataConfig, Origin, TokenizerConfig
from mt.corpus import Corpus, find, prepare
from mt.tokenizer import normalize

TOKENIZER = TokenizerConfig(vocab_size=300)
Pairs = list[tuple[str, str]]
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
ZAHLEN = ["eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun", "zehn"]


def good_pairs(num: int) -> Pairs:
    """Different pairs that no rule objects to."""
    digits = [[int(d) for d in f"{i:04d}"] for i in range(num)]
    return [(" ".join(NUMBERS[d] for d in n), " ".join(ZAHLEN[d] for d in n)) for n in digits]


def write(path: Path, pairs: Pairs) -> str:
    rows = [json.dumps({"en": en, "de": de}) for en, de in pairs]
    path.write_text("".join(row + "\n" for row in rows))
    return str(path)


def data_config(folder: Path, train: Pairs, **settings: Any) -> DataConfig:
    """A corpus of files; the held-out ones are harmless unless they are given."""
    held_out = {
        "valid": settings.pop("valid", [("valid text", "Text zur Probe")]),
        "test": settings.pop("test", [("test text", "Text zum Test")]),
    }
    paths = {
        name: write(folder / f"{name}.jsonl", pairs)
        for name, pairs in held_out.items()
        if pairs is not None
    }
    train_path = write(folder / "train.jsonl", train)
    return DataConfig(name="t", origin=Origin.files, train=train_path, **paths, **settings)


def prepared(folder: Path, train: Pairs, **settings: Any) -> Corpus:
    return prepare(data_config(folder, train, **settings), TOKENIZER, root=folder / "data")


def pairs_of(split: Any) -> Pairs:
    return list(zip(split["source"], split["target"], strict=True))


def dropped(corpus: Corpus, split: str = "train") -> dict[str, int]:
    rules = corpus.report["splits"][split]["dropped"]
    return {rule: entry["count"] for rule, entry in rules.items() if entry["count"]}


# Cleaning

BAD: dict[str, Pairs] = {
    "empty": [("", "etwas"), ("something", " \x07\t")],
    "max_chars": [("long " * 300, "lang " * 300)],
    "max_length_ratio": [("word", "ein wirklich langer Satz")],
    "identical": [("the same text", "the same text")],
    "duplicates": [good_pairs(1)[0], good_pairs(1)[0]],
    "leaks": [("Valid: TEXT!", "neu"), ("something new", "text zum test")],
}


@pytest.mark.parametrize("rule", BAD)
def test_each_rule_drops_what_it_should_and_can_be_switched_off(tmp_path: Path, rule: str) -> None:
    good = good_pairs(30)
    corpus = prepared(tmp_path, good + BAD[rule])
    assert pairs_of(corpus.train) == good
    assert dropped(corpus) == {rule: len(BAD[rule])}
    examples = corpus.report["splits"]["train"]["dropped"][rule]["examples"]
    assert [example[0].strip()[:9] for example in examples] == [
        source.strip()[:9] for source, _ in BAD[rule]
    ]
    off = CleanConfig(**{rule: None if rule.startswith("max") else False})
    if rule == "empty":  # nothing is also much shorter than anything
        off = replace(off, max_length_ratio=None)
    corpus = prepared(tmp_path, good + BAD[rule], clean=off)
    assert len(corpus.train) == len(good) + len(BAD[rule])
    assert dropped(corpus) == {}


def test_first_rule_that_objects_counts(tmp_path: Path) -> None:
    corpus = prepared(tmp_path, [*good_pairs(30), ("x" * 2000, "x" * 2000), ("", ""), ("", "")])
    assert dropped(corpus) == {"empty": 2, "max_chars": 1}


def test_normalization_is_counted_and_can_be_switched_off(tmp_path: Path) -> None:
    odd = ("cafe\u0301  one\u00a0two", "\ufeffCafe\x00 eins ½…")
    corpus = prepared(tmp_path, [*good_pairs(30), odd])
    assert corpus.train[30]["source"] == "café one two"
    assert corpus.train[30]["target"] == "Cafe eins ½…"
    assert corpus.report["splits"]["train"]["normalized"] == {"nfc": 1, "control": 1}
    clean = CleanConfig(nfc=False, control=False)
    assert pairs_of(prepared(tmp_path, [*good_pairs(30), odd], clean=clean).train)[30] == odd


ODD = [
    character
    for character in map(chr, range(sys.maxunicode + 1))
    if unicodedata.category(character) not in ("Cn", "Co", "Cs")
    and not (character.isalnum() and unicodedata.is_normalized("NFC", character))
]


@pytest.mark.parametrize("form", ["a{}b", "{}b", "a{}", "a {} b", "o{}\u0301"])
def test_text_of_every_kind_is_normalized(form: str) -> None:
    """Most of it is passed over in preparation, so it must be seen which is not."""
    texts = [form.format(character) for character in ODD]
    split = Dataset.from_dict({"source": texts, "target": texts})
    for nfc, control in ((True, True), (True, False), (False, True), (False, False)):
        done = examine_batch(split.data.table, nfc=nfc, control=control)
        assert done["source"].to_pylist() == [normalize(t, nfc=nfc, control=control) for t in texts]


def test_leak_keys_are_those_of_each_text() -> None:
    generator = random.Random(1)
    alphabet = [*ODD, *"aßÀΣςé \n" * 500]
    texts = ["".join(generator.choices(alphabet, k=generator.randrange(9))) for _ in range(3000)]

    def plain(text: str) -> str:
        folded = unicodedata.normalize("NFC", text.casefold())
        skipped = {"Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po", "Sk", "Zs", "Zl", "Zp", "Cc", "Cf"}
        bare = "".join(" " if unicodedata.category(c) in skipped else c for c in folded)
        return " ".join(bare.split()) or " ".join(folded.split())

    assert leak_keys(texts) == [plain(text) for text in texts]
    assert leak_keys([]) == []


def test_held_out_text_is_only_normalized(tmp_path: Path) -> None:
    held_out = [
        pair for rule in ("max_chars", "max_length_ratio", "identical") for pair in BAD[rule]
    ]
    held_out = [(a.strip(), b.strip()) for a, b in held_out]
    corpus = prepared(
        tmp_path, good_pairs(30), test=[*held_out, *held_out, ("a  b\t", "c"), ("", "x")]
    )
    assert pairs_of(corpus.test) == [*held_out, *held_out, ("a b", "c")]
    assert dropped(corpus, "test") == {"empty": 1}


# Leaks


def test_leaks_are_counted_by_held_out_sentences(tmp_path: Path) -> None:
    valid = [("Hello, world!", "Hallo, Welt!"), ("Untouched.", "Unberührt.")]
    test = [("Good day", "Guten Tag"), ("Good night", "Gute Nacht")]
    train = [
        *good_pairs(30),
        ("hello world", "anders"),  # the source of valid 0, twice
        ("HELLO  WORLD…", "noch anders"),
        ("different", "guten tag!"),  # the target of test 0
        ("Guten Tag", "Good day"),  # the other way round: no leak
    ]
    corpus = prepared(tmp_path, train, valid=valid, test=test)
    assert sum(corpus.num_leaked.values()) == 2
    assert corpus.report["leaked"] == {"valid": 1, "test": 1}
    assert dropped(corpus) == {"leaks": 3}
    kept = prepared(tmp_path, train, valid=valid, test=test, clean=CleanConfig(leaks=False))
    assert (sum(kept.num_leaked.values()), len(kept.train)) == (2, len(train))


def test_leak_key_looks_through_case_space_and_punctuation_only() -> None:
    assert leak_key("  „Straße“ – JA! ") == leak_key("STRASSE, ja")
    assert leak_key("Cafe\u0301") == leak_key("café")
    assert leak_key("कि") != leak_key("का")  # vowel signs are no punctuation
    assert leak_key("2 + 2") != leak_key("2 - 2")
    assert leak_key("!") != leak_key("?")  # nothing but punctuation: compared as it is


# Cutting off


def test_cut_is_deterministic_and_clean(tmp_path: Path) -> None:
    pairs = good_pairs(400)
    settings = {"valid": None, "test": None, "num_valid": 20, "num_test": 30}
    first = prepared(tmp_path, pairs, **settings)
    parts = [set(pairs_of(split)) for split in (first.train, first.valid, first.test)]
    assert [len(part) for part in parts] == [350, 20, 30]
    assert set.union(*parts) == set(pairs) and not any(first.num_leaked.values())

    second = prepared(tmp_path, pairs[::-1] + pairs[:50], **settings)
    assert set(pairs_of(second.valid)) == parts[1]
    assert set(pairs_of(second.test)) == parts[2]
    assert not set(pairs_of(second.train)) & (parts[1] | parts[2])


def test_only_the_missing_split_is_cut(tmp_path: Path) -> None:
    corpus = prepared(tmp_path, good_pairs(400), test=None, num_test=30)
    assert (len(corpus.train), len(corpus.valid), len(corpus.test)) == (370, 1, 30)


def test_little_text_gives_little_away(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    corpus = prepared(tmp_path, good_pairs(100), valid=None, test=None)
    assert (len(corpus.train), len(corpus.valid), len(corpus.test)) == (80, 10, 10)
    assert "only 10 validation and 10 test pairs" in caplog.text


def test_max_pairs_takes_the_first(tmp_path: Path) -> None:
    assert pairs_of(prepared(tmp_path, good_pairs(100), max_pairs=40).train) == good_pairs(40)


# What comes out


def test_the_parts_that_text_passes_in_do_not_shape_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [pair for bad in BAD.values() for pair in bad]
    pairs = [*good_pairs(150), *pairs, *good_pairs(200), ("cafe\u0301 one", "Cafe  eins")]
    settings = {"num_valid": 20, "valid": None}

    def whole(name: str) -> dict[str, Any]:
        config = data_config(tmp_path, pairs, **settings)
        corpus = prepare(config, TOKENIZER, root=tmp_path / name)
        parts = {split: getattr(corpus, split)[:] for split in ("train", "valid", "test")}
        return {**corpus.report, **parts}

    at_once = whole("at once")
    monkeypatch.setattr(corpus_module.sources, "NUM_ROWS", 7)
    monkeypatch.setattr(cleaning, "NUM_ROWS", 11)
    monkeypatch.setattr(cleaning, "PAIRS_A_PROCESS", 100)
    monkeypatch.setattr(cleaning.os, "cpu_count", lambda: 3)
    assert whole("in parts") == at_once


def test_rows_lie_as_they_are_counted(tmp_path: Path) -> None:
    """A mapping of indices in between would make every access slow."""
    corpus = prepared(tmp_path, good_pairs(100) + BAD["identical"], valid=None)
    for split in (corpus.train, corpus.valid, corpus.test):
        assert split.data.column("source_ids").to_pylist() == split["source_ids"][:]
        assert split.data.num_rows == len(split)


def test_ids_are_those_of_the_text(tmp_path: Path) -> None:
    corpus = prepared(tmp_path, good_pairs(50))
    for split in (corpus.train, corpus.valid, corpus.test):
        for side in ("source", "target"):
            ids = split[f"{side}_ids"][:]
            assert ids == corpus.tokenizer.encode(split[side][:])
            assert corpus.tokenizer.decode(ids) == split[side][:]


def test_tokenizer_has_seen_nothing_of_the_held_out_text(tmp_path: Path) -> None:
    corpus = prepared(tmp_path, good_pairs(50), test=[("ωωω ωωω", "ψψψ ψψψ")])
    pieces = corpus.tokenizer.pieces(range(len(corpus.tokenizer)))
    assert not any("ω" in piece or "ψ" in piece for piece in pieces)


def test_table_shows_every_rule(tmp_path: Path) -> None:
    corpus = prepared(tmp_path, good_pairs(30) + BAD["identical"])
    rows = table(corpus.report).splitlines()
    assert next(row for row in rows if "identical" in row).split() == ["dropped:", "identical", "1"]
    assert next(row for row in rows if row.startswith("kept")).split() == ["kept", "30", "1", "1"]
    assert all(any(rule in row for row in rows) for rule in (*BAD, "nfc", "control"))


@pytest.mark.parametrize(
    ("train", "settings", "message"),
    [
        ([], {}, "no train pair is left of t en-de: read 0"),
        (BAD["identical"], {}, "no train pair is left.*read 1.*identical 1"),
        (good_pairs(30), {"test": [("", "")]}, "no test pair is left.*empty 1"),
        (good_pairs(30), {"valid": None, "num_valid": 0}, "no valid pair is left"),
    ],
)
def test_nothing_left_is_an_error_and_leaves_nothing(
    tmp_path: Path, train: Pairs, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        prepared(tmp_path, train, **settings)
    left = [path.name for path in (tmp_path / "data" / "prepared").iterdir()]
    assert all(name.endswith(".lock") for name in left)


# Keeping


def no_loading(*_: object, **__: object) -> None:
    raise AssertionError("the text was read again")


def test_prepared_text_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = data_config(tmp_path, good_pairs(50))
    first = prepare(config, TOKENIZER, root=tmp_path / "data")
    monkeypatch.setattr(corpus_module.sources, "load", no_loading)
    os.utime(str(config.train), (1, 1))  # a new date is no new content
    second = prepare(config, TOKENIZER, root=tmp_path / "data")
    found = find(first.path)
    assert found is not None and second.path == first.path == found.path
    assert (second.num_leaked, second.report) == (first.num_leaked, first.report)


def test_whatever_shapes_the_result_changes_the_fingerprint(tmp_path: Path) -> None:
    config = data_config(tmp_path, good_pairs(50))
    seen = {prepare(config, TOKENIZER, root=tmp_path / "data").fingerprint}
    for data, tokenizer in (
        (replace(config, clean=CleanConfig(nfc=False)), TOKENIZER),
        (replace(config, max_pairs=45), TOKENIZER),
        (config, replace(TOKENIZER, vocab_size=290)),
    ):
        seen.add(prepare(data, tokenizer, root=tmp_path / "data").fingerprint)
    size = Path(str(config.train)).stat().st_size
    write(Path(str(config.train)), good_pairs(50)[::-1])
    assert Path(str(config.train)).stat().st_size == size
    seen.add(prepare(config, TOKENIZER, root=tmp_path / "data").fingerprint)
    assert len(seen) == 5


@pytest.mark.parametrize("name", ["train/*.arrow", "tokenizer.model", "report.json", "files.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "changed"])
def test_damaged_text_is_prepared_again(tmp_path: Path, name: str, damage: str) -> None:
    config = data_config(tmp_path, good_pairs(50))
    path = prepare(config, TOKENIZER, root=tmp_path / "data").path
    (file,) = path.glob(name)
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        half = len(content) // 2
        rest = b"" if damage == "cut" else bytes([content[half] ^ 1]) + content[half + 1 :]
        file.write_bytes(content[:half] + rest)
    assert find(path) is None
    assert pairs_of(prepare(config, TOKENIZER, root=tmp_path / "data").train) == good_pairs(50)


def test_damage_with_the_old_date_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "TICK", -(1 << 60))  # all files count as old
    path = prepared(tmp_path, good_pairs(50)).path
    (file,) = path.glob("train/*.arrow")
    facts = file.stat()
    time.sleep(0.05)
    file.write_bytes(file.read_bytes()[::-1])
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert find(path) is None


def test_a_wrong_memory_of_digests_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "TICK", -(1 << 60))
    path = prepared(tmp_path, good_pairs(50)).path
    memory = path / corpus_module.MEMORY
    memory.write_text(memory.read_text().replace('"sha256": "', '"sha256": "0'))
    assert find(path) is not None


def test_interrupted_preparation_is_not_taken_for_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = data_config(tmp_path, good_pairs(50))

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(corpus_module, "train_tokenizer", killed)
        prepare(config, TOKENIZER, root=tmp_path / "data")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(corpus_module, "train_tokenizer", killed)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # killed before it could tidy up
        prepare(config, TOKENIZER, root=tmp_path / "data")
    assert len(prepare(config, TOKENIZER, root=tmp_path / "data").train) == 50


def prepare_elsewhere(config: DataConfig, root: Path) -> str:
    return str(prepare(config, TOKENIZER, root=root).path)


def test_two_processes_do_not_clash(tmp_path: Path) -> None:
    config = data_config(tmp_path, good_pairs(500))
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        jobs = [(config, tmp_path / "data")] * 2
        paths = pool.starmap(prepare_elsewhere, jobs, chunksize=1)
    assert paths[0] == paths[1]
    found = find(paths[0])
    assert found is not None and len(found.train) == 500


# The real default corpus


@pytest.mark.slow
def test_default_corpus(data_root: Path) -> None:
    config = DataConfig(name="bible", origin=Origin.bible)
    corpus = prepare(config, TokenizerConfig(), root=data_root)
    assert 28_000 < len(corpus.train) < 28_800
    assert (len(corpus.valid), len(corpus.test)) == (915, 1399)
    assert len(corpus.tokenizer) == 4000
    assert sum(corpus.num_leaked.values()) > 0  # the Bible repeats itself
    train_keys = [set(map(leak_key, corpus.train[side])) for side in ("source", "target")]
    for split in (corpus.valid, corpus.test):
        for side, keys in zip(("source", "target"), train_keys, strict=True):
            assert not keys & set(map(leak_key, split[side]))
            assert corpus.tokenizer.decode(split[f"{side}_ids"][:]) == split[side][:]
