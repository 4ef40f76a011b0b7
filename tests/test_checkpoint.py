"""Model directories: whole or not there, and clear words about damaged ones."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import SOURCES, TARGETS, files_config, save_tiny_model

from mt import checkpoint
from mt.checkpoint import (
    LoadedModel,
    TrainerState,
    average_weights,
    find_model,
    load_model,
    load_tensors,
    load_trainer_state,
    point,
    provenance,
    replace_directory,
    save_checkpoint,
    set_weights,
    unique_weights,
)
from mt.config import Config
from mt.tokenizer import Tokenizer

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return files_config(tmp_path_factory.mktemp("text"))


@pytest.fixture
def saved(tmp_path: Path, config: Config) -> Path:
    return save_tiny_model(tmp_path / "model", config, num_leaked=3)


def save_again(path: Path, loaded: LoadedModel, *, factor: float, step: int) -> None:
    """Replace a model directory by one with other weights."""
    save_checkpoint(
        path,
        weights={name: factor * tensor for name, tensor in unique_weights(loaded.model).items()},
        tokenizer=loaded.tokenizer,
        config=loaded.config,
        info={**loaded.info, "step": step},
    )


# Round trip


def test_a_round_trip(saved: Path, tmp_path: Path, config: Config) -> None:
    first = load_model(saved, device=CPU)
    save_again(tmp_path / "again", first, factor=1, step=1)
    second = load_model(tmp_path / "again", device=CPU)
    for name, tensor in unique_weights(first.model).items():
        assert torch.equal(tensor, unique_weights(second.model)[name])
    assert second.config == config
    assert second.info == first.info
    assert second.info["num_leaked"]["test"] == 3
    texts = [*SOURCES, *TARGETS]
    assert second.tokenizer.encode(texts) == first.tokenizer.encode(texts)
    assert not second.model.training
    assert second.path == tmp_path / "again"


def test_weights_can_be_loaded_rounded(saved: Path) -> None:
    model = load_model(saved, device=CPU, dtype=torch.bfloat16).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_tied_weights_are_stored_once_and_stay_tied(saved: Path) -> None:
    tables = [name for name in load_tensors(saved / "model.safetensors") if "table" in name]
    assert len(tables) == 1
    model = load_model(saved, device=CPU).model
    assert model.source_embedding.table.weight is model.output_table


def test_the_files_of_a_model_directory(saved: Path) -> None:
    names = {file.name for file in saved.iterdir()}
    assert names == {"model.safetensors", "tokenizer.model", "config.yaml", "info.json"}
    assert [file.name for file in saved.parent.iterdir()] == ["model"]  # nothing half-done


def test_a_trainer_state_round_trip(saved: Path) -> None:
    loaded = load_model(saved, device=CPU)
    state = TrainerState(
        tensors={"a": torch.randn(3), "random": torch.get_rng_state(), "step": torch.tensor(4.0)},
        values={"step": 4, "best": -float("inf"), "scaler": {}},
    )
    save_checkpoint(
        saved,
        weights=unique_weights(loaded.model),
        tokenizer=loaded.tokenizer,
        config=loaded.config,
        info=loaded.info,
        trainer=state,
    )
    again = load_trainer_state(saved)
    assert again.values == state.values
    assert again.tensors.keys() == state.tensors.keys()
    assert all(torch.equal(again.tensors[name], state.tensors[name]) for name in state.tensors)


def test_a_text_in_another_script_survives(saved: Path) -> None:
    loaded = load_model(saved, device=CPU)
    loaded.info["note"] = "Ελληνικά 中文 ½"
    save_again(saved, loaded, factor=1, step=1)
    assert load_model(saved, device=CPU).info["note"] == "Ελληνικά 中文 ½"


# All or nothing


class Crash(Exception):
    """Stands for a killed process."""


@pytest.mark.parametrize("where", ["save_file", "save_config", "_to_disk", "replace_directory"])
def test_a_crash_while_writing_leaves_the_old_one(
    saved: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    before = load_model(saved, device=CPU)

    def crash(*arguments: object) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, where, crash)
        with pytest.raises(Crash):
            save_again(saved, before, factor=2, step=2)
    after = load_model(saved, device=CPU)
    assert after.info["step"] == 1
    for name, tensor in unique_weights(before.model).items():
        assert torch.equal(tensor, unique_weights(after.model)[name])
    # And the rest of it is in nobody's way.
    save_again(saved, before, factor=2, step=2)
    assert load_model(saved, device=CPU).info["step"] == 2
    assert [file.name for file in saved.parent.iterdir()] == ["model"]


def test_a_crash_leaves_nothing_that_passes_for_a_checkpoint(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_model(saved, device=CPU)

    def crash(*arguments: object) -> None:
        raise Crash

    monkeypatch.setattr(checkpoint, "replace_directory", crash)
    with pytest.raises(Crash):
        save_again(saved.parent / "step-00000002", loaded, factor=1, step=2)
    assert list(saved.parent.glob("step-*")) == []


def test_everything_is_on_disk_before_the_rename(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_model(saved, device=CPU)
    synced: set[str] = set()
    to_disk = checkpoint._to_disk

    def note(file: Path) -> None:
        synced.add(file.name)
        to_disk(file)

    def check(new: Path, path: Path) -> None:
        assert synced >= {file.name for file in new.rglob("*") if file.is_file()}
        replace_directory(new, path)

    monkeypatch.setattr(checkpoint, "_to_disk", note)
    monkeypatch.setattr(checkpoint, "replace_directory", check)
    save_again(saved, loaded, factor=1, step=2)
    assert load_model(saved, device=CPU).info["step"] == 2


def test_a_link_changes_in_one_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    link = tmp_path / "last"
    point(link, tmp_path / "one")
    assert link.resolve() == tmp_path / "one"
    assert not os.path.isabs(os.readlink(link))  # the folder can be moved

    def crash(*arguments: object) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(Crash):
            point(link, tmp_path / "two")
    assert link.resolve() == tmp_path / "one"
    point(link, tmp_path / "two")
    assert link.resolve() == tmp_path / "two"


# Damage


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def garbage(file: Path) -> None:
    file.write_bytes(b"\x80\x04 not what it says \xff")


def empty(file: Path) -> None:
    file.write_bytes(b"")


def a_list(file: Path) -> None:
    file.write_text("[1, 2]")


def a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("damage", [truncate, garbage, empty, a_list, Path.unlink, a_folder])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "tokenizer.model", "config.yaml", "info.json"]
)
def test_damage_is_named(saved: Path, name: str, damage: Callable[[Path], None]) -> None:
    damage(saved / name)
    with pytest.raises(ValueError, match=re.escape(str(saved / name))):
        load_model(saved, device=CPU)


def test_a_config_of_another_model(saved: Path) -> None:
    file = saved / "config.yaml"
    file.write_text(file.read_text().replace("decoder_layers: 3", "decoder_layers: 4"))
    with pytest.raises(ValueError, match="model.safetensors does not fit.*decoder.3.* is missing"):
        load_model(saved, device=CPU)


def test_weights_of_another_shape(saved: Path) -> None:
    file = saved / "config.yaml"
    file.write_text(file.read_text().replace("ffn_dim: 32", "ffn_dim: 48"))
    with pytest.raises(ValueError, match=r"does not fit.*is \[32.*, not \[48.*more"):
        load_model(saved, device=CPU)


def test_an_unknown_weight(saved: Path) -> None:
    model = load_model(saved, device=CPU).model
    weights = {**unique_weights(model), "foreign.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match="foreign.weight is unknown"):
        set_weights(model, weights, origin=saved)


def test_weights_that_do_not_fit_change_nothing(saved: Path) -> None:
    model = load_model(saved, device=CPU).model
    before = {name: tensor.detach().clone() for name, tensor in unique_weights(model).items()}
    weights = {name: tensor + 1 for name, tensor in before.items()}
    weights.popitem()
    with pytest.raises(ValueError, match="is missing"):
        set_weights(model, weights, origin=saved)
    assert all(torch.equal(tensor, before[n]) for n, tensor in unique_weights(model).items())


def test_another_vocabulary(saved: Path, tmp_path: Path, config: Config) -> None:
    model = load_model(saved, device=CPU).model
    wide = {
        name: torch.cat([tensor, tensor]) if "table" in name else tensor
        for name, tensor in unique_weights(model).items()
    }
    save_checkpoint(
        tmp_path / "wide",
        weights=wide,
        tokenizer=Tokenizer.load(saved / "tokenizer.model"),
        config=config,
        info={},
    )
    with pytest.raises(ValueError, match="does not fit"):
        load_model(tmp_path / "wide", device=CPU)


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("damage", [truncate, Path.unlink])
def test_a_damaged_trainer_state(saved: Path, name: str, damage: Callable[[Path], None]) -> None:
    loaded = load_model(saved, device=CPU)
    save_checkpoint(
        saved,
        weights=unique_weights(loaded.model),
        tokenizer=loaded.tokenizer,
        config=loaded.config,
        info=loaded.info,
        trainer=TrainerState(tensors={"a": torch.zeros(100)}, values={"step": 1}),
    )
    damage(saved / "trainer" / name)
    with pytest.raises(ValueError, match=name):
        load_trainer_state(saved)


def test_nothing_is_unpickled() -> None:
    unsafe = re.compile(r"torch\.(load|save)\b|\bpickle\b|allow_pickle|weights_only|\bdill\b")
    for folder in ("mt", "scripts"):
        for file in (ROOT / folder).glob("*.py"):
            code = re.sub(r'""".*?"""|#.*', "", file.read_text(), flags=re.DOTALL)
            assert not unsafe.search(code), file


# Averages, and finding a model


def test_an_average_is_the_mean(saved: Path, tmp_path: Path) -> None:
    loaded = load_model(saved, device=CPU)
    paths = [tmp_path / name for name in ("one", "two", "three")]
    for path, factor in zip(paths, (1, 2, 6), strict=True):
        save_again(path, loaded, factor=factor, step=1)
    mean = average_weights(paths)
    assert mean.keys() == unique_weights(loaded.model).keys()
    for name, tensor in unique_weights(loaded.model).items():
        torch.testing.assert_close(mean[name], 3 * tensor.detach())
    one = average_weights(paths[:1])
    assert all(torch.equal(one[n], t) for n, t in unique_weights(loaded.model).items())


def test_finding_a_model(saved: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    saved.rename(run / "checkpoints" / "step-1")
    loaded = load_model(run / "checkpoints" / "step-1", device=CPU)
    save_again(run / "checkpoints" / "step-2", loaded, factor=1, step=2)
    assert find_model(run / "checkpoints" / "step-1").name == "step-1"
    point(run / "last", run / "checkpoints" / "step-2")
    assert find_model(run).name == "step-2"  # nothing validated yet
    point(run / "best", run / "checkpoints" / "step-1")
    assert find_model(str(run)).name == "step-1"
    assert find_model(run / "last").name == "step-2"
    point(tmp_path / "newest", run)
    assert find_model(tmp_path / "newest").name == "step-1"


def test_no_model_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no model at .*nowhere.*make train"):
        find_model(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no model.*name a run"):
        find_model(tmp_path)


# What made it


def test_provenance_can_be_written() -> None:
    facts = provenance()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["packages"]["torch"] == torch.__version__.split("+")[0] or torch.__version__
    revision = facts["git_revision"]
    assert revision is None or re.fullmatch(r"[0-9a-f]{40}\+?", revision)


def test_provenance_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert provenance()["git_revision"] is None
