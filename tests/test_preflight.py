"""What is tried before the first step: the hardest batches, and how large they may be."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from digits import digits_config, write_digits

from mt import budget, preflight
from mt.batching import PlannedBatch
from mt.checkpoint import load_tensors
from mt.config import AUTO, Config, Precision
from mt.corpus import Corpus, prepare
from mt.preflight import CPU_BATCH_TOKENS, hardest, largest_batch_tokens
from mt.runtime import Runtime
from mt.train import train
from mt.trainer import Trainer

GPU = Runtime(device=torch.device("cuda"), precision=Precision.bf16, num_threads=1)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    write_digits(tmp_path)
    monkeypatch.chdir(tmp_path)
    config = digits_config(tmp_path)
    config.train.max_steps = 2
    return config


def batch(num_sentences: int, source_length: int, target_length: int) -> PlannedBatch:
    return PlannedBatch(
        np.arange(num_sentences), source_length=source_length, target_length=target_length
    )


def test_the_hardest_are_the_longest_and_the_fullest() -> None:
    longest, fullest = batch(2, 60, 70), batch(20, 20, 24)
    planned = [batch(9, 20, 24), fullest, batch(1, 60, 70), longest, batch(30, 4, 6)]
    assert hardest(planned) == [longest, fullest]


@pytest.mark.parametrize("room", [32, 100, 777, 1500])
@pytest.mark.parametrize("num_gpus", [1, 4])
def test_the_largest_that_fits_is_found(
    config: Config, monkeypatch: pytest.MonkeyPatch, room: int, num_gpus: int
) -> None:
    """``room``: as much as one GPU has memory for."""
    monkeypatch.setattr(preflight, "MIN_STEPS_AN_EPOCH", 1)
    tried = []

    def fits(config: Config, corpus: Corpus, runtime: Runtime) -> bool:
        assert runtime.world_size == 1
        tried.append(config.train.batch_tokens)
        return config.train.batch_tokens <= room

    monkeypatch.setattr(preflight, "_fits", fits)
    runtime = dataclasses.replace(GPU, world_size=num_gpus)
    found = largest_batch_tokens(config, prepare(config.data, config.tokenizer), runtime)
    assert found <= max(room * num_gpus, config.train.max_length)
    assert found >= 0.9 * room * num_gpus
    assert len(tried) < 20


def test_an_epoch_keeps_some_steps(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "_fits", lambda *_: True)
    corpus = prepare(config.data, config.tokenizer)
    config.train.batch_tokens = largest_batch_tokens(config, corpus, GPU)
    num_pieces = sum(len(ids) + 1 for ids in corpus.train["target_ids"])
    assert num_pieces / config.train.batch_tokens >= preflight.MIN_STEPS_AN_EPOCH


def test_auto_is_settled_once(config: Config) -> None:
    config.train.batch_tokens = AUTO
    run = train(config)
    assert json.loads((run / "resolved.json").read_text())["batch_tokens"] == CPU_BATCH_TOKENS
    assert train(config) == run


def test_what_does_not_fit_is_known_before_the_first_step(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = prepare(config.data, config.tokenizer)
    original = Trainer._losses

    def losses(self: Trainer, batch: object) -> object:
        if batch.source.size(1) >= longest:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, batch)

    longest = int(max(len(ids) for ids in corpus.train["source_ids"])) + 1
    monkeypatch.setattr(Trainer, "_losses", losses)
    with pytest.raises(ValueError, match="out of memory.*batch_tokens"):
        train(config)
    (run,) = Path(config.train.runs_dir).iterdir()
    assert not (run / "checkpoints").exists() and not (run / "resolved.json").exists()


def test_the_rehearsal_leaves_the_training_alone(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.train.run_name = "with"
    with_rehearsal = train(config)
    monkeypatch.setattr(budget, "rehearse", lambda trial: None)
    config.train.run_name = "without"
    without = train(config)
    one, other = (
        load_tensors(run / "last" / "model.safetensors") for run in (with_rehearsal, without)
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
