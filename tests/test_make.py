"""The Makefile: settings reach the scripts letter by letter, and setup repairs itself."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ["help", "setup", "data", "train", "eval", "translate", "bench", "test", "lint"]
TARGETS += ["format", "tensorboard", "clean"]

# Stands for .venv/bin/*: notes how it was called.
RECORDER = f"""#!{sys.executable}
import json, os, sys
with open("calls.jsonl", "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
if "translate.py" in "".join(sys.argv):
    open("stdin.txt", "w").write(sys.stdin.read())
"""

# Stands for python3: makes an environment whose pip may fail, as told by the file "fail".
SYSTEM = f"""#!{sys.executable}
import os, shutil, sys
if sys.argv[1] == "-c":
    sys.exit(os.path.exists("old") if "version" in sys.argv[2] else os.path.exists("no-venv"))
assert sys.argv[1:] == ["-m", "venv", ".venv"], sys.argv
os.makedirs(".venv/bin", exist_ok=True)
shutil.copy("pip", ".venv/bin/python")
open(".venv/made", "a").write("x")
"""
PIP = f"""#!{sys.executable}
import json, os, sys
with open("calls.jsonl", "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
sys.exit(os.path.exists("fail"))
"""


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def make(
    folder: Path, *arguments: str, stdin: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run make as a user would, outside of any make that runs these tests."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MAKE", "MFLAGS")) and name != "PYTHON"
    }
    return subprocess.run(
        ["make", *arguments],
        cwd=folder,
        env=inherited | environment,
        input=stdin,
        capture_output=True,
        text=True,
    )


def calls(folder: Path) -> list[list[str]]:
    path = folder / "calls.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A checkout whose environment is ready."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    for name in ("data", "mt", "scripts", "tests", "runs", "configs"):
        (tmp_path / name).mkdir()
    for name in ("python", "ruff", "mypy", "tensorboard"):
        executable(tmp_path / ".venv" / "bin" / name, RECORDER)
    (tmp_path / ".venv" / ".ready").touch()
    return tmp_path


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """A checkout without environment, and a python3 that is quick to make one."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    executable(tmp_path / "python3", SYSTEM)
    executable(tmp_path / "pip", PIP)
    return tmp_path


# ---- settings

# Only a space right after the = is lost: make itself takes it away.
HOSTILE = [
    "x=(a)",
    "x=a;b",
    "x=a; touch stolen",
    "x=${b}",
    "x=$(touch stolen)",
    "x=$(shell touch stolen)",
    "x=`touch stolen`",
    "x=$$",
    "x=$HOME",
    "x='",
    'x="',
    "x='a' \"b\"",
    "x=a  b ",
    "x=a\\",
    "x=a\\nb",
    "x=a#b",
    "x=*",
    "x=~",
    "x=!a",
    "x=a&b|c>d<e",
    "x=%",
    "x=",
    "x=a=b",
    "x=a:=b",
    "x=[1,2]",
    "x={a: 1}",
    "x=é☃",
    "+new=1",
    "++new=1",
    "hydra/launcher=joblib",
    "data@x=bible",
    "data=bible",
    "train=default",
    "model=small",
    "optim.lr=2e-3",
    "data.target_lang=fr",
    "data.clean.nfc=false",
]


@pytest.mark.parametrize("setting", HOSTILE)
def test_a_setting_arrives_letter_by_letter(project: Path, setting: str) -> None:
    result = make(project, "train", setting, b="wrong")
    assert result.returncode == 0, result.stderr
    assert calls(project) == [["python", "scripts/train.py", setting]]
    assert not (project / "stolen").exists()


def test_many_settings_arrive_together(project: Path) -> None:
    settings = ["model=small", "data=files", "optim.lr=2e-3", "data.target_lang=fr"]
    assert make(project, *settings, "train").returncode == 0
    (call,) = calls(project)
    assert sorted(call[2:]) == sorted(settings)


def test_a_line_break_cannot_leave_its_setting(project: Path) -> None:
    make(project, "train", "x=a\ntouch stolen")
    assert calls(project) == [["python", "scripts/train.py", "x=a touch stolen"]]
    assert not (project / "stolen").exists()


def test_names_that_belong_to_make_stay_there(project: Path) -> None:
    result = make(project, "train", "NPROC=2", "PYTHON=python9", "-j2", "a=1", MAKEFLAGS="s")
    assert result.returncode == 0, result.stderr
    (call,) = calls(project)
    assert call[:2] == ["python", "scripts/launch.py"]
    assert call[2:] == ["--standalone", "--nproc-per-node", "2", "scripts/train.py", "a=1"]


@pytest.mark.parametrize("arguments", [["NPROC=1"], ["NPROC="], []])
def test_one_process_needs_no_launcher(project: Path, arguments: list[str]) -> None:
    result = make(project, "train", "a=1", *arguments, NPROC="8")  # the environment's is ignored
    assert result.returncode == 0, result.stderr
    assert calls(project) == [["python", "scripts/train.py", "a=1"]]


def test_the_number_of_processes_is_one_word(project: Path) -> None:
    make(project, "train", "NPROC=2;touch stolen $(touch stolen)")
    (call,) = calls(project)
    assert call[4:] == ["2;touch stolen $(touch stolen)", "scripts/train.py"]
    assert not (project / "stolen").exists()


def test_the_environment_is_no_setting(project: Path) -> None:
    make(project, "train", model="big")
    assert calls(project) == [["python", "scripts/train.py"]]


def test_args_are_words_of_the_shell(project: Path) -> None:
    make(project, "train", "a=1", "ARGS=~gone --multirun 'x=b c' $HOME", HOME="/h")
    arguments = ["a=1", "~gone", "--multirun", "x=b c", "/h"]
    assert calls(project) == [["python", "scripts/train.py", *arguments]]


@pytest.mark.parametrize(
    ("target", "script"),
    [("data", "prepare.py"), ("train", "train.py"), ("eval", "evaluate.py")],
)
def test_a_target_runs_its_script_beside_a_folder_of_its_name(
    project: Path, target: str, script: str
) -> None:
    (project / target).mkdir(exist_ok=True)
    assert make(project, target, "a=1").returncode == 0
    assert calls(project) == [["python", f"scripts/{script}", "a=1"]]


def test_a_failing_script_fails_the_target(project: Path) -> None:
    executable(project / ".venv" / "bin" / "python", "#!/bin/sh\nexit 2\n")
    assert make(project, "train").returncode != 0


# ---- the other targets


@pytest.mark.parametrize("text", ['It\'s $5 & "q" `id` \\', "-5 degrees", "#1 $(shell x)"])
def test_translate_takes_its_text_literally(project: Path, text: str) -> None:
    assert make(project, "translate", f"TEXT={text}", "ARGS=-b 1").returncode == 0
    assert calls(project) == [["python", "scripts/translate.py", "-b", "1", "--", text]]


def test_translate_reads_standard_input(project: Path) -> None:
    make(project, "translate", stdin="one\ntwo\n")
    assert calls(project) == [["python", "scripts/translate.py"]]
    assert (project / "stdin.txt").read_text() == "one\ntwo\n"


def test_test_passes_its_arguments(project: Path) -> None:
    make(project, "test", 'ARGS=-m "not slow"')
    assert calls(project) == [["python", "-m", "pytest", "-m", "not slow"]]


@pytest.mark.parametrize("target", ["translate", "test", "lint", "format", "tensorboard", "clean"])
def test_settings_are_refused_where_they_mean_nothing(project: Path, target: str) -> None:
    result = make(project, target, "model=small")
    assert result.returncode != 0
    assert "model" in result.stderr
    assert calls(project) == []
    assert (project / ".venv").exists()


def test_a_word_that_is_no_target_is_refused_before_anything_runs(project: Path) -> None:
    result = make(project, "train", "small")
    assert result.returncode != 0
    assert "small" in result.stderr
    assert calls(project) == []


@pytest.mark.parametrize("arguments", [[], ["help"]])
def test_help_has_one_line_for_each_target(project: Path, arguments: list[str]) -> None:
    for target in TARGETS:
        (project / target).mkdir(exist_ok=True)
    lines = make(project, *arguments).stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == TARGETS
    assert all(len(line.split()) > 2 for line in lines[1:])


def test_clean_keeps_models_and_downloads(project: Path) -> None:
    for name in ("runs/a/model", "data/corpus", "mt/model.py", "mt/__pycache__/x", "tests/t.py"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).touch()
    (project / ".ruff_cache").mkdir()
    assert make(project, "clean").returncode == 0
    for name in ("runs/a/model", "data/corpus", "mt/model.py", "tests/t.py", "Makefile"):
        assert (project / name).exists()
    for name in (".venv", ".ruff_cache", "mt/__pycache__"):
        assert not (project / name).exists()


# ---- setup


def setup(folder: Path) -> subprocess.CompletedProcess[str]:
    return make(folder, "setup", PYTHON="./python3")


def test_setup_installs_the_exact_versions_once(fresh: Path) -> None:
    assert setup(fresh).returncode == 0
    (call,) = calls(fresh)
    assert call[:3] == ["-m", "pip", "install"]
    assert call[-4:] == ["-c", "constraints.txt", "-e", ".[dev]"]
    assert setup(fresh).returncode == 0
    assert len(calls(fresh)) == 1


def test_training_in_a_fresh_checkout_sets_up_first(fresh: Path) -> None:
    assert make(fresh, "train", "a=1", PYTHON="./python3").returncode == 0
    assert [call[0] for call in calls(fresh)] == ["-m", "scripts/train.py"]


def test_benchmarks_install_what_they_compare_with_once(fresh: Path) -> None:
    for _ in range(2):
        result = make(fresh, "bench", "ARGS=train --peer hf", "model=big", PYTHON="./python3")
        assert result.returncode == 0, result.stderr
    setup_call, peer_call, *measured = calls(fresh)
    assert setup_call[-1] == ".[dev]"
    assert peer_call[-4:] == ["-c", "constraints.txt", "-e", ".[dev,bench]"]
    assert measured == [["scripts/bench.py", "train", "--peer", "hf", "model=big"]] * 2


def test_what_benchmarks_compare_with_is_installed_again_when_that_broke_off(fresh: Path) -> None:
    setup(fresh)
    (fresh / "fail").touch()
    assert make(fresh, "bench", PYTHON="./python3").returncode != 0
    (fresh / "fail").unlink()
    make(fresh, "bench", PYTHON="./python3")
    installs = [call for call in calls(fresh) if call[-1] == ".[dev,bench]"]
    assert len(installs) == 2


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_setup_runs_again_after_a_change(fresh: Path, name: str) -> None:
    setup(fresh)
    ready = (fresh / ".venv" / ".ready").stat().st_mtime
    os.utime(fresh / name, (ready + 5, ready + 5))
    (fresh / ".venv" / "kept").touch()
    setup(fresh)
    assert len(calls(fresh)) == 2
    assert (fresh / ".venv" / "kept").exists()


def test_a_setup_that_broke_off_starts_anew(fresh: Path) -> None:
    (fresh / "fail").touch()
    assert setup(fresh).returncode != 0
    assert make(fresh, "train", PYTHON="./python3").returncode != 0
    assert all("scripts/train.py" not in call for call in calls(fresh))
    (fresh / ".venv" / "broken").touch()
    (fresh / "fail").unlink()
    assert setup(fresh).returncode == 0
    assert not (fresh / ".venv" / "broken").exists()
    assert (fresh / ".venv" / "made").read_text() == "x"


@pytest.mark.parametrize(("flag", "words"), [("old", "3.11"), ("no-venv", "python3-venv")])
def test_an_unfit_python_is_named(fresh: Path, flag: str, words: str) -> None:
    (fresh / flag).touch()
    result = setup(fresh)
    assert result.returncode != 0
    assert words in result.stderr
    assert "PYTHON=" in result.stderr
    assert calls(fresh) == []
    assert not (fresh / ".venv").exists()


# ---- the versions


def test_torch_is_exact_and_of_no_special_build() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert "torch==2.13.0" in pins
    assert all(line.count("==") == 1 and "+" not in line for line in pins)


def test_every_dependency_is_pinned_inside_its_range() -> None:
    packaging = pytest.importorskip("packaging.requirements")
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    optional = itertools.chain.from_iterable(project["optional-dependencies"].values())
    for text in [*project["dependencies"], *optional]:
        requirement = packaging.Requirement(text)
        assert requirement.specifier.contains(pins[requirement.name]), text
