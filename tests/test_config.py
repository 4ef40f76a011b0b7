"""Settings: every shipped file composes, every mistake is named, and saving loses nothing."""

import copy
import dataclasses
import functools
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from command import check_overrides
from mt.compose import CONFIGS, RANGES, SCHEMAS, ConfigError, check, compose
from mt.config import (
    Config,
    Device,
    EvaluateConfig,
    FinalEval,
    Metric,
    Optimizer,
    Origin,
    Precision,
    config_hash,
    differences,
    load_config,
    save_config,
    setting_types,
    setting_values,
)

CHOICES = sorted(
    (path.parent.relative_to(CONFIGS).as_posix(), path.stem) for path in CONFIGS.glob("*/*.yaml")
)
PRIMARY = {"eval": "evaluate"}  # every other group belongs to train
# What a corpus of the user's own cannot know beforehand.
NEEDED = {("data", "files"): ["data.train=my/train"]}


def problems(*overrides: str, primary: str = "train") -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check_overrides(overrides, primary=primary)
    return caught.value.problems


# ---- what is shipped


def test_defaults_compose_to_plain_dataclasses() -> None:
    config = compose([])
    assert type(config) is Config
    assert type(config.data.clean).__module__ == "mt.config"
    assert (config.data.name, config.data.source_lang, config.data.target_lang) == (
        "bible",
        "en",
        "de",
    )
    assert type(compose([], primary="evaluate")) is EvaluateConfig


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_shipped_choice_composes(group: str, choice: str) -> None:
    overrides = [f"{group}={choice}", *NEEDED.get((group, choice), [])]
    check_overrides(overrides, primary=PRIMARY.get(group, "train"))


def test_every_group_refuses_a_mistyped_key_and_a_wrong_type_in_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mt.compose.CONFIGS", tmp_path)
    for schema, text in (("train", "wrong_name: 1"), ("evaluate", "beam_size: many")):
        (tmp_path / "decode").mkdir(exist_ok=True)
        (tmp_path / "decode" / "beam.yaml").write_text(f"defaults: [schema]\n{text}\n")
        (tmp_path / f"{schema}.yaml").write_text(
            f"defaults: [{schema}_schema, {{decode: beam}}, _self_]\n"
        )
        with pytest.raises(ConfigError, match=text.split(":")[0]):
            compose([], primary=schema)


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_group_file_stands_on_its_schema(group: str, choice: str) -> None:
    text = (CONFIGS / group / f"{choice}.yaml").read_text(encoding="utf-8")
    if group == "experiment":
        assert "# @package _global_" in text
    else:
        assert "schema" in text.split("defaults:")[1].split(":")[0]


