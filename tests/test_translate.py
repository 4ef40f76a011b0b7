"""From text to text: order, splitting, bounds; mostly with a model that copies its source."""

import math
import random

import pytest
import torch
from torch import Tensor

from mt.checkpoint import LoadedModel
from mt.config import Config, DecodeConfig, Device, ModelConfig, Precision
from mt.model import Transformer
from mt.runtime import resolve
from mt.search import Hypothesis
from mt.tokenizer import EOS, PAD, Tokenizer, TokenizerConfig, normalize, train_tokenizer
from mt.translate import Translation, Translator, length_bounds

SENTENCE = "The man and his dog saw a red house near the old water."
WORDS = SENTENCE.removesuffix(".").split()
ODD_TEXTS = [
    "",
    "   \t ",
    "\x00",
    "nul\x00inside",
    "bell\x07 escape\x1b[31m",
    "\ufeffbyte order mark",
    "line\u2028separator\x0bvertical\x0cform\x85next",
    "half \udc80\ud800 characters",
    "\ufffd\uffff\U0010ffff",
    "😀👩‍👩‍👧‍👦🇩🇪",
    "Ελληνικά русский עברית العربية हिन्दी ไทย 中文 日本語 한국어 አማርኛ 𐌰𐌱𐌲",
    "e\u0301" + "\u0301" * 300,
    "<s> </s> <pad> <unk> <0x0A> ▁",
    "a" * 5000,
    "." * 3000,
    "中文。" * 700,
    " ".join(WORDS * 100),
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    generator = random.Random(0)
    lines = [" ".join(generator.choices(WORDS, k=12)) for _ in range(300)]
    return train_tokenizer([*lines, *[SENTENCE] * 20], TokenizerConfig(vocab_size=330), seed=1)


class CopyDecoder:
    """Writes each sentence's source, piece by piece, and then an end of sentence."""

    def __init__(self, source: Tensor, vocab_size: int) -> None:
        self.source = source
        self.vocab_size = vocab_size
        self.position = 0

    def step(self, tokens: Tensor, parents: Tensor) -> Tensor:
        logits = torch.zeros((*tokens.shape, self.vocab_size))
        logits[torch.arange(len(tokens)), :, self.source[:, self.position]] = 20.0
        self.position = min(self.position + 1, self.source.shape[1] - 1)
        return logits

    def keep(self, sentences: Tensor) -> None:
        self.source = self.source[sentences]


class CopyModel:
    """Stands in for a Transformer; notes the batches that it is given."""

    length_head = object()

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.batches: list[Tensor] = []

    def encode(self, source: Tensor, source_mask: Tensor) -> Tensor:
        assert torch.equal(source_mask, source != PAD)
        self.batches.append(source)
        return source.masked_fill(~source_mask, EOS)

    def log_length_ratio(self, memory: Tensor, source_mask: Tensor) -> Tensor:
        return torch.zeros(len(memory))

    def start(self, memory: Tensor, source_mask: Tensor) -> CopyDecoder:
        return CopyDecoder(memory, self.vocab_size)


def make(
    model: object, tokenizer: Tokenizer, decode: DecodeConfig, *, max_length: int = 64, **info: int
) -> Translator:
    config = Config()
    config.train.max_length = max_length
    runtime = resolve(device=Device.cpu, precision=Precision.fp32, num_threads=1)
    return Translator(model, tokenizer, config, runtime, decode=decode, **info)  # type: ignore[arg-type]


def copier(tokenizer: Tokenizer, *, max_length: int = 64, **info: int) -> Translator:
    return make(
        CopyModel(len(tokenizer)),
        tokenizer,
        DecodeConfig(beam_size=2, max_length=max_length, batch_tokens=512),
        max_length=max_length,
        **info,
    )


def best(translator: Translator, texts: list[str]) -> list[str]:
    return [translations[0].text for translations in translator.translate(texts)]


def segments(translator: Translator) -> list[str]:
    """The texts that the model was given, one a row."""
    rows = [row.tolist() for batch in translator.model.batches for row in batch]
    return translator.tokenizer.decode(rows)


def squeezed(text: str) -> str:
    return "".join(text.split())


def test_order_is_kept_and_blank_stays_blank(tokenizer: Tokenizer) -> None:
    generator = random.Random(1)
    texts = [" ".join(generator.choices(WORDS, k=generator.randrange(12))) for _ in range(200)]
    assert "" in texts
    assert best(copier(tokenizer), texts) == texts


def test_nothing_is_lost_of_odd_and_long_texts(tokenizer: Tokenizer) -> None:
    found = best(copier(tokenizer), ODD_TEXTS)
    for text, translation in zip(ODD_TEXTS, found, strict=True):
        # The tokenizer's own mark of a space is the one character that does not come back.
        expected = squeezed(normalize(text).replace("▁", " "))
        assert squeezed(translation) == expected
        assert len(translation.splitlines()) <= 1


@pytest.mark.parametrize(
    "unit", ["a", "word ", "A sentence. ", "語", "\x01", "😀", ",", ". ", "'", "。", "\u200d"]
)
def test_a_line_of_100_000_characters_is_cut_without_loss(tokenizer: Tokenizer, unit: str) -> None:
    translator = copier(tokenizer, max_length=200)
    text = (unit * (100_000 // len(unit) + 1))[:100_000]
    parts = translator._parts(text)
    assert all(0 < len(part) < 200 for part in parts)
    assert squeezed("".join(tokenizer.decode(parts))) == squeezed(normalize(text))


def test_a_line_of_100_000_characters_among_others(tokenizer: Tokenizer) -> None:
    translator = copier(tokenizer)
    translator.decode = DecodeConfig(beam_size=1, max_length=64, batch_tokens=20_000)
    long = f"{SENTENCE} " * (100_000 // len(SENTENCE))
    texts = ["the man", long, "the dog"]
    assert best(translator, texts) == [normalize(text) for text in texts]
    assert all(batch.numel() <= 20_000 for batch in translator.model.batches)


def test_no_source_is_longer_than_those_of_the_training(tokenizer: Tokenizer) -> None:
    translator = copier(tokenizer, max_length=20)
    translator.translate(ODD_TEXTS)
    assert max(batch.shape[1] for batch in translator.model.batches) <= 20


def test_batches_keep_to_the_budget(tokenizer: Tokenizer) -> None:
    translator = copier(tokenizer)
    translator.translate([SENTENCE, "the man", "a dog", ""] * 50)
    batches = translator.model.batches
    assert all(batch.numel() * 2 <= 512 for batch in batches)
    assert len(batches) < 50


def test_a_usual_line_is_not_split(tokenizer: Tokenizer) -> None:
    translator = copier(tokenizer, max_length=200, long_source=100)
    two = f"{SENTENCE} {SENTENCE}"
    translator.translate([two, "the man, the dog"])
    assert sorted(segments(translator)) == sorted([two, "the man, the dog"])


@pytest.mark.parametrize(
    "text",
    [
        f"{SENTENCE} {SENTENCE} “Who saw the man?” He ran… {SENTENCE}",
        "The man ran! " * 12,
        "Человек увидел дом. Собака бежит к воде. " * 4,
        "人看見房子。狗跑到水邊！" * 5,
        "आदमी ने घर देखा। कुत्ता भागा। " * 4,
        "رأى الرجل البيت؟ جرى الكلب. " * 5,
    ],
)
def test_a_long_line_is_split_at_its_sentences(tokenizer: Tokenizer, text: str) -> None:
    translator = copier(tokenizer, max_length=500, long_source=60)
    assert squeezed(best(translator, [text])[0]) == squeezed(text)
    parts = segments(translator)
    assert len(parts) > 1
    assert all(part.rstrip("”")[-1] in ".!?…。！।؟" for part in parts)


def test_no_split_after_titles_and_inside_sentences(tokenizer: Tokenizer) -> None:
    text = "Mr. Smith saw J. Doe at 3.5 p.m. near the water, i.e. the old house, and ran home."
    translator = copier(tokenizer, max_length=500, long_source=10)
    assert best(translator, [text]) == [text]
    assert segments(translator) == [text]  # a single sentence, within the training's longest


def test_a_sentence_too_long_is_split_at_its_clauses(tokenizer: Tokenizer) -> None:
    clause = "the man and his dog saw a red house"
    translator = copier(tokenizer, max_length=60)
    text = ", ".join([clause] * 12) + "."
    assert best(translator, [text]) == [text]
    assert all(part.endswith((f"{clause},", f"{clause}.")) for part in segments(translator))


def test_languages_without_spaces_are_joined_without(tokenizer: Tokenizer) -> None:
    translator = copier(tokenizer, max_length=500, long_source=30)
    text = "人看見房子。狗跑到水邊！" * 5
    assert best(translator, [text])[0].count(" ") > 0
    translator.separator = ""
    assert best(translator, [text]) == [text]


def test_an_output_never_holds_a_newline(tokenizer: Tokenizer) -> None:
    translator = copier(tokenizer)
    newline = tokenizer.pieces(range(len(tokenizer))).index("<0x0A>")
    (a,) = tokenizer.encode(["a"])
    (joined,) = translator._join([[Hypothesis([*a, newline, *a, newline], 0.0)]])
    assert joined.text == "a a"


@pytest.fixture(scope="module")
def transformer(tokenizer: Tokenizer) -> Transformer:
    torch.manual_seed(1)
    config = ModelConfig(name="t", dim=16, ffn_dim=32, num_heads=2)
    model = Transformer(config, vocab_size=len(tokenizer)).eval()
    # An untrained model repeats what it reads; far from that, every sentence has its own output.
    for parameter in model.parameters():
        parameter.data.mul_(2.0)
    return model


def test_company_and_budget_change_nothing(tokenizer: Tokenizer, transformer: Transformer) -> None:
    generator = random.Random(3)
    texts = [" ".join(generator.choices(WORDS, k=generator.randrange(1, 15))) for _ in range(30)]
    results = [
        make(
            transformer, tokenizer, DecodeConfig(beam_size=3, max_length=12, batch_tokens=tokens)
        ).translate(texts, n_best=2)
        for tokens in (1, 200, 100_000)
    ]
    for one, two in zip(results[0], results[1], strict=True):
        assert [t.text for t in one] == [t.text for t in two]
        assert [t.score for t in one] == pytest.approx([t.score for t in two], abs=1e-4)
    assert [t[0].text for t in results[0]] == [t[0].text for t in results[2]]
    assert len({t[0].text for t in results[0]}) > 10


def test_n_best_is_sorted_also_for_split_lines(
    tokenizer: Tokenizer, transformer: Transformer
) -> None:
    decode = DecodeConfig(beam_size=4, max_length=12)
    translator = make(transformer, tokenizer, decode, max_length=24)
    short, long, blank = translator.translate(["the man ran", SENTENCE * 4, " "], n_best=4)
    for translations in (short, long):
        scores = [translation.score for translation in translations]
        assert len(scores) == 4
        assert scores == sorted(scores, reverse=True)
        assert all(math.isfinite(score) for score in scores)
    assert blank == [Translation("", 0.0)]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_a_split_line_is_scored_as_one_hypothesis(tokenizer: Tokenizer, alpha: float) -> None:
    translator = copier(tokenizer)
    translator.decode = DecodeConfig(length_penalty=alpha)
    # Log probabilities -2 over 4 pieces and -3 over 9, the end of sentence included.
    parts = [[Hypothesis([5] * 3, -2 / 4**alpha)], [Hypothesis([5] * 8, -3 / 9**alpha)]]
    assert translator._join(parts)[0].score == pytest.approx(-5 / 13**alpha)


def test_more_hypotheses_than_the_beam_holds(
    tokenizer: Tokenizer, transformer: Transformer
) -> None:
    translator = make(transformer, tokenizer, DecodeConfig(beam_size=2))
    with pytest.raises(ValueError, match="n_best"):
        translator.translate(["the man"], n_best=3)


def test_length_bounds() -> None:
    lengths = torch.tensor([10, 10, 10, 200, 1])
    ratios = torch.tensor([0.0, math.log(2), -50.0, 0.0, 1e9])
    bounds = length_bounds(lengths, ratios, max_length=100)
    assert bounds.tolist() == [25, 40, 10 + 1, 100, 100]
    assert length_bounds(lengths, None, max_length=7).tolist() == [7] * 5
    assert (length_bounds(lengths, ratios * math.nan, max_length=7) <= 7).all()


def test_the_length_head_bounds_the_output(tokenizer: Tokenizer) -> None:
    model = CopyModel(len(tokenizer))
    translator = make(model, tokenizer, DecodeConfig(beam_size=1, max_length=256), max_length=256)
    text = " ".join(["the"] * 100)
    assert best(translator, [text]) == [text]
    model.log_length_ratio = lambda memory, mask: torch.full((len(memory),), -2.0)
    assert 5 < len(best(translator, [text])[0].split()) < 50


def test_loaded_model_is_what_is_used() -> None:
    """The stand-ins above have the fields of the real thing."""
    assert {"path", "model", "tokenizer", "config", "info"} <= set(LoadedModel.__dataclass_fields__)
