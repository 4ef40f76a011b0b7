"""Run directories: names, one writer, and what a second start means."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import files_config, save_tiny_model

from mt.checkpoint import point
from mt.config import Config, FinalEval, Resume, config_hash, load_config
from mt.runs import Run, locked, open_run, run_name

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = files_config(tmp_path)
    config.train.runs_dir = str(tmp_path / "runs")
    return config


# Names


def test_a_name_says_what_it_is(config: Config) -> None:
    name = open_run(config).path.name
    assert name == run_name(config) == f"tiny-en-de-test-{config_hash(config)}"
    config.optim.lr *= 2
    assert run_name(config) != name
    config.train.run_name = "mine"
    assert open_run(config).path == Path(config.train.runs_dir) / "mine"


def test_what_is_shown_does_not_change_the_name(config: Config) -> None:
    name = run_name(config)
    config.train.final_eval = FinalEval.none
    config.train.log_every = 3
    config.train.resume = Resume.never
    config.train.runs_dir = "elsewhere"
    assert run_name(config) == name


def test_the_settings_are_kept(config: Config) -> None:
    assert load_config(open_run(config).path / "config.yaml") == config


# A second start


def test_the_same_settings_are_the_same_run(config: Config) -> None:
    first = open_run(config)
    first.write("resolved.json", {"max_steps": 3})
    again = open_run(config)
    assert again.path == first.path
    assert again.resolved() == {"max_steps": 3}


def test_other_settings_are_refused_with_the_differences(config: Config) -> None:
    config.train.run_name = "mine"
    open_run(config)
    other = dataclasses.replace(
        config,
        optim=dataclasses.replace(config.optim, lr=0.5),
        model=dataclasses.replace(config.model, dim=32),
    )
    with pytest.raises(ValueError) as refusal:
        open_run(other)
    text = str(refusal.value)
    assert "model.dim: 16 -> 32" in text
    assert f"optim.lr: {config.optim.lr} -> 0.5" in text
    assert "train.resume=never" in text
    assert "mine" in text
    assert open_run(config).path.name == "mine"  # the refused start left everything as it was


def test_never_starts_another_one(config: Config) -> None:
    config.train.run_name = "mine"
    open_run(config)
    config.train.resume = Resume.never
    config.optim.lr *= 2
    assert open_run(config).path.name == "mine-2"
    assert open_run(config).path.name == "mine-3"


def test_never_takes_the_plain_name_when_it_is_free(config: Config) -> None:
    config.train.run_name = "mine"
    config.train.resume = Resume.never
    assert open_run(config).path.name == "mine"


def test_a_damaged_config_is_named(config: Config) -> None:
    file = open_run(config).path / "config.yaml"
    file.write_text("train: [")
    with pytest.raises(ValueError, match="config.yaml"):
        open_run(config)


# The lock


def test_one_writer_a_run(config: Config) -> None:
    run = open_run(config)
    with locked(run):
        with pytest.raises(ValueError, match=f"process {os.getpid()} is writing.*"), locked(run):
            pytest.fail("two writers")
        config.train.run_name = "other"
        with locked(open_run(config)):
            pass  # another run is free
    with locked(run):
        pass  # and so is this one now


def test_another_process_is_refused_until_it_is_killed(config: Config) -> None:
    run = open_run(config)
    code = (
        "import sys, time; from pathlib import Path; from mt.runs import Run, locked\n"
        "with locked(Run(Path(sys.argv[1]))):\n    print('held', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(run.path)], cwd=ROOT, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match=f"process {process.pid} .*run_name"), locked(run):
            pytest.fail("two writers")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with locked(run):
        assert (run.path / "lock").read_text() == str(os.getpid())


# What a run knows


def test_a_run_before_and_after_its_first_checkpoint(config: Config) -> None:
    run = open_run(config)
    assert run.last is None
    assert run.best is None
    assert run.resolved() is None
    assert not run.is_finished
    for step in (5, 10):
        save_tiny_model(run.checkpoint(step), config, num_leaked=0)
    point(run.path / "last", run.checkpoint(10))
    assert run.last == run.checkpoint(10).resolve()
    assert run.best is None  # nothing is validated yet
    point(run.path / "best", run.checkpoint(5))
    assert run.best == run.checkpoint(5).resolve()
    run.write("finished.json", {})
    assert run.is_finished


def test_checkpoints_sort_by_step() -> None:
    run = Run(Path("runs/mine"))
    names = [run.checkpoint(step).name for step in (9, 10, 99, 1000, 12345)]
    assert names == sorted(names)


def test_a_file_is_written_whole_or_not_at_all(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_run(config)
    run.write("resolved.json", {"max_steps": 3})

    def crash(*arguments: object) -> None:
        raise OSError("killed")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError):
        run.write("resolved.json", {"max_steps": 4})
    assert json.loads((run.path / "resolved.json").read_text()) == {"max_steps": 3}