def test_an_experiment_wins_over_the_defaults_and_loses_to_the_command_line(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "experiment"
    folder.mkdir()
    (folder / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [{override /model: small}]\n"
        "optim: {lr: 0.5}\ntrain: {max_steps: 777}\n"
    )
    mine = [f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine"]
    config = compose(mine)
    assert (config.model.name, config.optim.lr, config.train.max_steps) == ("small", 0.5, 777)
    config = compose([*mine, "model=base", "optim.lr=0.25"])
    assert (config.model.name, config.optim.lr, config.train.max_steps) == ("base", 0.25, 777)


def test_overrides_keep_their_types() -> None:
    config = compose(
        ["optim.lr=2e-3", "optim=muon", "data.source_version=3", "train.final_eval=none"]
    )
    assert config.optim.lr == 2e-3
    assert config.optim.algorithm is Optimizer.muon
    assert config.data.source_version == "3"
    assert config.train.final_eval is FinalEval.none


# ---- mistakes on the command line


MISTAKES = {
    "optim.lrr=1": ["unknown setting", "did you mean optim.lr?"],
    "lr=1": ["unknown setting", "did you mean optim.lr?"],
    "data.lr=1": ["did you mean optim.lr?"],
    "max_length=9": ["did you mean train.max_length or decode.max_length?"],
    "data.tgt_lang=fr": ["did you mean data.target_lang?"],
    "optim.warmup-steps=3": ["did you mean optim.warmup_steps?"],
    "modle=small": ["did you mean model?"],
    "optim.zzz=1": ["there are optim.algorithm, optim.lr"],
    "+new=1": ["unknown setting"],
    "~gone": ["unknown setting"],
    "+optim.lr=1": ["leave out the +"],
    "+model=small": ["leave out the +"],
    "~optim.lr": ["cannot be removed"],
    "model=smal": ["did you mean small?", "base, big, small, tiny"],
    "model=null": ["base, big, small, tiny"],
    "optim={lr: 1}": ["no such optim", "adamw, muon"],
    "data.clean=false": ["data.clean.nfc"],
    "train.max_steps=abc": ["a whole number or null"],
    "train.max_steps=1.5": ["a whole number or null"],
    "optim.lr=abc": ["a number"],
    "optim.lr=": ["a number"],
    "model.length_head=maybe": ["true or false"],
    "data.source_lang=null": ["text"],
    "optim.schedule=cosin": ["one of inverse_sqrt, cosine, linear", "did you mean cosine?"],
    "model.tie=null": ["one of all, decoder"],
    "optim.lr=1,2": ["--multirun"],
    "optim.lr": ["name=value"],
    "lr": ["name=value", "optim.lr"],
    "=1": ["name=value"],
    "a b=1": ["name=value"],
    "data.train=(a)": ["data.train='(a)'"],
    "data.train=a;b": ["data.train='a;b'"],
    "data@x=bible": ["unknown setting"],
    "eval.model=runs/x": ["setting of evaluate, not of train"],
}


@pytest.fixture(scope="module")
def answers() -> list[str]:
    return problems(*MISTAKES)


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_is_named_with_a_way_out(override: str, answers: list[str]) -> None:
    (answer,) = (answer for answer in answers if answer.startswith(f"{override}: "))
    for words in MISTAKES[override]:
        assert words in answer


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("~model", "model.name: has no value"),
        ("data.train=${b}", "'b' not found"),
        ("data.train=\\${b}", "data.train"),
        ("hydra.verbos=1", "hydra.verbos"),
    ],
)
def test_a_mistake_that_composing_finds(override: str, words: str) -> None:
    (problem,) = problems(override)
    assert words in problem


def test_all_mistakes_come_at_once_with_those_across_settings() -> None:
    found = problems("optim.lrr=1", "model=smal", "train.max_steps=abc", "model.num_heads=5", "foo")
    assert len(found) == 5
    assert any("divisible" in problem for problem in found)


def test_a_mistyped_name_causes_no_second_complaint() -> None:
    # Read literally, this would leave both languages German.
    (problem,) = problems("data.source_lang=de", "data.target_lagn=en")
    assert "data.target_lang?" in problem


def test_a_sweep_is_checked_value_by_value() -> None:
    check_overrides(["optim.lr=1e-3,2e-3", "model=tiny,small"], primary="train", sweep=True)
    with pytest.raises(ConfigError) as caught:
        check_overrides(["optim.lr=1e-3,x", "model=tiny,smal"], primary="train", sweep=True)
    assert len(caught.value.problems) == 2


def test_good_overrides_raise_nothing() -> None:
    check_overrides(
        ["model=small", "optim.lr=2e-3", "++optim.eps=1e-8", "data.train='/a b/(1);$x'"],
        primary="train",
    )
    check_overrides(["eval.model=runs/a", "decode.beam_size=1"], primary="evaluate")


