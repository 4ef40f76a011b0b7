"""Several processes train as one would: the same steps, one end for all, one voice."""

import copy
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from digits import digits_config, write_digits
from torch import Tensor

from mt import ranks
from mt.batching import PlannedBatch
from mt.checkpoint import load_tensors, load_trainer_state
from mt.config import Config, Device, Precision, load_config, save_config
from mt.corpus import prepare
from mt.runtime import Runtime, resolve
from mt.train import train
from mt.trainer import Trainer, deal

ROOT = Path(__file__).resolve().parent.parent
CPU = Runtime(device=torch.device("cpu"), precision=Precision.fp32, num_threads=1)

# What each of the processes does.
STEPS = """
import json, math, sys
from pathlib import Path
import torch
from mt.config import load_config
from mt.ranks import add_up, agree, is_first, joined, largest, rank
sys.path.insert(0, sys.argv[2])
from test_ranks import few_steps
folder = Path(sys.argv[1])
with joined():
    found = [agree(lambda: ["first", rank()]), largest(10 + rank()), largest(10 - rank())]
    numbers = torch.tensor([1.0, rank()])
    add_up(numbers)
    results = {name: few_steps(load_config(folder / f"{name}.yaml")) for name in
               ("fp32", "bf16", "poisoned")}
    (folder / f"found-{rank()}.json").write_text(json.dumps([*found, numbers.tolist()]))
    torch.save(results, folder / f"results-{rank()}.pt")
"""
TRAIN = """
import os, sys
from command import user_errors
from mt.config import load_config
from mt.ranks import rank
from mt.train import train
from mt.trainer import Trainer

event, step = sys.argv[2], int(sys.argv[3])
original = Trainer.train_step

def train_step(self):
    if rank() == 1 and self.step == step - 1:
        if event == "error":
            raise ValueError("this process has run out of luck")
        os.kill(os.getpid(), int(event))
    return original(self)

Trainer.train_step = train_step
with user_errors():
    train(load_config(sys.argv[1]))
"""


def launch(program: str, *arguments: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a program in two processes."""
    file = folder / "program.py"
    file.write_text(program)
    return launched(file, *arguments, cwd=Path.cwd())


def launched(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    launcher = [ROOT / "scripts" / "launch.py", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [sys.executable, *launcher, *command],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'scripts'}"},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of digits, and what is prepared from them."""
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder)
    return folder


