"""Run directories: their names, who may write, and whether to begin, go on or stay away.

::

    runs/<name>/config.yaml              all settings
    runs/<name>/resolved.json            what ``auto`` and ``max_minutes`` came to
    runs/<name>/checkpoints/step-...     model directories
    runs/<name>/best, last               links to two of them
    runs/<name>/tensorboard/, train.log
    runs/last                            a link to the run with the newest checkpoint
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mt.config import Config, Resume, config_hash, differences, load_config, save_config


class Run:
    """One run directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def checkpoints(self) -> Path:
        """The folder of the numbered checkpoints."""
        return self.path / "checkpoints"

    @property
    def last(self) -> Path | None:
        """The newest checkpoint, None before the first."""
        return self._linked("last")

    @property
    def best(self) -> Path | None:
        """The checkpoint that validated best, None before the first validation."""
        return self._linked("best")

    def _linked(self, name: str) -> Path | None:
        link = self.path / name
        return link.resolve() if link.exists() else None

    @property
    def is_finished(self) -> bool:
        """Whether its training came to its end."""
        return (self.path / "finished.json").exists()

    def checkpoint(self, step: int) -> Path:
        """The directory of a step's checkpoint."""
        return self.checkpoints / f"step-{step:08d}"

    def resolved(self) -> dict[str, Any] | None:
        """What was resolved before the first step, None before that."""
        file = self.path / "resolved.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def write(self, name: str, value: dict[str, Any]) -> None:
        """Write a JSON file, whole or not at all."""
        partial = self.path / f".{name}.partial"
        partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(partial, self.path / name)


def open_run(config: Config) -> Run:
    """The run that a config asks for: a new one, or one to go on with.

    Raises: ValueError when a run of that name exists and was made with other settings.
    """
    folder = Path(config.train.runs_dir)
    name = config.train.run_name or run_name(config)
    run = Run(folder / name)
    if config.train.resume is Resume.never:
        number = 1
        while run.path.exists():
            number += 1
            run = Run(folder / f"{name}-{number}")
    saved = run.path / "config.yaml"
    if saved.exists():
        if changes := differences(load_config(saved), config):
            raise ValueError(
                f"{run.path} was made with other settings:\n  "
                + "\n  ".join(changes)
                + "\nuse those settings, another train.run_name, or train.resume=never"
            )
    else:
        run.path.mkdir(parents=True, exist_ok=True)
        partial = run.path / f".config.yaml.{os.getpid()}"
        save_config(config, partial)
        os.replace(partial, saved)
    return run


def run_name(config: Config) -> str:
    """Corpus, pair, model, and a hash of every setting that shapes the result."""
    data = config.data
    return (
        f"{data.name}-{data.source_lang}-{data.target_lang}-{config.model.name}"
        f"-{config_hash(config)}"
    )


@contextmanager
def locked(run: Run) -> Iterator[None]:
    """Hold the run's lock, which the system frees even when the process is killed.

    Raises: ValueError when another process holds it.
    """
    with (run.path / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"process {file.read().strip() or 'unknown'} is writing to {run.path}; "
                "wait for it, stop it, or use another train.run_name"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