def run_script(name: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    script = CONFIGS.parent / "scripts" / f"{name}.py"
    return subprocess.run(
        [sys.executable, script, *arguments], cwd=folder, capture_output=True, text=True
    )


@pytest.mark.parametrize("name", ["train", "prepare", "evaluate"])
def test_scripts_end_in_one_message_without_traceback_or_files(name: str, tmp_path: Path) -> None:
    result = run_script(name, "decode.beam_siez=3", "decode=fast", folder=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: 2 problems")
    assert "decode.beam_size?" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_found_later_ends_the_same_way(tmp_path: Path) -> None:
    result = run_script("evaluate", "eval.model=nowhere", "eval.device=cpu", folder=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert "nowhere" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_hydra_shows_a_config_without_leaving_files(tmp_path: Path) -> None:
    result = run_script("train", "--cfg", "job", "--package", "model", folder=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert "name: tiny" in result.stdout
    assert list(tmp_path.iterdir()) == []


# ---- what must hold across settings


def test_the_defaults_are_sound() -> None:
    assert check(compose([])) == []
    assert check(compose([], primary="evaluate")) == []


def changed(config: Any, changes: dict[str, Any]) -> Any:
    """A copy of a config with some settings, by dotted name, at other values."""
    config = copy.deepcopy(config)
    for name, value in changes.items():
        *path, last = name.split(".")
        setattr(functools.reduce(getattr, path, config), last, value)
    return config


@pytest.fixture(scope="module")
def sound() -> Config:
    return compose([])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.dim": 130, "model.num_heads": 4}, "divisible"),
        ({"model.dim": 129, "model.num_heads": 3}, "even"),
        ({"model.num_heads": 0}, "model.num_heads=0: must be at least 1"),
        (
            {"data.target_lang": "en", "data.origin": Origin.hub, "data.repository": "a/b"},
            "both en",
        ),
        ({"data.source_lang": "../x"}, "language code"),
        ({"data.source_lang": "False"}, "language code"),
        ({"data.origin": Origin.files}, "data.train"),
        ({"data.origin": Origin.hub}, "data.repository"),
        ({"data.source_column": "a"}, "both or neither"),
        ({"data.train": "a${b"}, "${"),
        ({"train.average": 4, "train.keep": 3}, "train.keep=3"),
        ({"train.valid_sentences": 0}, "train.valid_sentences"),
        ({"train.run_name": "a/b"}, "plain file name"),
        ({"train.run_name": ".."}, "plain file name"),
        ({"train.run_name": "last"}, "newest run"),
        ({"train.device": Device.cpu, "train.precision": Precision.fp16}, "needs a GPU"),
        ({"optim.lr": math.nan}, "optim.lr=nan"),
        ({"optim.lr": math.inf}, "optim.lr=inf"),
    ],
)
def test_settings_that_contradict_each_other(
    sound: Config, changes: dict[str, Any], words: str
) -> None:
    assert check(sound) == []
    (problem,) = check(changed(sound, changes))
    assert words in problem


def test_several_budgets_or_one_are_fine(sound: Config) -> None:
    for name in ("train.max_steps", "train.max_epochs", "train.max_minutes"):
        assert check(changed(sound, {"train.max_steps": None, name: 500})) == []


def test_all_contradictions_come_at_once() -> None:
    assert len(problems("model.num_heads=5", "data.source_lang=../x", "optim.lr=-1")) == 3


def test_eval_files_come_in_pairs() -> None:
    (problem,) = problems("eval.source=a.txt", primary="evaluate")
    assert "eval.reference" in problem
    check_overrides(["eval.source=a.txt", "eval.reference=b.txt"], primary="evaluate")


def test_a_metric_without_translations_may_be_the_loss(sound: Config) -> None:
    changes = {"train.valid_sentences": 0, "train.metric": Metric.loss}
    assert check(changed(sound, changes)) == []


def test_the_batch_size_is_a_number_or_auto(sound: Config) -> None:
    assert compose(["train.batch_tokens=auto"]).train.batch_tokens == "auto"
    assert compose(["train.batch_tokens=2048"]).train.batch_tokens == 2048
    (problem,) = check(changed(sound, {"train.batch_tokens": "many"}))
    assert "train.batch_tokens=many: must be a whole number, or auto" in problem


def test_every_number_has_exactly_one_range() -> None:
    numbers = {
        name
        for schema in SCHEMAS.values()
        for name, kind in setting_types(schema).items()
        if kind in (int, float, int | None, float | None, int | str)
    }
    listed = [name for _, _, names in RANGES for name in names.split()]
    assert sorted(listed) == sorted(numbers)


def test_every_range_is_held(sound: Config) -> None:
    configs = [sound, compose([], primary="evaluate")]
    for _, holds, names in RANGES:
        outside = next(value for value in (-1, 0, 1, 2) if not holds(value))
        for name in names.split():
            config = next(config for config in configs if name in setting_values(config))
            found = check(changed(config, {name: outside}))
            assert any(problem.startswith(f"{name}=") for problem in found), name


# ---- saving


def test_a_saved_config_comes_back_equal(tmp_path: Path) -> None:
    config = compose(
        ["optim=muon", "optim.eps=1e-12", "train.max_minutes=2.5", "data.max_pairs=null"]
    )
    config.data.source_lang = "no"  # a truth value to YAML, unless it is quoted
    config.data.train = "a: b # 'c' \"d\"\n(é) \\ 1e3"
    config.data.source_version = "1e3"
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("  name: tiny\n", "", "model.name is missing"),
        ("  lr: 0.003\n", "  lr: 0.003\n  lrr: 1\n", "optim.lrr is unknown"),
        ("  lr: 0.003\n", "  lr: fast\n", "optim.lr=fast: expected a number"),
        ("  lr: 0.003\n", "  lr: ???\n", "optim.lr"),
        ("  name: tiny\n", "  name: ${oc.env:HOME}\n", "model.name"),
        ("  algorithm: muon\n", "  algorithm: sgd\n", "one of adamw, muon"),
        ("optim:\n", "optim: [\n", "cannot read"),
        ("optim:\n", "optim: 3\nrest:\n", "optim is unknown"),
    ],
)
def test_a_damaged_saved_config_is_refused(tmp_path: Path, old: str, new: str, words: str) -> None:
    path = tmp_path / "config.yaml"
    save_config(compose([]), path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match="config.yaml") as caught:
        load_config(path)
    assert words in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[1, 2]", b"text", b"\xff\xfe\x00"])
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="config.yaml"):
        load_config(path)
    with pytest.raises(ValueError, match="missing.yaml"):
        load_config(tmp_path / "missing.yaml")