@pytest.fixture
def config(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.chdir(folder)  # the corpus is prepared below the working directory
    config = plain_config(folder)
    config.train.runs_dir = str(tmp_path / "runs")
    return config


def plain_config(folder: Path) -> Config:
    """A training in which nothing depends on who does what."""
    config = digits_config(folder)
    config.model.dropout = 0.0
    config.optim.eps = 1e-3  # else AdamW blows up what is rounded away from zero
    config.train.length_loss = 0.5
    return config


def trainer(config: Config, *, rank: int = 0, world_size: int = 1) -> Trainer:
    runtime = dataclasses.replace(CPU, rank=rank, world_size=world_size)
    corpus = prepare(config.data, config.tokenizer)
    return Trainer(config, corpus, runtime, max_steps=100)


def cut_small(model: Trainer) -> None:
    """Let the first batches be of one sentence, of two, of three."""
    first = model.planned[0]
    model.planned = [
        *(dataclasses.replace(first, indices=first.indices[:number]) for number in (1, 2, 3)),
        *model.planned,
    ]


def few_steps(config: Config) -> dict[str, Any]:
    """What some steps come to in this process; with train.max_skipped=1, one of them is spoilt."""
    runtime = resolve(device=Device.cpu, precision=config.train.precision, num_threads=1)
    corpus = prepare(config.data, config.tokenizer)
    model = Trainer(config, corpus, runtime, max_steps=100)
    cut_small(model)
    results = []
    for step in range(5):
        if config.train.max_skipped == 1 and step == 3 and runtime.rank == runtime.world_size - 1:
            original = model._losses
            model._losses = lambda batch, f=original: tuple(x * torch.nan for x in f(batch))
            results.append(model.train_step())
            model._losses = original
        else:
            results.append(model.train_step())
    names = ("loss", "length_loss", "gradient_norm", "num_tokens", "num_sentences", "skipped")
    names += ("num_positions", "num_padding")
    return {
        "steps": [{name: float(getattr(result, name)) for name in names} for result in results],
        "weights": {name: tensor.detach().clone() for name, tensor in model.weights().items()},
    }


# A batch among the processes


@pytest.mark.parametrize("number", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_every_row_counts_once(number: int, world_size: int) -> None:
    batch = PlannedBatch(np.arange(100, 100 + number), source_length=8, target_length=12)
    parts = [deal(batch, rank=rank, world_size=world_size) for rank in range(world_size)]
    counted = np.concatenate([part.indices for part, counts in parts if counts])
    assert sorted(counted) == batch.indices.tolist()
    sizes = [len(part.indices) for part, _ in parts]
    assert min(sizes) >= 1  # all take part
    assert max(sizes) - min(sizes) <= 1
    assert all((part.source_length, part.target_length) == (8, 12) for part, _ in parts)


def test_the_parts_are_the_whole(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the processes add up, seen without them."""
    monkeypatch.setattr("mt.trainer.shared", lambda module: module)
    monkeypatch.setattr("mt.trainer.add_up", lambda numbers: None)
    models = [trainer(config, rank=rank, world_size=3) for rank in range(3)]
    whole = trainer(copy.deepcopy(config))
    for model in (whole, *models):
        cut_small(model)
    for _ in range(2):  # one sentence, then two
        expected = whole.train_step()
        parts = [model.train_step() for model in models]
        assert sum(part.loss for part in parts) == pytest.approx(expected.loss, rel=1e-4)
        assert {part.num_tokens for part in parts} == {expected.num_tokens}
        assert parts[2].loss == parts[2].gradient_norm == 0
        for model in models:  # as if they had exchanged what they have
            model.restore(whole.state(), weights=whole.weights(), origin=None)
            cut_small(model)


def test_each_process_drops_something_else(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mt.trainer.shared", lambda module: module)
    seeds = []
    for rank in (0, 1):
        trainer(config, rank=rank, world_size=2)._seed_dropout()
        seeds.append(torch.initial_seed())
    trainer(config)._seed_dropout()
    assert seeds[0] == torch.initial_seed() != seeds[1]


# Two processes


@pytest.fixture(scope="module")
def both(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes found, and what one finds."""
    tmp_path = tmp_path_factory.mktemp("both")
    configs = {name: plain_config(folder) for name in ("fp32", "bf16", "poisoned")}
    configs["fp32"].train.accumulate = 2
    configs["bf16"].train.precision = Precision.bf16
    configs["poisoned"].train.max_skipped = 1
    before = Path.cwd()
    os.chdir(folder)
    try:
        prepare(configs["fp32"].data, configs["fp32"].tokenizer)
        for name, config in configs.items():
            save_config(config, tmp_path / f"{name}.yaml")
        result = launch(STEPS, tmp_path, ROOT / "tests", folder=tmp_path)
        assert result.returncode == 0, result.stderr
        alone = {name: few_steps(config) for name, config in configs.items()}
    finally:
        os.chdir(before)
    return {
        "found": [json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in (0, 1)],
        "processes": [torch.load(tmp_path / f"results-{rank}.pt") for rank in (0, 1)],
        "alone": alone,
    }


@pytest.mark.slow
def test_they_agree(both: dict[str, Any]) -> None:
    assert both["found"] == [[["first", 0], 11, 10, [2.0, 1.0]]] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tolerance"), [("fp32", 1e-4), ("poisoned", 1e-4), ("bf16", 3e-2)]
)
def test_two_processes_compute_what_one_does(
    both: dict[str, Any], name: str, tolerance: float
) -> None:
    expected = both["alone"][name]
    for process in both["processes"]:
        assert len(process[name]["steps"]) == len(expected["steps"])
        for step, alone in zip(process[name]["steps"], expected["steps"], strict=True):
            assert step == pytest.approx(alone, rel=tolerance, nan_ok=True)
        for key, tensor in expected["weights"].items():
            other = process[name]["weights"][key]
            torch.testing.assert_close(other, tensor, rtol=tolerance, atol=tolerance)
    first, second = (process[name]["weights"] for process in both["processes"])
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.slow
def test_what_one_process_cannot_count_no_process_counts(both: dict[str, Any]) -> None:
    for process in both["processes"]:
        steps = process["poisoned"]["steps"]
        assert [step["skipped"] for step in steps] == [0, 0, 0, 1, 0]


# A whole training


def nearly_equal(one: Path, other: Path) -> None:
    """Two runs came to the same, but for rounding."""

    def tensors(run: Path) -> dict[str, Tensor]:
        return load_tensors(run / "last" / "model.safetensors")

    expected = tensors(one)
    found = tensors(other)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)


def named(config: Config, name: str) -> Config:
    """The same training as another run."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, run_name=name))


@pytest.mark.slow
def test_the_number_of_processes_may_change(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process, then two until one of them gets a signal, then one until the end."""
    whole = train(named(config, "whole"))
    config = named(config, "mine")
    original = Trainer.train_step

    def stopped(self: Trainer) -> Any:
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stopped)
        with pytest.raises(SystemExit):
            train(config)
    save_config(config, tmp_path / "config.yaml")
    result = launch(TRAIN, tmp_path / "config.yaml", str(int(signal.SIGTERM)), "8", folder=tmp_path)
    assert result.returncode == 143, result.stderr
    assert result.stderr.count("going on from step 3") == 1
    assert result.stderr.count("stopped at step 8") == 1
    assert "Traceback" not in result.stderr
    run = tmp_path / "runs" / "mine"
    assert load_trainer_state(run / "last").values["step"] == 8
    assert train(config) == run
    nearly_equal(whole, run)
    assert load_config(run / "config.yaml") == config


