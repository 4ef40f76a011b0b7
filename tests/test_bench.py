"""The benchmarks: the work that they count is the work that is done. How fast is not tested."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import SOURCES, files_config, save_tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import results
from benchmarks.decode import OurDecoding, measure_decoding, measure_model, random_sources
from benchmarks.machine import median_ratio
from benchmarks.subject import compose_subject
from benchmarks.train import measure_training, training_flops
from mt.config import (
    Activation,
    Config,
    Device,
    ModelConfig,
    Optimizer,
    Precision,
    TokenizerConfig,
)
from mt.corpus import prepare
from mt.loss import cross_entropy
from mt.model import Transformer
from mt.runtime import Runtime
from mt.tokenizer import EOS, PAD

VOCAB = 40


def shape(**settings: object) -> ModelConfig:
    model = ModelConfig(
        name="test", dim=8, ffn_dim=20, num_heads=2, encoder_layers=2, decoder_layers=3
    )
    for name, value in settings.items():
        setattr(model, name, value)
    return model


@pytest.mark.parametrize("activation", Activation)
def test_the_counted_flops_are_those_of_a_training_step(activation: Activation) -> None:
    config = shape(activation=activation, length_head=False, dropout=0.0)
    model = Transformer(config, vocab_size=VOCAB)
    num_sentences, source_length, target_length = 3, 7, 5
    source = torch.randint(4, VOCAB, (num_sentences, source_length))
    target = torch.randint(4, VOCAB, (num_sentences, target_length))
    mask = torch.ones_like(source, dtype=torch.bool)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        cross_entropy(model(source, target, mask), target, ignore=PAD).backward()
    counted = training_flops(
        config,
        vocab_size=VOCAB,
        source_lengths=np.full(num_sentences, source_length),
        target_lengths=np.full(num_sentences, target_length),
    )
    assert counted == counter.get_total_flops()


@pytest.mark.parametrize("beam_size", [1, 3])
@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16])
def test_the_decoded_work_is_fixed(beam_size: int, precision: Precision) -> None:
    runtime = Runtime(device=torch.device("cpu"), precision=precision, num_threads=1)
    decoding = OurDecoding(shape(), runtime, vocab_size=VOCAB)
    source = random_sources(4, length=6, vocab_size=VOCAB)
    assert source.shape == (4, 6)
    found = decoding.run(source, beam_size=beam_size, length=9)
    assert [len(best[0].ids) + 1 for best in found] == [9] * 4  # with EOS
    # And that not by chance: no piece is ever as unlikely as the end of sentence.
    with torch.inference_mode():
        logits = decoding.model(source, source, torch.ones_like(source, dtype=torch.bool))
    assert (logits[..., EOS] < logits[..., EOS + 1 :].min(-1).values - 100).all()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements as short as they can be."""
    monkeypatch.setattr("benchmarks.machine.SIZE", 16)
    monkeypatch.setattr("benchmarks.decode.TRIAL", 0.0)


def test_training_is_measured_with_its_own_optimizer_and_with_muon(
    quick: None, tmp_path: Path
) -> None:
    config = files_config(tmp_path)
    config.train.device, config.train.precision = Device.cpu, Precision.fp32
    config.optim.algorithm = Optimizer.adamw
    corpus = prepare(config.data, config.tokenizer, root=tmp_path)
    row = measure_training(config, corpus, with_peer=False, num_rounds=2, seconds=0, warm_up=0)
    for side in ("ours", "muon"):
        assert len(row[side]["turns"]) == 2
        assert 0 <= row[side]["padding_share"] < 1
        rate = row[side]["tokens_per_second"] * row["flops_per_token"]
        assert row[side]["share_of_limit"] * row[side]["limit"] == pytest.approx(rate)
    assert "ratio" not in row
    assert row["subject"] in results.table({row["name"]: row})


def test_decoding_is_measured_in_the_faster_precision(quick: None) -> None:
    config = Config(model=shape(), tokenizer=TokenizerConfig(vocab_size=VOCAB))
    config.train.device, config.train.precision = Device.cpu, Precision.fp32
    row = measure_decoding(
        config,
        batch_size=2,
        beam_size=2,
        length=3,
        dtypes=["fp32", "bf16"],
        with_peer=False,
        num_rounds=2,
        seconds=0,
    )
    ours = row["ours"]
    assert ours["trials"][ours["choice"]] == min(ours["trials"].values())
    assert ours["num_calls"] == 2
    assert ours["tokens_per_second"] == pytest.approx(3 * ours["sentences_per_second"])
    assert row["subject"] in results.table({row["name"]: row})