def test_differences_name_old_and_new() -> None:
    old = compose(["optim.lr=0.001"])
    new = compose(["optim.lr=0.002", "model.length_head=false", "train.accumulate=2"])
    assert differences(old, new) == [
        "model.length_head: true -> false",
        "optim.lr: 0.001 -> 0.002",
        "train.accumulate: 1 -> 2",
    ]
    assert differences(old, old) == []


def test_the_hash_follows_what_a_run_computes_and_nothing_else() -> None:
    config = compose([])
    assert config_hash(config) == config_hash(compose([]))
    moved = compose(["train.runs_dir=/x", "train.resume=never", "train.final_eval=none"])
    assert config_hash(moved) == config_hash(config)
    assert differences(config, moved) == []
    hashes = {config_hash(config)}
    for override in ("optim.lr=1", "model=small", "data.target_lang=fr", "optim=adamw"):
        hashes.add(config_hash(compose([override])))
    assert len(hashes) == 5


def test_the_hash_is_the_same_in_another_process() -> None:
    code = (
        "from mt.compose import compose; from mt.config import config_hash; "
        "print(config_hash(compose([])))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == config_hash(compose([]))


def test_values_and_types_name_the_same_settings() -> None:
    assert list(setting_values(compose([]))) == list(setting_types(Config))
    assert {field.name for field in dataclasses.fields(Config)} == {
        name.split(".")[0] for name in setting_types(Config)
    }
