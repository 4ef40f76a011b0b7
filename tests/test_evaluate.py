"""Scores, significance, the held-out loss, and the files that an evaluation leaves."""

import dataclasses
import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import SOURCES, TARGETS, files_config, save_tiny_model

from mt import corpus
from mt.batching import collate
from mt.checkpoint import load_model
from mt.config import (
    DecodeOverrides,
    Device,
    EvalConfig,
    EvaluateConfig,
    ModelConfig,
    Precision,
    Split,
    load_config,
)
from mt.evaluate import evaluate, heldout_loss, num_cut, perplexity, quick_scores, score, table
from mt.model import Transformer
from mt.runtime import Runtime, resolve

REFERENCES = [f"the man number {number} saw a red house" for number in range(60)]
WORSE = [text.replace("red house", "dog") for text in REFERENCES]


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return resolve(device=Device.cpu, precision=Precision.fp32, num_threads=1)


def test_scores_lie_in_their_intervals() -> None:
    some_worse = REFERENCES[:30] + WORSE[30:]
    result = score({"model": some_worse}, REFERENCES)
    for key in ("bleu", "chrf"):
        low, high = result[f"{key}_interval"]
        assert low < result[key] < high < 100
    assert result["baseline"] is None
    assert "tok:13a" in result["signatures"]["bleu"]
    assert "nc:6" in result["signatures"]["chrf"]


def test_quick_scores_are_the_same_scores() -> None:
    result = score({"model": WORSE}, REFERENCES)
    assert quick_scores(WORSE, REFERENCES) == pytest.approx((result["bleu"], result["chrf"]))
    assert quick_scores(REFERENCES, REFERENCES) == pytest.approx((100, 100))


def test_the_p_value_tells_different_systems_from_equal_ones() -> None:
    different = score({"baseline": WORSE, "model": REFERENCES}, REFERENCES)["baseline"]
    assert different["bleu"] < 100
    assert different["bleu_p_value"] < 0.05
    assert different["chrf_p_value"] < 0.05
    shuffled = [WORSE[i] if i % 2 else text for i, text in enumerate(REFERENCES)]
    mirrored = [text if i % 2 else WORSE[i] for i, text in enumerate(REFERENCES)]
    alike = score({"baseline": shuffled, "model": mirrored}, REFERENCES)["baseline"]
    assert alike["bleu_p_value"] > 0.05


def test_languages_without_spaces_have_words_of_their_own() -> None:
    result = score({"model": ["我看見一個人。"]}, ["我看見兩個人。"], target_lang="zh")
    assert "tok:zh" in result["signatures"]["bleu"]
    assert score({"model": ["a"]}, ["b"], target_lang="de")["bleu"] == 0


@pytest.fixture(scope="module")
def transformer() -> Transformer:
    torch.manual_seed(0)
    model = ModelConfig(name="t", dim=16, ffn_dim=32, num_heads=2, dropout=0.5)
    return Transformer(model, vocab_size=40)


def random_pairs(num_pairs: int) -> list[tuple[list[int], list[int]]]:
    generator = random.Random(0)
    return [
        (
            [generator.randrange(4, 40) for _ in range(generator.randrange(1, 9))],
            [generator.randrange(4, 40) for _ in range(generator.randrange(0, 9))],
        )
        for _ in range(num_pairs)
    ]


def test_heldout_loss_is_the_mean_over_target_pieces(
    transformer: Transformer, runtime: Runtime
) -> None:
    pairs = random_pairs(12)
    transformer.train()
    batched = heldout_loss(
        transformer,
        [
            collate([source for source, _ in pairs[i : i + 5]], [t for _, t in pairs[i : i + 5]])
            for i in range(0, 12, 5)
        ],
        runtime,
    )
    assert transformer.training  # as it was before
    transformer.eval()
    log_probs: list[float] = []
    for source, target in pairs:  # one by one, without padding or batches
        batch = collate([source], [target])
        logits = transformer(batch.source, batch.target_in, batch.source_mask)
        chosen = logits.log_softmax(-1).gather(-1, batch.target_out.unsqueeze(-1))
        log_probs += chosen.flatten().tolist()
    assert batched == pytest.approx(-sum(log_probs) / len(log_probs), rel=1e-4)


def test_perplexity() -> None:
    assert perplexity(0.0) == 1.0
    assert perplexity(2.0) == pytest.approx(math.exp(2))
    assert math.isfinite(perplexity(1e6))  # JSON has no infinity