def test_a_trained_model_is_measured_on_all_lines_of_a_text(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", files_config(tmp_path), num_leaked=0)
    text = tmp_path / "text.en"
    text.write_text("\n".join(SOURCES[:5]) + "\n", encoding="utf-8")
    row = measure_model(str(model), text, batch_size=2, beam_size=1, dtypes=["fp32"])
    ours = row["ours"]
    assert ours["num_calls"] == 3
    seconds = 5 / ours["sentences_per_second"]
    num_tokens = ours["tokens_per_second"] * seconds
    assert num_tokens == pytest.approx(round(num_tokens))
    assert num_tokens >= 5  # each line has an end
    assert row["subject"] in results.table({row["name"]: row})


def test_ratios_are_taken_pair_by_pair() -> None:
    # The machine is slow in the second pair and in the fourth; that says nothing about the sides.
    assert median_ratio([20, 2, 22, 1], [10, 1, 11, 1]) == 2


def test_a_row_takes_the_place_of_an_older_one_of_its_name(tmp_path: Path) -> None:
    path = tmp_path / "new" / "bench.json"
    for name, seconds in (("corpus a", 1.0), ("corpus b", 2.0), ("corpus a", 3.0)):
        results.store(path, {"kind": "corpus", "name": name, "seconds": seconds})
    rows = results.load(path)
    assert {name: row["seconds"] for name, row in rows.items()} == {"corpus a": 3, "corpus b": 2}
    assert all(row["machine"] and row["packages"] for row in rows.values())
    assert [file.name for file in path.parent.iterdir()] == ["bench.json"]
    assert results.load(tmp_path / "none.json") == {}


def test_the_table_shows_every_kind_of_row() -> None:
    part = {
        "precision": "bf16",
        "choice": "bf16 eager",
        "library": "transformers 5",
        "tokens_per_second": 5000.0,
        "sentences_per_second": 250.0,
        "seconds": 0.004,
        "padding_share": 0.05,
        "limit": 4e11,
        "share_of_limit": 0.5,
        "peak_memory": 10**9,
    }
    sides = {"ours": part, "muon": part, "peer": part, "ratio": 1.5}
    rows = {
        "a": {"kind": "train", "subject": "small", **sides},
        "b": {"kind": "decode", "subject": "base", "batch_size": 32, "beam_size": 5, **sides},
        "c": {"kind": "decode", "subject": "alone", "batch_size": 1, "beam_size": 5, "ours": part},
        "d": {"kind": "corpus", "name": "million", "seconds": 12.3456, "num_pairs": 1000},
    }
    for seed, bleu in ((1, 40.0), (2, 42.0)):
        rows[f"e{seed}"] = {
            "kind": "quality", "subject": "tok", "seed": seed, "bleu": bleu, "seconds": 99.0,
            "num_steps": 8000, "step_seconds": 0.01,
        }  # fmt: skip
    text = results.table(rows)
    tables = [part.splitlines() for part in text.split("\n\n")]
    # A head and a rule; ours, Muon and the peer; two of decoding; two seeds and their mean; one.
    assert [len(lines) for lines in tables] == [2 + 3, 2 + 2, 2 + 3, 2 + 1]
    for lines in tables:
        assert len({line.count("|") for line in lines}) == 1
    assert "| mean of 2 | 41.00 |" in text
    assert "seconds 12.35, num_pairs 1000" in text


def test_settings_change_the_usual_subject() -> None:
    usual = ["model=small", "tokenizer.vocab_size=8000"]
    config = compose_subject(usual, ["model=base", "optim.lr=1e-3"])
    assert (config.model.name, config.tokenizer.vocab_size) == ("base", 8000)
    assert config.data.name == "multi30k"
    assert compose_subject(usual, ["data=bible"]).data.train is None
    with pytest.raises(ValueError, match="small"):
        compose_subject(usual, ["model=smal"])