@pytest.mark.slow
def test_when_one_process_is_killed_none_is_left(config: Config, tmp_path: Path) -> None:
    save_config(config, tmp_path / "config.yaml")
    start = time.monotonic()
    result = launch(TRAIN, tmp_path / "config.yaml", str(int(signal.SIGKILL)), "8", folder=tmp_path)
    assert time.monotonic() - start < 60
    assert result.returncode in (2, 128 + signal.SIGKILL)  # whichever is seen first
    assert "the same command goes on" in result.stderr
    assert "Traceback" not in result.stderr
    run = train(config)  # also: nobody holds the lock
    assert json.loads((run / "finished.json").read_text())["step"] == 12
    nearly_equal(train(named(config, "whole")), run)


@pytest.mark.slow
def test_an_error_of_one_process_is_told_once(config: Config, tmp_path: Path) -> None:
    save_config(config, tmp_path / "config.yaml")
    result = launch(TRAIN, tmp_path / "config.yaml", "error", "8", folder=tmp_path)
    assert result.returncode == 2
    assert result.stderr.count("error: ") == 1, result.stderr
    assert "error: this process has run out of luck" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["modle=tiny"], ["--multirun", "model=tiny,small"]])
def test_an_error_of_all_is_told_once(tmp_path: Path, arguments: list[str]) -> None:
    result = launched(ROOT / "scripts" / "train.py", *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert arguments[0] in result.stderr


# One process


def test_one_process_needs_nobody() -> None:
    with ranks.joined():
        assert ranks.is_first()
        assert (ranks.rank(), ranks.world_size()) == (0, 1)
        assert ranks.agree(lambda: "mine") == "mine"
        assert ranks.largest(7) == 7


# The machine


def test_processes_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(ranks, "on_this_machine", lambda: (1, 2))
    monkeypatch.setattr("mt.runtime._num_cores", lambda: 7)
    try:
        found = resolve(device=Device.cpu, precision=Precision.fp32, num_threads=None)
        assert found.num_threads == torch.get_num_threads() == 3
        found = resolve(device=Device.cpu, precision=Precision.fp32, num_threads=2)
        assert found.num_threads == 2
    finally:
        torch.set_num_threads(before)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(ranks, "on_this_machine", lambda: (1, 2))
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    with pytest.raises(ValueError, match="2 processes need a GPU each, and there are 1.*NPROC"):
        resolve(device=Device.auto, precision=Precision.bf16, num_threads=None)


def test_gpus_without_nccl_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    monkeypatch.setattr(ranks, "on_this_machine", lambda: (1, 2))
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    with pytest.raises(ValueError, match="NCCL"):
        resolve(device=Device.cuda, precision=Precision.bf16, num_threads=None)
