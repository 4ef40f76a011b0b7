"""Text to ids and back, in every script."""

import random
from pathlib import Path

import pytest

from mt.config import Algorithm, TokenizerConfig
from mt.tokenizer import BOS, EOS, PAD, UNK, Tokenizer, train_tokenizer

TEXTS = [
    "In the beginning was a small test, and it said “hello”.",
    "Ein Löwe, größer als „alle“ — außer Ötzi; naïve façade, año, pingüino!",
    "В начале было слово, ёлка и подъезд.",
    "Ἐν ἀρχῇ ἦν ὁ λόγος",
    "בְּרֵאשִׁית בָּרָא",
    "في البدء كان الكلمة، وهذا اختبارٌ.",
    "در آغاز می‌خواهم کلمه بود؟",
    "आदि में परमेश्वर था।",
    "起初，有一个测试。テストです。",
    "태초에 말씀이 계시니라",
]
UNSEEN = [
    "ไทย ქართული ᠮᠣᠩᠭᠣᠯ",
    "😀 👩‍👩‍👧 🇩🇪",
    "½ … ﬁ ² Å e\u0301",
    "\x00\x01\x7f\x1b[0m",
    "<s> </s> <0x41>",
]


@pytest.fixture(scope="module", params=list(Algorithm))
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return train_tokenizer(TEXTS * 3, TokenizerConfig(algorithm=request.param, vocab_size=600))


@pytest.mark.parametrize("text", [*TEXTS, *UNSEEN, "", " ", "  two   spaces ", "a\tb\nc"])
def test_round_trip_is_exact_up_to_white_space(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode([text])
    assert tokenizer.decode(ids)[0].split() == text.split()
    assert not {PAD, BOS, EOS, UNK} & set(ids[0])
    assert all(id < len(tokenizer) for id in ids[0])


def test_marker_of_a_space_comes_back_as_a_space(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode(["a▁b"])) == ["a b"]


def test_lone_surrogate_becomes_a_question_mark(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode(["\ud800"])) == ["?"]


def test_special_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.pieces([PAD, BOS, EOS, UNK]) == ["<pad>", "<s>", "</s>", "<unk>"]
    ids = tokenizer.encode(TEXTS)
    padded = [[BOS, *row, EOS, PAD, PAD] for row in ids]
    assert tokenizer.decode(padded) == tokenizer.decode(ids)
    assert tokenizer.encode([]) == tokenizer.decode([]) == []


def test_saved_and_loaded_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.model")
    loaded = Tokenizer.load(tmp_path / "tokenizer.model")
    assert len(loaded) == len(tokenizer)
    assert loaded.encode(TEXTS) == tokenizer.encode(TEXTS)


def test_missing_and_damaged_models_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no tokenizer at"):
        Tokenizer.load(tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        Tokenizer.load(tmp_path / "tokenizer.model")


def test_too_large_a_vocabulary_is_lowered_aloud(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    tokenizer = train_tokenizer(TEXTS, TokenizerConfig(vocab_size=30_000))
    assert len(tokenizer) < 30_000
    assert f"lowered to {len(tokenizer)}" in caplog.text
    assert capfd.readouterr() == ("", "")  # SentencePiece itself stays quiet


def test_too_small_a_vocabulary_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="vocab_size=280 has no room .*character_coverage"):
        train_tokenizer(TEXTS, TokenizerConfig(vocab_size=280))


def test_rare_characters_become_bytes_where_coverage_is_lowered() -> None:
    texts = [*(["plain words only"] * 500), "一"]
    tokenizer = train_tokenizer(texts, TokenizerConfig(vocab_size=400, character_coverage=0.99))
    assert tokenizer.pieces(tokenizer.encode(["一"])[0])[-3:] == ["<0xE4>", "<0xB8>", "<0x80>"]
    assert tokenizer.decode(tokenizer.encode(["一"])) == ["一"]


def test_the_sample_depends_on_the_seed_alone(tmp_path: Path) -> None:
    words = [f"{a}{b}{c}" for a in "bdfgklm" for b in "aeiou" for c in "nrst"]
    shuffled = random.Random(0)
    texts = [" ".join(shuffled.choices(words, k=8)) for _ in range(1000)]
    config = TokenizerConfig(vocab_size=300, max_sentences=50)

    def model(seed: int) -> bytes:
        train_tokenizer(iter(texts), config, seed=seed).save(tmp_path / "model")
        return (tmp_path / "model").read_bytes()

    assert model(1) == model(1)
    assert model(1) != model(2)
