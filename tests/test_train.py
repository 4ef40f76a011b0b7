"""Training: the step, going on after any end, what is kept, and that it learns."""

import copy
import dataclasses
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from digits import digits_config, learning_config, write_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from mt import budget, checkpoint
from mt import train as training
from mt.batching import PlannedBatch
from mt.budget import DEFAULT_STEPS, count_steps, step_seconds
from mt.checkpoint import average_weights, load_model, load_tensors, load_trainer_state
from mt.compose import compose
from mt.config import Config, Device, FinalEval, Metric, Optimizer, Precision, Resume, save_config
from mt.corpus import prepare
from mt.monitor import Monitor, Progress, Validation
from mt.runtime import resolve
from mt.train import TrainingRun, train
from mt.trainer import StepResult, Trainer
from mt.translate import Translator

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA here")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of digits, and what is prepared from them."""
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder)
    return folder


@pytest.fixture
def config(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.chdir(folder)  # the corpus is prepared below the working directory
    config = digits_config(folder)
    config.train.runs_dir = str(tmp_path / "runs")
    return config


def named(config: Config, name: str) -> Config:
    """The same training as another run."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, run_name=name))


def trainer(config: Config, *, max_steps: int | None = 100) -> Trainer:
    settings = config.train
    runtime = resolve(device=settings.device, precision=settings.precision, num_threads=1)
    return Trainer(config, prepare(config.data, config.tokenizer), runtime, max_steps=max_steps)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def weights(path: Path) -> dict[str, Tensor]:
    return load_tensors(path / "model.safetensors")


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[Trainer], None]) -> None:
    """Do something at the beginning of a step, once."""
    original = Trainer.train_step
    done: list[int] = []

    def train_step(self: Trainer) -> StepResult:
        if self.step == step - 1 and not done:
            done.append(step)
            act(self)
        return original(self)

    monkeypatch.setattr(Trainer, "train_step", train_step)


def validates_as(monkeypatch: pytest.MonkeyPatch, scores: dict[int, float]) -> None:
    """Let the validation at each step find the score that is given for it."""

    def validate(self: TrainingRun, monitor: Monitor) -> Validation:
        score = scores[self.trainer.step]
        return Validation(
            step=self.trainer.step,
            loss=100 - score,
            bleu=score,
            chrf=score,
            num_leaked=0,
            seconds=0,
        )

    monkeypatch.setattr(TrainingRun, "_validate", validate)


# The step


def test_many_small_batches_are_one_big_batch(config: Config) -> None:
    config.model.dropout = 0.0
    config.train.length_loss = 0.5
    config.optim.eps = 1.0  # so that an update is in proportion to its gradient
    config.optim.lr = 1.0
    big = trainer(copy.deepcopy(config))
    lengths = big.targets.lengths
    # Of very different sizes, so that a mean of means would be wrong.
    parts = [
        np.flatnonzero(lengths <= 5)[:3],
        np.flatnonzero(lengths >= 9)[:20],
        np.flatnonzero(lengths == 7)[:9],
    ]
    big.planned = [PlannedBatch(np.concatenate(parts), source_length=24, target_length=24)]
    config.train.accumulate = 3
    small = trainer(config)
    small.planned = [PlannedBatch(part, source_length=12, target_length=16) for part in parts]

    before = copy.deepcopy(big.weights())
    results = [big.train_step(), small.train_step()]
    for name in ("loss", "length_loss", "gradient_norm", "num_tokens", "num_sentences"):
        one, other = (float(getattr(result, name)) for result in results)
        assert one == pytest.approx(other, rel=1e-4)
    assert len(results[1].batches) == 3
    for name, tensor in big.weights().items():
        torch.testing.assert_close(small.weights()[name], tensor, rtol=1e-3, atol=1e-6)
        assert not torch.equal(tensor, before[name]), name


def test_a_step_counts_what_it_holds(config: Config) -> None:
    config.train.accumulate = 2
    model = trainer(config)
    result = model.train_step()
    indices = np.concatenate([batch.indices for batch in result.batches])
    pieces = int((model.targets.lengths[indices] + 1).sum())
    real = pieces + int((model.sources.lengths[indices] + 1).sum())
    padded = sum(
        len(batch.indices) * (batch.source_length + batch.target_length) for batch in result.batches
    )
    assert result.num_sentences == len(indices)
    assert result.num_tokens == pieces
    assert result.num_positions == padded
    assert result.num_padding == padded - real
    assert result.learning_rate == pytest.approx(config.optim.lr / 3)  # of three warm-up steps
    assert not result.skipped


def test_an_epoch_is_followed_by_another(config: Config) -> None:
    model = trainer(config)
    model.planned = model.planned[-2:]
    model.position = 1
    model.train_step()
    assert model.epochs == 1
    second = model.order.epoch(1)
    result = model.train_step()
    assert result.batches[0].indices.tolist() == second[0].indices.tolist()
    assert model.epochs == pytest.approx(1 + 1 / len(second))


def test_gradients_are_clipped(config: Config) -> None:
    config.optim.eps = 1.0
    config.optim.lr = 1.0
    config.optim.warmup_steps = 0
    moved = []
    for clip_norm in (None, 1e-3):
        config.optim.clip_norm = clip_norm
        model = trainer(config)
        before = copy.deepcopy(model.weights())
        result = model.train_step()
        assert result.gradient_norm > 0.01  # it is told before the clipping
        moved.append(
            sum(
                (t.detach() - before[name]).square().sum().item()
                for name, t in model.weights().items()
            )
        )
    # An update is about g / (1 + |g|).
    assert moved[1] ** 0.5 == pytest.approx(1e-3, rel=0.05)
    assert moved[0] > 10 * moved[1]


def test_the_average_is_exponential(config: Config) -> None:
    config.train.ema_decay = 0.5
    model = trainer(config)
    expected = copy.deepcopy(dict(model.model.named_parameters()))
    for step in range(20):
        model.train_step()
        decay = min(0.5, (1 + step) / (10 + step))
        for name, parameter in model.model.named_parameters():
            expected[name] = decay * expected[name].detach() + (1 - decay) * parameter.detach()
    used = dict(model.model_to_use().named_parameters())
    for name, tensor in model.weights().items():
        torch.testing.assert_close(tensor, expected[name])
        assert torch.equal(used[name], tensor)
        assert not torch.equal(tensor, dict(model.model.named_parameters())[name])


def test_bf16_keeps_fp32_weights_and_learns(config: Config) -> None:
    config.train.precision = Precision.bf16
    config.train.batch_tokens = 512
    model = trainer(config, max_steps=200)
    losses = []
    for _ in range(60):
        result = model.train_step()
        losses.append(float(result.loss) / result.num_tokens)
    assert losses[-1] < 0.7 * losses[0]
    assert all(tensor.dtype == torch.float32 for tensor in model.weights().values())
    for own, worker in zip(model.parameters, model.working.parameters(), strict=True):
        assert worker.dtype == torch.bfloat16
        assert torch.equal(own.bfloat16(), worker)
        assert worker.grad is None


def test_bf16_steps_are_nearly_fp32_steps(config: Config) -> None:
    config.model.dropout = 0.0
    results = []
    for precision in (Precision.fp32, Precision.bf16):
        config.train.precision = precision
        config.train.accumulate = 2
        results.append(trainer(config).train_step())
    exact, rounded = results
    assert float(rounded.loss) == pytest.approx(float(exact.loss), rel=0.01)
    assert rounded.gradient_norm == pytest.approx(exact.gradient_norm, rel=0.05)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler here")
def test_compiled_it_is_the_same(config: Config) -> None:
    """Losses and weights, over batches of several shapes, with one compilation for all."""
    torch._dynamo.reset()
    config.model.dropout = 0.0
    config.optim.eps = 1.0  # so that an update is in proportion to its gradient
    config.optim.lr = 1.0
    config.train.compile = False
    plain = trainer(config)
    config.train.compile = True
    compiled = trainer(config)
    shapes = set()
    for _ in range(6):
        results = [plain.train_step(), compiled.train_step()]
        shapes |= {(len(b.indices), b.source_length, b.target_length) for b in results[1].batches}
        for name in ("loss", "length_loss", "gradient_norm"):
            one, other = (getattr(result, name) for result in results)
            assert one == pytest.approx(other, rel=1e-4)
    assert len(shapes) >= 3
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    for name, tensor in plain.weights().items():
        torch.testing.assert_close(compiled.weights()[name], tensor, rtol=1e-3, atol=1e-4)


def test_the_seed_decides(config: Config) -> None:
    first, second = trainer(config), trainer(config)
    assert equal(first.weights(), second.weights())
    config.train.seed = 2
    assert not equal(first.weights(), trainer(config).weights())


# Going on


CHILD = """
import os, signal, sys
from mt import checkpoint, train as training
from mt.config import load_config
from mt.trainer import Trainer

where, step = sys.argv[2], int(sys.argv[3])

def killing(place, function, is_now):
    def replaced(*arguments, **options):
        if where == place and is_now(*arguments):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return replaced

name = f"step-{step:08d}"
Trainer.train_step = killing("step", Trainer.train_step, lambda self: self.step == step - 1)
checkpoint.save_config = killing("save", checkpoint.save_config, lambda c, path: name in str(path))
training.point = killing("link", training.point, lambda link, path: path.name == name)
training.train(load_config(sys.argv[1]))
"""


def kill(config: Config, tmp_path: Path, place: str) -> None:
    """Start a training in a process of its own that is killed at a place such as "step 8"."""
    file = tmp_path / "killed.yaml"
    save_config(config, file)
    result = subprocess.run(
        [sys.executable, "-c", CHILD, str(file), *place.split()],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == -signal.SIGKILL, result.stderr


def assert_same_run(one: Path, other: Path) -> None:
    """Two runs came to the same, bit for bit."""
    assert checkpoints(one) == checkpoints(other)
    for name in checkpoints(one):
        assert equal(weights(one / "checkpoints" / name), weights(other / "checkpoints" / name))
    for link in ("best", "last"):
        assert (one / link).resolve().name == (other / link).resolve().name
    states = [load_trainer_state(run / "last") for run in (one, other)]
    assert equal(states[0].tensors, states[1].tensors)
    values = [{**state.values, "seconds": None} for state in states]
    assert values[0] == values[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ema_decay", "places"),
    [(None, ["step 3", "step 9"]), (0.9, ["save 5", "link 10"])],
)
def test_killed_and_started_again_it_is_the_same(
    config: Config, tmp_path: Path, ema_decay: float | None, places: list[str]
) -> None:
    config.train.ema_decay = ema_decay
    config.train.accumulate = 2
    config.model.attention_dropout = 0.1
    whole = train(named(config, "whole"))
    for place in places:
        kill(named(config, "killed"), tmp_path, place)
        assert not (tmp_path / "runs" / "killed" / "finished.json").exists()
    assert_same_run(train(named(config, "killed")), whole)


class Killed(BaseException):
    """A process that ends here, as far as files can tell."""


@pytest.mark.parametrize(
    ("changes", "places"),
    [
        ({"precision": Precision.bf16, "average": 2}, ["step 8", "link 10", "step 13"]),
        (  # less than 14 steps an epoch
            {"ema_decay": 0.9, "max_length": 8, "batch_tokens": 2048, "valid_sentences": 0},
            ["step 2", "save 10", "step 12"],
        ),
        ({"average": 3, "keep": 3, "patience": 1000}, ["save 5", "link 5", "step 12"]),
    ],
)
@pytest.mark.parametrize("algorithm", list(Optimizer))
def test_cut_off_anywhere_it_is_the_same(
    config: Config,
    monkeypatch: pytest.MonkeyPatch,
    algorithm: Optimizer,
    changes: dict[str, Any],
    places: list[str],
) -> None:
    config.optim.algorithm = algorithm
    config.train = dataclasses.replace(
        config.train, **{"max_steps": 14, "metric": Metric.loss, **changes}
    )
    whole = train(named(config, "whole"))
    for place in places:
        cut_off(monkeypatch, named(config, "cut"), place)
    cut = train(named(config, "cut"))
    if "average" in changes:
        assert "averaged" in checkpoints(cut)
    assert_same_run(cut, whole)


def cut_off(monkeypatch: pytest.MonkeyPatch, config: Config, place: str) -> None:
    kind, step = place.split()
    target = f"step-{int(step):08d}"

    def die(model: Trainer) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        if kind == "step":
            at_step(patch, int(step), die)
        else:
            module, name, position = {
                "save": (checkpoint, "save_config", 1),
                "link": (training, "point", 1),
            }[kind]
            original = getattr(module, name)

            def dying(*arguments: Any) -> None:
                if target in str(arguments[position]):
                    raise Killed
                original(*arguments)

            patch.setattr(module, name, dying)
        with pytest.raises(Killed):
            train(config)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_saves_and_goes_on(
    config: Config, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    config.train.average = 2
    whole = train(named(config, "whole"))
    handlers = [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)]
    stopped = named(config, "stopped")
    with monkeypatch.context() as patch:
        at_step(patch, 8, lambda model: os.kill(os.getpid(), number))
        with pytest.raises(SystemExit) as ending:
            train(stopped)
    assert ending.value.code == code
    assert [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)] == handlers
    run = Path(config.train.runs_dir) / "stopped"
    assert (run / "last").resolve().name == "step-00000008"  # the step was finished
    assert not (run / "finished.json").exists()
    steps: list[int] = []
    original = Trainer.train_step

    def note(self: Trainer) -> StepResult:
        steps.append(self.step + 1)
        return original(self)

    monkeypatch.setattr(Trainer, "train_step", note)
    assert_same_run(train(stopped), whole)
    assert steps == [9, 10, 11, 12]


def test_a_signal_after_the_look_waits_for_the_next_step(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = TrainingRun._is_planned

    def late(self: TrainingRun, step: int) -> bool:
        if step == self.trainer.step == 8:  # it has been decided that step 8 is not saved
            os.kill(os.getpid(), signal.SIGTERM)
        return planned(self, step)

    monkeypatch.setattr(TrainingRun, "_is_planned", late)
    with pytest.raises(SystemExit):
        train(named(config, "mine"))
    last = Path(config.train.runs_dir) / "mine" / "last"
    assert load_trainer_state(last).values["step"] == 9


def test_a_second_signal_stops_at_once(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(model: Trainer) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)

    at_step(monkeypatch, 8, twice)
    with pytest.raises(KeyboardInterrupt):
        train(named(config, "mine"))
    last = Path(config.train.runs_dir) / "mine" / "last"
    assert last.resolve().name == "step-00000005"


@pytest.mark.slow
def test_the_command_leaves_with_the_signals_code(config: Config, folder: Path) -> None:
    overrides = [
        "data=files",
        "data.name=digits",
        "data.source_lang=src",
        "data.target_lang=tgt",
        *[f"data.{split}={folder / split}" for split in ("train", "valid", "test")],
        "tokenizer.vocab_size=300",
        "model.dim=16",
        "model.ffn_dim=32",
        "train.max_steps=100000",
        "train.validate_every=100000",
        "train.device=cpu",
        "train.precision=fp32",
        "train.num_threads=1",
        f"train.runs_dir={config.train.runs_dir}",
        "train.run_name=mine",
    ]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "train.py"), *overrides],
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:  # a training step shows its line
            lines.append(line)
            if line.startswith("step "):
                process.terminate()
                break
        rest = process.stderr.read()
        assert process.wait(timeout=60) == 143, "".join(lines) + rest
    finally:
        process.kill()
        process.wait()
    assert "the same command goes on" in rest
    assert "Traceback" not in rest
    assert load_trainer_state(Path(config.train.runs_dir) / "mine" / "last").values["step"] > 0


def test_a_finished_run_says_so(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train(config)
    log = (run / "train.log").read_text()
    assert "finished already" not in log
    before = weights(run / "last")
    at_step(monkeypatch, 13, lambda model: pytest.fail("it goes on"))
    assert train(config) == run
    assert "finished already" in (run / "train.log").read_text()[len(log) :]
    assert equal(weights(run / "last"), before)
    monkeypatch.undo()
    monkeypatch.chdir(Path(config.data.train).parent)
    config.train.resume = Resume.never
    another = train(config)
    assert another.name == f"{run.name}-2"
    assert equal(weights(another / "last"), before)


def test_other_settings_are_refused(config: Config) -> None:
    train(named(config, "mine"))
    config.optim.lr *= 2
    with pytest.raises(ValueError, match="optim.lr"):
        train(named(config, "mine"))


def test_other_text_is_refused(
    config: Config, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in folder.glob("*.???"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for split in ("train", "valid", "test"):
        setattr(config.data, split, str(tmp_path / split))
    at_step(monkeypatch, 8, lambda model: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        train(config)
    for side in ("src", "tgt"):
        with (tmp_path / f"train.{side}").open("a") as file:
            file.write("1 2 3\n" if side == "src" else "3 2 1\n")
    with pytest.raises(ValueError, match="other training text.*train.resume=never"):
        train(config)


def test_a_damaged_checkpoint_is_named(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    at_step(monkeypatch, 8, lambda model: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        train(named(config, "mine"))
    state = Path(config.train.runs_dir) / "mine" / "last" / "trainer" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(ValueError, match="state.safetensors is damaged"):
        train(named(config, "mine"))


# Steps that go wrong


def poisoned(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Make the losses of some steps not a number."""
    original = Trainer._losses

    def losses(self: Trainer, batch: Any) -> tuple[Tensor, Tensor]:
        loss, ratio_loss = original(self, batch)
        return (loss * math.nan if self.step + 1 in steps else loss), ratio_loss

    monkeypatch.setattr(Trainer, "_losses", losses)


@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16])
def test_a_step_that_is_not_finite_changes_nothing(
    config: Config, monkeypatch: pytest.MonkeyPatch, precision: Precision
) -> None:
    config.train.precision = precision
    config.train.ema_decay = 0.9
    poisoned(monkeypatch, {2})
    model = trainer(config)
    model.train_step()
    before = copy.deepcopy(model.state())
    average = copy.deepcopy(model.weights())
    result = model.train_step()
    assert result.skipped
    assert model.step == 2
    after = model.state().tensors
    for name, tensor in before.tensors.items():
        assert torch.equal(after[name], tensor), name
    assert equal(model.weights(), average)
    assert not model.train_step().skipped
    assert all(tensor.isfinite().all() for tensor in model.weights().values())


