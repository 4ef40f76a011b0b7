"""What is settled before the first step of a run: device, precision, threads, number of steps."""

import logging
import math
import time

from mt.config import Config, Device, Precision
from mt.corpus import Corpus
from mt.runs import Run
from mt.runtime import Runtime, resolve
from mt.trainer import Trainer

DEFAULT_STEPS = 5000  # where no budget is given
VALID_SHARE = 0.07  # of train.max_minutes: what validations and checkpoints take, about

log = logging.getLogger(__name__)


def settle(run: Run, config: Config, corpus: Corpus) -> tuple[Runtime, int]:
    """Resolve what is ``auto``, and the number of steps; once a run, saved before its first step.

    Raises: ValueError when the corpus is not the one that the run began with.
    """
    saved = run.resolved()
    if saved is not None:
        if saved["corpus"] != corpus.fingerprint:
            raise ValueError(
                f"{run.path} began with other training text (its files have changed); "
                "put the old text back, or use train.resume=never"
            )
        try:
            runtime = resolve(
                device=Device(saved["device"]),
                precision=Precision(saved["precision"]),
                num_threads=saved["num_threads"],
            )
        except ValueError as error:
            raise ValueError(
                f"{run.path} was begun on {saved['device']}: {error}; go on there, or start "
                "another run with train.resume=never"
            ) from error
        log.info("device %s", runtime)
        return runtime, saved["max_steps"]
    settings = config.train
    runtime = resolve(
        device=settings.device, precision=settings.precision, num_threads=settings.num_threads
    )
    log.info("device %s", runtime)
    max_steps = count_steps(config, corpus, runtime)
    run.write(
        "resolved.json",
        {
            "device": runtime.device.type,
            "precision": runtime.precision.value,
            "num_threads": runtime.num_threads,
            "max_steps": max_steps,
            "corpus": corpus.fingerprint,
        },
    )
    return runtime, max_steps


def count_steps(config: Config, corpus: Corpus, runtime: Runtime) -> int:
    """The steps that ``max_steps``, ``max_epochs`` and ``max_minutes`` allow.

    For ``max_minutes`` a throwaway model takes some steps first, to see how long they last.
    """
    settings = config.train
    limits: dict[str, int] = {}
    if settings.max_steps is not None:
        limits["max_steps"] = settings.max_steps
    if settings.max_epochs is not None or settings.max_minutes is not None:
        trial = Trainer(config, corpus, runtime, max_steps=None)
        if settings.max_epochs is not None:
            steps_an_epoch = len(trial.planned) / settings.accumulate
            limits["max_epochs"] = math.ceil(settings.max_epochs * steps_an_epoch)
        if settings.max_minutes is not None:
            seconds = step_seconds(trial)
            budget = settings.max_minutes * 60 * (1 - VALID_SHARE)
            limits["max_minutes"] = max(1, int(budget / seconds))
            log.info("a step takes %.0f ms", 1000 * seconds)
    if not limits:
        return DEFAULT_STEPS
    name = min(limits, key=lambda name: limits[name])
    log.info("train.%s=%g allows %d steps", name, getattr(settings, name), limits[name])
    return limits[name]


def step_seconds(trial: Trainer, *, warm_up: float = 5.0, measured: float = 10.0) -> float:
    """The mean duration of a step, after some that compile kernels and fill caches."""
    start = time.perf_counter()
    while time.perf_counter() - start < warm_up:
        trial.train_step()
    steps, start = 0, time.perf_counter()
    while time.perf_counter() - start < measured or steps < 5:
        trial.train_step()
        steps += 1
    return (time.perf_counter() - start) / steps
