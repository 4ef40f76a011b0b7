"""What is settled before the first step of a run: device, precision, threads, number of steps."""

import dataclasses
import logging
import math
import time

from mt.config import AUTO, Config, Device, Precision
from mt.corpus import Corpus
from mt.preflight import largest_batch_tokens, rehearse, with_batch_tokens
from mt.ranks import agree, is_first, world_size
from mt.runs import Run
from mt.runtime import Runtime, resolve
from mt.trainer import Trainer

DEFAULT_STEPS = 5000  # where no budget is given
VALID_SHARE = 0.07  # of train.max_minutes: what validations and checkpoints take, about

log = logging.getLogger(__name__)


def settle(run: Run, config: Config, corpus: Corpus) -> tuple[Config, Runtime, int]:
    """Resolve what is ``auto``, and the number of steps; once a run, saved before its first step.

    All processes come to the same, but for their own threads and GPU. The config that is returned
    has a number for ``train.batch_tokens``.

    Raises: ValueError when the corpus is not the one that the run began with, or a batch does not
    fit into memory.
    """
    saved = agree(run.resolved)
    settings = config.train
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
                # Other processes than then share the machine in another way.
                num_threads=saved["num_threads"]
                if saved.get("num_processes", 1) == world_size()
                else settings.num_threads,
            )
        except ValueError as error:
            raise ValueError(
                f"{run.path} was begun on {saved['device']}: {error}; go on there, or start "
                "another run with train.resume=never"
            ) from error
        log.info("device %s", runtime)
        tokens = saved.get("batch_tokens", settings.batch_tokens)
        return with_batch_tokens(config, tokens), runtime, saved["max_steps"]
    runtime = resolve(
        device=settings.device, precision=settings.precision, num_threads=settings.num_threads
    )
    device, precision = agree(lambda: (runtime.device.type, runtime.precision))
    if device != runtime.device.type:
        raise ValueError(
            f"one process found {device}, another {runtime.device.type}; set train.device"
        )
    runtime = dataclasses.replace(runtime, precision=precision)
    log.info("device %s", runtime)
    if settings.batch_tokens == AUTO:
        tokens = agree(lambda: largest_batch_tokens(config, corpus, runtime))
        config = with_batch_tokens(config, tokens)
    max_steps = count_steps(config, corpus, runtime)
    if is_first():
        run.write(
            "resolved.json",
            {
                "device": runtime.device.type,
                "precision": runtime.precision.value,
                "num_threads": runtime.num_threads,
                "num_processes": runtime.world_size,
                "batch_tokens": config.train.batch_tokens,
                "max_steps": max_steps,
                "corpus": corpus.fingerprint,
            },
        )
    return config, runtime, max_steps


def count_steps(config: Config, corpus: Corpus, runtime: Runtime) -> int:
    """The steps that ``max_steps``, ``max_epochs`` and ``max_minutes`` allow.

    A throwaway model takes some steps first: on the longest batches, to see that they fit into
    memory, and for ``max_minutes`` on others, to see how long they last.
    """
    settings = config.train
    limits: dict[str, int] = {}
    trial = Trainer(config, corpus, runtime, max_steps=None)
    rehearse(trial)
    if settings.max_steps is not None:
        limits["max_steps"] = settings.max_steps
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
    """The mean duration of a step, after some that compile kernels and fill caches.

    The first process's clock decides for all: they must take the same number of steps.
    """
    start = time.perf_counter()
    while agree(lambda: time.perf_counter() - start < warm_up):
        trial.train_step()
    steps, begin = 0, time.perf_counter()
    while agree(lambda: time.perf_counter() - begin < measured) or steps < 5:
        trial.train_step()
        steps += 1
    return agree(lambda: (time.perf_counter() - begin) / steps)