def test_a_step_that_is_not_finite_is_written_down(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, {4, 5, 7, 8})
    config.train.max_skipped = 3
    run = train(config)
    names = sorted(file.name for file in run.glob("nonfinite-*.json"))
    assert names == [f"nonfinite-{step:08d}.json" for step in (4, 5, 7, 8)]
    note = json.loads((run / names[0]).read_text(encoding="utf-8"))
    assert note["step"] == 4
    assert note["loss"] == "nan"
    corpus = prepare(config.data, config.tokenizer)
    planned = trainer(config).planned[3]
    assert [sentence["number"] for sentence in note["sentences"]] == planned.indices.tolist()
    for sentence in note["sentences"]:
        row = corpus.train[sentence["number"]]
        assert (sentence["source"], sentence["target"]) == (row["source"], row["target"])
    assert note["weight_norms"].keys() == weights(run / "last").keys()
    assert json.loads((run / "finished.json").read_text())["step"] == 12
    assert all(tensor.isfinite().all() for tensor in weights(run / "last").values())


def test_steps_looked_at_later_are_the_same_steps(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, which the host does not wait for."""
    poisoned(monkeypatch, {4, 5, 7, 12})
    at_once = train(named(config, "at-once"))
    complete = TrainingRun.complete

    def ahead(self: TrainingRun) -> None:
        self.steps_ahead = 3
        complete(self)

    monkeypatch.setattr(TrainingRun, "complete", ahead)
    later = train(named(config, "later"))
    assert equal(weights(at_once / "last"), weights(later / "last"))
    notes = [
        {file.name: file.read_text(encoding="utf-8") for file in run.glob("nonfinite-*.json")}
        for run in (at_once, later)
    ]
    assert notes[0].keys() == notes[1].keys() and len(notes[0]) == 4
    for name in notes[0]:
        early, late = (json.loads(note[name]) for note in notes)
        assert early["sentences"] == late["sentences"]


def test_it_gives_up_after_a_few_in_a_row(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the run was cut off between them."""
    config.train.max_skipped = 3
    config.train.save_every = 8
    poisoned(monkeypatch, {2, 3, 7, 8, 9, 10})
    cut_off(monkeypatch, config, "step 9")
    with pytest.raises(ValueError, match="3 non-finite steps in a row.*optim.lr"):
        train(config)
    run = Path(config.train.runs_dir) / "last"
    assert (run / "nonfinite-00000009.json").exists()
    assert not (run / "nonfinite-00000010.json").exists()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_out_of_memory_says_what_helps(
    config: Config, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def losses(self: Trainer, batch: Any) -> tuple[Tensor, Tensor]:
        raise error

    monkeypatch.setattr(Trainer, "_losses", losses)
    model = trainer(config)
    planned = model.planned[0]
    words = f"{len(planned.indices)} sentences.*length {planned.target_length}.*batch_tokens"
    with pytest.raises(ValueError, match=words):
        model.train_step()


# How long


def test_early_stopping(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    config.train.max_steps = 60
    config.train.patience = 2
    validates_as(monkeypatch, {5: 10, 10: 30, 15: 20, 20: 30, 25: 90})
    run = train(config)
    assert json.loads((run / "finished.json").read_text())["step"] == 20
    assert (run / "best").resolve().name == "step-00000010"
    assert "stopped early" in (run / "train.log").read_text()


def test_patience_outlives_the_process(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    config.train.max_steps = 60
    config.train.patience = 2
    config.train.metric = Metric.loss
    validates_as(monkeypatch, {5: 10, 10: 30, 15: 20, 20: 25, 25: 90})
    for step in (12, 17):
        with monkeypatch.context() as patch:
            at_step(patch, step, lambda model: os.kill(os.getpid(), signal.SIGTERM))
            with pytest.raises(SystemExit):
                train(config)
    run = train(config)
    assert json.loads((run / "finished.json").read_text())["step"] == 20
    assert (run / "best").resolve().name == "step-00000010"


def test_minutes_become_steps_that_are_kept(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(named(config, "steps"))
    config.train.max_steps = None
    config.train.max_minutes = 0.1
    measured: list[float] = [0.45, 1000.0]

    def seconds(trial: Trainer) -> float:
        trial.train_step()  # what the trial does must not show in the run
        return measured.pop(0)

    monkeypatch.setattr(budget, "step_seconds", seconds)
    cut_off(monkeypatch, named(config, "minutes"), "step 8")
    resolved = Path(config.train.runs_dir) / "minutes" / "resolved.json"
    assert json.loads(resolved.read_text())["max_steps"] == 12  # 6 s, less the validations
    run = train(named(config, "minutes"))
    assert measured == [1000.0]
    assert equal(weights(run / "last"), weights(whole / "last"))
    assert "allows 12 steps" in (run / "train.log").read_text()


def test_steps_are_measured(config: Config) -> None:
    trial = trainer(config, max_steps=None)
    start = time.perf_counter()
    seconds = step_seconds(trial, warm_up=0.01, measured=0.01)
    assert trial.step >= 6
    assert 0 < seconds <= (time.perf_counter() - start) / 5


def test_epochs_become_steps(config: Config) -> None:
    config.train.max_steps = None
    config.train.max_epochs = 0.1
    config.train.accumulate = 2
    steps = math.ceil(0.1 * len(trainer(config).planned) / 2)
    run = train(config)
    assert json.loads((run / "finished.json").read_text())["step"] == steps
    info = json.loads((run / "last" / "info.json").read_text())
    assert info["epochs"] == pytest.approx(0.1, abs=0.02)


def test_the_first_limit_counts(config: Config) -> None:
    config.train.max_epochs = 100
    config.train.max_steps = 6
    assert json.loads((train(config) / "finished.json").read_text())["step"] == 6


def test_auto_is_resolved_once(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    config.train.device = Device.auto
    config.train.precision = Precision.auto
    config.train.num_threads = None
    config = named(config, "mine")
    cut_off(monkeypatch, config, "step 3")
    resolved = Path(config.train.runs_dir) / "mine" / "resolved.json"
    found = json.loads(resolved.read_text())
    assert "auto" not in found.values()
    assert None not in found.values()
    if not torch.cuda.is_available():  # what another machine would choose does not matter now
        other = {Precision.bf16: Precision.fp32, Precision.fp32: Precision.bf16}
        found["precision"] = other[Precision(found["precision"])].value
        resolved.write_text(json.dumps(found))
        run = train(config)
        assert found["precision"] in json.loads((run / "last" / "info.json").read_text())["device"]


def test_steps_without_a_budget(config: Config) -> None:
    config.train.max_steps = None
    corpus = prepare(config.data, config.tokenizer)
    runtime = resolve(device=Device.cpu, precision=Precision.fp32, num_threads=1)
    assert count_steps(config, corpus, runtime) == DEFAULT_STEPS


def test_the_newest_run_is_one_that_can_be_used(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its first checkpoint, a run does not take the place of the one before it."""
    newest = Path(config.train.runs_dir) / "last"
    train(named(config, "one"))
    cut_off(monkeypatch, named(config, "two"), "step 3")
    assert newest.resolve().name == "one"
    cut_off(monkeypatch, named(config, "two"), "step 8")
    assert newest.resolve().name == "two"
    assert not os.path.isabs(os.readlink(newest))


# What is kept


@pytest.mark.parametrize("relative", [True, False])
def test_best_last_and_a_few_are_kept(
    config: Config, folder: Path, monkeypatch: pytest.MonkeyPatch, relative: bool
) -> None:
    if relative:
        config.train.runs_dir = "some-runs"
    config.train.save_every = 2
    config.train.validate_every = 4
    config.train.max_steps = 14
    config.train.keep = 2
    validates_as(monkeypatch, {4: 50, 8: 20, 12: 30, 14: 10})
    run = train(config)
    assert checkpoints(run) == ["step-00000004", "step-00000012", "step-00000014"]
    assert (run / "best").resolve().name == "step-00000004"
    assert (run / "last").resolve().name == "step-00000014"
    for name in checkpoints(run):
        path = run / "checkpoints" / name
        assert (path / "trainer").exists() == (name == "step-00000014")
        info = load_model(path, device=torch.device("cpu")).info
        assert info["step"] == int(name.removeprefix("step-"))
        assert info["valid_bleu"] == {4: 50, 12: 30, 14: 10}[info["step"]]


def test_a_checkpoint_that_nobody_points_to_harms_nobody(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before the new checkpoint was linked, stopped before it was made again."""
    config.train.keep = 1
    cut_off(monkeypatch, config, "link 10")
    with monkeypatch.context() as patch:
        at_step(patch, 7, lambda model: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            train(config)
    run = train(config)
    assert json.loads((run / "finished.json").read_text())["step"] == 12


def test_what_a_checkpoint_knows(config: Config) -> None:
    run = train(config)
    info = json.loads((run / "last" / "info.json").read_text())
    corpus = prepare(config.data, config.tokenizer)
    assert info["num_leaked"] == corpus.num_leaked
    assert info["corpus_fingerprint"] == corpus.fingerprint
    assert Path(info["corpus"]).is_dir()
    assert (info["source_lang"], info["target_lang"]) == ("src", "tgt")
    assert {"valid_loss", "valid_bleu", "valid_chrf", "git_revision", "packages", "machine"} <= set(
        info
    )
    assert info["valid_loss"] > 0
    loaded = load_model(run / "best", device=torch.device("cpu"))
    assert loaded.config == config
    assert len(Translator.load(run, device=Device.cpu).translate(["1 2 3", ""])) == 2


def test_the_average_of_the_last_checkpoints(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.train.average = 2
    validates_as(monkeypatch, {5: 1, 10: 2, 12: 3})
    run = train(config)
    paths = [run / "checkpoints" / name for name in ("step-00000010", "step-00000012")]
    averaged = weights(run / "checkpoints" / "averaged")
    assert equal(averaged, average_weights(paths))
    assert not equal(averaged, weights(run / "last"))
    assert (run / "best").resolve().name == "step-00000012"  # it was no better
    assert (run / "last").resolve().name == "step-00000012"


def test_the_average_can_be_the_best(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    config.train.average = 2
    scores = iter([1.0, 2.0, 3.0, 4.0])
    original: dict[int, float] = {}
    validates_as(monkeypatch, original)
    validate = TrainingRun._validate

    def rising(self: TrainingRun, monitor: Monitor) -> Validation:
        original[self.trainer.step] = next(scores)
        return validate(self, monitor)

    monkeypatch.setattr(TrainingRun, "_validate", rising)
    run = train(config)
    assert (run / "best").resolve().name == "averaged"
    assert (run / "last").resolve().name == "step-00000012"
    assert Translator.load(run, device=Device.cpu).translate(["1 2"])


def test_the_exponential_average_is_what_is_used(config: Config) -> None:
    config.train.ema_decay = 0.9
    run = train(config)
    state = load_trainer_state(run / "last").tensors
    raw = {
        name.removeprefix("weights."): tensor
        for name, tensor in state.items()
        if name.startswith("weights.")
    }
    assert raw.keys() == weights(run / "last").keys()
    assert not equal(raw, weights(run / "last"))


# What a person sees


def test_tensorboard(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a killed process had written more than its last checkpoint holds."""
    progress = Monitor.progress

    def flushed(self: Monitor, now: Progress) -> None:
        progress(self, now)
        self.board.flush()

    monkeypatch.setattr(Monitor, "progress", flushed)
    cut_off(monkeypatch, config, "step 8")
    run = train(config)
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    tags = board.Tags()
    for name in ("loss", "gradient_norm", "learning_rate", "tokens_per_second", "padding_share"):
        events = board.Scalars(f"train/{name}")
        assert [event.step for event in events] == list(range(1, 13))  # each once
        assert all(math.isfinite(event.value) for event in events)
    assert board.Scalars("train/learning_rate")[2].value == pytest.approx(config.optim.lr)
    assert all(0 < event.value < 0.5 for event in board.Scalars("train/padding_share"))
    for name in ("loss", "bleu", "chrf"):
        assert [event.step for event in board.Scalars(f"valid/{name}")] == [5, 10, 12]
    assert tags["images"] == ["valid/cross_attention"]
    (text,) = (event for event in board.Tensors("valid/samples/text_summary") if event.step == 12)
    source = prepare(config.data, config.tokenizer).valid[0]["source"]
    assert source in text.tensor_proto.string_val[0].decode()


def test_the_log(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(config)
    log = (run / "train.log").read_text()
    shown = capsys.readouterr().err
    for text in (log, shown):
        assert "device cpu" in text
        assert "validation at step 10: loss" in text
        assert "step 12 of 12" in text
        assert "scripts/translate.py -m" in text


def test_validation_leaves_the_training_alone(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How often it is validated and saved changes nothing but what is kept."""
    often = named(config, "often")
    often.train.validate_every = often.train.save_every = 1
    runs = [train(often), train(named(config, "seldom"))]
    assert equal(weights(runs[0] / "last"), weights(runs[1] / "last"))


def test_without_translated_samples(config: Config) -> None:
    config.train.valid_sentences = 0
    config.train.metric = Metric.loss
    info = json.loads((train(config) / "last" / "info.json").read_text())
    assert info["valid_bleu"] is None
    assert info["valid_loss"] > 0


@pytest.mark.parametrize("split", [FinalEval.test, FinalEval.valid])
def test_it_ends_with_a_score(config: Config, split: FinalEval) -> None:
    config.train.final_eval = split
    run = train(config)
    result = json.loads((run / "best" / "eval" / f"{split.value}.json").read_text())
    assert {"bleu", "chrf", "signatures", "num_sentences", "num_leaked", "seconds"} <= set(result)
    assert result["num_sentences"] == 100


# It learns


def learns(config: Config, runs: Path, *, score: float) -> None:
    """Train, and translate digits that the training has not seen."""
    config.train.runs_dir = str(runs)
    run = train(config)
    result = json.loads((run / "best" / "eval" / "test.json").read_text())
    assert result["bleu"] >= score
    translator = Translator.load(
        run, device=config.train.device, num_threads=config.train.num_threads
    )
    generator = random.Random(99)
    lines = [" ".join(generator.choices("0123456789", k=8)) for _ in range(20)]
    found = [best[0].text for best in translator.translate(lines)]
    assert sum(text == line[::-1] for text, line in zip(found, lines, strict=True)) >= 15


@pytest.mark.slow
def test_it_learns_to_write_digits_backwards(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    start = time.perf_counter()
    learns(learning_config(folder), tmp_path, score=90)
    print(f"learned in {time.perf_counter() - start:.0f} s")


@NEEDS_CUDA
@pytest.mark.parametrize("precision", [Precision.bf16, Precision.fp16, Precision.fp32])
def test_it_learns_on_a_gpu(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Precision
) -> None:
    monkeypatch.chdir(folder)
    config = learning_config(folder)
    config.train.device = Device.cuda
    config.train.precision = precision
    learns(config, tmp_path, score=90)


@NEEDS_CUDA
def test_a_run_on_a_gpu_goes_on(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    config.train.device = Device.cuda
    cut_off(monkeypatch, config, "step 8")
    run = train(config)
    info = json.loads((run / "last" / "info.json").read_text())
    assert info["step"] == 12
    assert "cuda" in info["device"]


@pytest.mark.slow
def test_the_real_corpus_and_a_few_steps(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The defaults, only shorter."""
    monkeypatch.chdir(data_root.parent)
    config = compose(
        [
            f"train.runs_dir={tmp_path}",
            "train.max_steps=12",
            "optim.warmup_steps=4",
            "train.validate_every=6",
            "train.save_every=6",
            "train.valid_sentences=5",
            "train.log_every=1",
            "train.final_eval=none",
            "decode.max_length=40",
        ]
    )
    run = train(config)
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    losses = [event.value for event in board.Scalars("train/loss")]
    assert losses[-1] < losses[0]
    info = json.loads((run / "last" / "info.json").read_text())
    assert info["step"] == 12
    assert info["num_leaked"].keys() == {"valid", "test"}
    assert trainer(config).order.padding_share(trainer(config).planned) <= 0.08
