"""Model directories and trainer states: written whole or not at all, read without pickle.

A model directory holds everything that a translation needs::

    model.safetensors   the weights, fp32
    tokenizer.model     SentencePiece
    config.yaml         all settings of the run
    info.json           step, scores, leak count, git revision, package versions, machine
    trainer/            only in the newest checkpoint: what training needs to go on
"""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mt.config import Config, load_config, save_config
from mt.model import Transformer
from mt.tokenizer import Tokenizer

WEIGHTS, TOKENIZER, CONFIG, INFO = (
    "model.safetensors",
    "tokenizer.model",
    "config.yaml",
    "info.json",
)
TRAINER = "trainer"


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model directory in memory."""

    path: Path
    model: Transformer  # in eval mode
    tokenizer: Tokenizer
    config: Config
    info: dict[str, Any]


@dataclass(frozen=True, slots=True)
class TrainerState:
    """What training needs besides the weights to go on as if it had never stopped."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]  # JSON


def save_checkpoint(
    path: Path,
    *,
    weights: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    config: Config,
    info: dict[str, Any],
    trainer: TrainerState | None = None,
) -> None:
    """Write a model directory, with a trainer state if there is one. An older one is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    save_tensors(weights, partial / WEIGHTS)
    tokenizer.save(partial / TOKENIZER)
    save_config(config, partial / CONFIG)
    (partial / INFO).write_text(
        json.dumps(info, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    if trainer is not None:
        (partial / TRAINER).mkdir()
        save_tensors(trainer.tensors, partial / TRAINER / "state.safetensors")
        (partial / TRAINER / "state.json").write_text(json.dumps(trainer.values))
    for file in [*partial.rglob("*"), partial]:
        _to_disk(file)
    replace_directory(partial, path)
    _to_disk(path.parent)


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors, each as a block of its own (tied weights are the model's affair)."""
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read tensors onto the CPU; ValueError when the file is missing or damaged."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; the checkpoint is not complete") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); use another checkpoint, or train again"
        ) from error


def load_trainer_state(path: Path) -> TrainerState:
    """The trainer state of a checkpoint; ValueError when it has none or a damaged one."""
    folder = path / TRAINER
    return TrainerState(
        tensors=load_tensors(folder / "state.safetensors"), values=_json(folder / "state.json")
    )


def unique_weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """The parameters by name, a shared one under its first name only."""
    return dict(model.named_parameters())


def set_weights(model: torch.nn.Module, weights: Mapping[str, Tensor], *, origin: Path) -> None:
    """Give a model its parameters; ValueError, with the differences, when they do not fit."""
    own = unique_weights(model)
    missing, unknown = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    shapes = [
        f"{name} is {list(weights[name].shape)}, not {list(parameter.shape)}"
        for name, parameter in own.items()
        if name in weights and weights[name].shape != parameter.shape
    ]
    problems = (
        [f"{name} is missing" for name in missing]
        + [f"{name} is unknown" for name in unknown]
        + shapes
    )
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"{origin} does not fit the model of its config: {'; '.join(problems[:3])}{more}"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])


def find_model(path: str | Path) -> Path:
    """The model directory that is meant: itself, or the best checkpoint of a run.

    Raises: ValueError that says what to do.
    """
    path = Path(path)
    if (path / "best").is_symlink() and not (path / "best").exists():
        raise ValueError(f"{path / 'best'} points to a checkpoint that is gone; name another one")
    for folder in (path, path / "best", path / "last"):
        if (folder / WEIGHTS).is_file():
            return folder.resolve()
    if not path.exists():
        raise ValueError(f"there is no model at {path}; train one with make train, or name another")
    raise ValueError(
        f"{path} holds no model ({WEIGHTS} is missing); "
        "name a run with a finished checkpoint, or a model directory"
    )


def load_model(
    path: Path, *, device: torch.device, dtype: torch.dtype = torch.float32
) -> LoadedModel:
    """Read a model directory. ValueError when it is damaged or not one of this app's."""
    config = load_config(path / CONFIG)
    tokenizer = Tokenizer.load(path / TOKENIZER)
    model = Transformer(config.model, vocab_size=len(tokenizer))
    set_weights(model, load_tensors(path / WEIGHTS), origin=path / WEIGHTS)
    model.eval().to(device=device, dtype=dtype)
    return LoadedModel(
        path=path, model=model, tokenizer=tokenizer, config=config, info=_json(path / INFO)
    )


def average_weights(paths: list[Path]) -> dict[str, Tensor]:
    """The mean of the weights of several model directories."""
    assert paths
    mean = load_tensors(paths[0] / WEIGHTS)
    for path in paths[1:]:
        for name, tensor in load_tensors(path / WEIGHTS).items():
            mean[name] += tensor
    return {name: tensor / len(paths) for name, tensor in mean.items()}


def provenance() -> dict[str, Any]:
    """The code and packages at work: git revision (with + if changed since) and versions."""
    packages = ("torch", "sentencepiece", "datasets", "sacrebleu", "hydra-core", "safetensors")
    return {
        "git_revision": _git_revision(),
        "python": sys.version.split()[0],
        "packages": {name: importlib.metadata.version(name) for name in packages},
    }


def _git_revision() -> str | None:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments],
            check=True,
            capture_output=True,
            text=True,
            timeout=10,
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", "../configs")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None  # installed from an archive, or no git here


def point(link: Path, target: Path) -> None:
    """Make ``link`` a relative symbolic link to ``target``, replacing an older one in one go."""
    partial = link.with_name(f".{link.name}.{os.getpid()}")
    partial.unlink(missing_ok=True)
    partial.symlink_to(os.path.relpath(target, link.parent), target_is_directory=True)
    os.replace(partial, link)


def replace_directory(new: Path, path: Path) -> None:
    """Rename ``new`` to ``path``; what was there before is deleted after."""
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.rename(path, old)
    os.rename(new, path)
    shutil.rmtree(old, ignore_errors=True)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; the checkpoint is not complete") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: it holds no table")
    return value


def _to_disk(file: Path) -> None:
    """Wait until the disk has a file, or the names in a folder."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