def test_num_cut_counts_the_references_beyond_the_bound(
    transformer: Transformer, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [([5] * 9, [5] * length) for length in (24, 25, 60)]  # + EOS each
    monkeypatch.setattr(transformer, "log_length_ratio", lambda memory, mask: torch.zeros(3))
    assert num_cut(transformer, pairs, runtime, max_length=256) == 2  # bound 1.5 * 10 + 10
    assert num_cut(transformer, pairs, runtime, max_length=20) == 3
    monkeypatch.setattr(transformer, "length_head", None)
    assert num_cut(transformer, pairs, runtime, max_length=256) == 0


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny untrained model, in a folder where its corpus can be prepared."""
    monkeypatch.chdir(tmp_path)
    config = files_config(tmp_path)
    fingerprint = corpus.prepare(config.data, config.tokenizer).fingerprint
    return save_tiny_model(tmp_path / "model", config, num_leaked=7, fingerprint=fingerprint)


def config(model: Path, **settings: object) -> EvaluateConfig:
    result = EvaluateConfig(
        eval=replace(EvalConfig(model=str(model), device=Device.cpu, num_threads=1), **settings)
    )
    result.eval.precision = Precision.fp32
    result.decode.beam_size = 2
    result.decode.max_length = 12
    return result


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")


@pytest.mark.parametrize("split", list(Split))
def test_a_split_is_scored_and_written(model: Path, split: Split) -> None:
    result = evaluate(config(model, split=split))
    written = json.loads((model / "eval" / f"{split.value}.json").read_text())
    assert written == json.loads(json.dumps(result))
    assert {"bleu", "chrf", "signatures", "num_sentences", "num_leaked", "seconds"} <= set(written)
    loaded = load_model(model, device=torch.device("cpu"))
    prepared = corpus.prepare(loaded.config.data, loaded.config.tokenizer)
    expected = getattr(prepared, split.value)
    folder = model / "eval"
    assert lines(folder / f"{split.value}.source.txt") == list(expected["source"])
    references = lines(folder / f"{split.value}.reference.txt")
    assert references == list(expected["target"])
    hypotheses = lines(folder / f"{split.value}.hypothesis.txt")
    assert written["num_sentences"] == len(hypotheses) == len(references) > 0
    assert quick_scores(hypotheses, references)[1] == pytest.approx(written["chrf"])
    assert written["num_leaked"] == {"valid": 0, "test": 7}[split.value]
    assert len(list(folder.iterdir())) == 4  # no partial files stay behind


def test_own_files_are_scored(model: Path, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("\n".join([*SOURCES[:4], "", "a\u2028b"]) + "\n")
    (tmp_path / "out.txt").write_text("\n".join([*TARGETS[:4], "", "c\x0bd"]))
    result = evaluate(config(model, source="in.txt", reference="out.txt"))
    assert result["num_sentences"] == 6
    assert result["num_leaked"] is None
    assert "nobody knows" in table(result)
    for kind in ("source", "hypothesis", "reference"):
        assert len(lines(model / "eval" / f"file-in.txt.{kind}.txt")) == 6
    assert lines(model / "eval" / "file-in.txt.hypothesis.txt")[4] == ""


def test_a_baseline_is_compared(model: Path, tmp_path: Path) -> None:
    settings = files_config(tmp_path)
    fingerprint = corpus.prepare(settings.data, settings.tokenizer).fingerprint
    other = save_tiny_model(
        tmp_path / "other", settings, num_leaked=7, seed=2, fingerprint=fingerprint
    )
    result = evaluate(config(model, baseline=str(other)))
    alone = evaluate(config(other, split=Split.test))
    assert result["baseline"]["chrf"] == pytest.approx(alone["chrf"])
    assert 0 < result["baseline"]["chrf_p_value"] <= 1
    assert str(other) in table(result)


def test_the_table_shows_scores_signatures_and_leaks(model: Path) -> None:
    result = evaluate(config(model))
    shown = table(result)
    for expected in (f"{result['bleu']:.2f}", f"{result['chrf']:.2f}", "tok:13a", "7 of them"):
        assert expected in shown


@pytest.mark.parametrize(
    ("source", "reference", "message"),
    [
        (b"a\nb\n", b"a\n", "2 lines"),
        (b"a\nb\xff\n", b"a\nb\n", "line 2: not UTF-8"),
        (b"", b"", "empty"),
        (b"a\n", None, "cannot read"),
    ],
)
def test_unusable_files(
    model: Path, tmp_path: Path, source: bytes, reference: bytes | None, message: str
) -> None:
    (tmp_path / "in.txt").write_bytes(source)
    if reference is not None:
        (tmp_path / "out.txt").write_bytes(reference)
    with pytest.raises(ValueError, match=message):
        evaluate(config(model, source="in.txt", reference="out.txt"))


def test_held_out_text_of_another_corpus_is_refused(model: Path, tmp_path: Path) -> None:
    with (tmp_path / "train.en").open("a") as file:
        file.write("one more\n")
    with (tmp_path / "train.de").open("a") as file:
        file.write("noch eins\n")
    with pytest.raises(ValueError, match="changed since the training"):
        evaluate(config(model))


def test_a_baseline_of_other_languages_is_refused(model: Path, tmp_path: Path) -> None:
    settings = files_config(tmp_path)
    settings.data.source_lang, settings.data.target_lang = "de", "en"
    other = save_tiny_model(tmp_path / "other", settings, num_leaked=0)
    with pytest.raises(ValueError, match="same languages"):
        evaluate(config(model, baseline=str(other)))


def test_the_model_searches_as_in_its_training_unless_told(model: Path) -> None:
    settings = config(model)
    settings.decode = DecodeOverrides(max_length=7)
    own = load_config(model / "config.yaml").decode
    assert evaluate(settings)["decode"] == {**dataclasses.asdict(own), "max_length": 7}


@pytest.mark.parametrize(
    ("language", "tokenizer"), [("zh_TW", "zh"), ("ja", "char"), ("de-AT", "13a")]
)
def test_words_are_counted_as_the_language_writes_them(language: str, tokenizer: str) -> None:
    result = score({"model": ["a b"]}, ["a b"], target_lang=language)
    assert f"tok:{tokenizer}|" in result["signatures"]["bleu"]


def test_one_file_is_not_enough(model: Path) -> None:
    with pytest.raises(ValueError, match="go together"):
        evaluate(config(model, source="in.txt"))


def test_a_corpus_that_is_gone(model: Path, tmp_path: Path) -> None:
    for file in tmp_path.glob("train.*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"eval\.source"):
        evaluate(config(model))


def test_no_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        evaluate(config(tmp_path / "nowhere"))
