"""From a config to a trained, scored model: the whole of a training run."""

import logging
import math
import shutil
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mt.budget import settle
from mt.checkpoint import (
    TRAINER,
    WEIGHTS,
    average_weights,
    find_model,
    load_tensors,
    load_trainer_state,
    point,
    provenance,
    save_checkpoint,
    set_weights,
)
from mt.config import (
    Config,
    Device,
    EvalConfig,
    EvaluateConfig,
    FinalEval,
    Metric,
    Precision,
    Resume,
    Split,
)
from mt.corpus import Corpus, prepare
from mt.evaluate import evaluate, table
from mt.monitor import Monitor, Progress, Validation, clock, logged_to
from mt.ranks import agree, is_first, joined, largest
from mt.runs import Run, locked, open_run
from mt.runtime import Runtime, describe_machine
from mt.signals import stop_requests
from mt.trainer import StepResult, Trainer
from mt.validate import Validator

STEPS_AHEAD = 8  # that the host may be of a GPU

log = logging.getLogger(__name__)


def train(config: Config) -> Path:
    """Train a model, or go on with a training; score it; return its run directory.

    Where torchrun has started several processes, they train it together.

    Raises: ValueError for everything that the user can put right; SystemExit after Ctrl-C or
    SIGTERM, when the checkpoint is written.
    """
    with joined():
        corpus = shared_corpus(config)
        run = agree(lambda: open_run(config))
        with written_by_first(run):
            log.info("run %s", run.path)
            config, runtime, max_steps = settle(run, config, corpus)
            if agree(lambda: run.is_finished):
                log.info("it is finished already; train.resume=never starts another one")
            else:
                TrainingRun(config, run, corpus, runtime, max_steps=max_steps).complete()
            if is_first() and config.train.final_eval is not FinalEval.none:
                score(config, run, runtime)
            log.info(
                '\nTranslate with it:\n  .venv/bin/python scripts/translate.py -m %s "..."',
                run.path,
            )
    return run.path


def shared_corpus(config: Config) -> Corpus:
    """The prepared corpus: the first process makes it, where need be, and all read its files."""
    try:
        return agree(lambda: prepare(config.data, config.tokenizer))
    except FileNotFoundError as error:
        if is_first():
            raise
        raise ValueError(
            f"{error.filename} is on another machine only; start all processes in one folder "
            "that all machines share"
        ) from error


@contextmanager
def written_by_first(run: Run) -> Iterator[None]:
    """The first process holds the run's lock and logs; the others keep quiet."""
    if is_first():
        with locked(run), logged_to(run.path / "train.log"):
            yield
        return
    root = logging.getLogger("mt")
    level = root.level
    root.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        root.setLevel(level)


def score(config: Config, run: Run, runtime: Runtime) -> None:
    """Score the best checkpoint on held-out text, and show some of its translations."""
    result = evaluate(
        EvaluateConfig(
            eval=EvalConfig(
                model=str(run.path),
                split=Split[config.train.final_eval.name],
                device=Device(runtime.device.type),
                num_threads=runtime.num_threads,
            )
        )
    )
    log.info("\n%s", table(result))
    texts = find_model(run.path) / "eval" / config.train.final_eval.value
    columns = [
        texts.with_suffix(f".{kind}.txt").read_text(encoding="utf-8").split("\n")
        for kind in ("source", "reference", "hypothesis")
    ]
    numbers = range(len(columns[0]) - 1)
    handy = [line for line in numbers if 40 <= len(columns[0][line]) <= 120] or list(numbers)
    for line in dict.fromkeys(handy[len(handy) * quarter // 4] for quarter in (1, 2, 3)):
        source, reference, hypothesis = (column[line] for column in columns)
        log.info("\nsource      %s\nreference   %s\nhypothesis  %s", source, reference, hypothesis)


class TrainingRun:
    """The steps of one run, with its validations and checkpoints."""

    def __init__(
        self, config: Config, run: Run, corpus: Corpus, runtime: Runtime, *, max_steps: int
    ) -> None:
        self.config = config
        self.run = run
        self.corpus = corpus
        self.runtime = runtime
        self.max_steps = max_steps
        self.trainer = Trainer(config, corpus, runtime, max_steps=max_steps)
        self.best_score = -math.inf
        self.num_worse = 0  # validations since the best
        self.num_skipped = 0  # non-finite steps in a row
        self.steps_ahead = 0 if runtime.device.type == "cpu" else STEPS_AHEAD
        self.on_the_way: deque[StepResult] = deque()  # steps that the device may not have done
        self.seconds = 0.0  # of training, over all processes
        lengths = self.trainer.sources.lengths
        self.origin: dict[str, Any] = {  # of the weights; the same for all checkpoints
            "long_source": int(np.quantile(lengths, 0.99)) + 1,  # pieces, with EOS
            "device": str(runtime),
            "machine": describe_machine(),
            **provenance(),
        }
        self.validator = Validator(config, corpus, runtime)
        if is_first():
            for leftover in run.checkpoints.glob(".step-*"):  # of a process that was killed
                shutil.rmtree(leftover)
        if (last := agree(lambda: run.last)) is not None:
            self._restore(last)

    def complete(self) -> None:
        """Take the steps that are left, then average checkpoints if that is asked for."""
        settings = self.config.train
        trainer = self.trainer
        num_weights = sum(parameter.numel() for parameter in trainer.parameters)
        log.info(
            "%s weights, vocabulary %d, %d training pairs, %d steps, %.1f %% padding",
            f"{num_weights:,}",
            len(self.corpus.tokenizer),
            len(trainer.order.indices),
            self.max_steps,
            100 * trainer.order.padding_share(trainer.planned),
        )
        if trainer.order.num_too_long:
            log.info(
                "%d training pairs are longer than train.max_length=%d pieces; left out",
                trainer.order.num_too_long,
                settings.max_length,
            )
        if trainer.step:
            log.info("going on from step %d", trainer.step)
        monitor: Monitor | None = None
        if is_first():
            monitor = Monitor(self.run.path, first_step=trainer.step, max_steps=self.max_steps)
        results: list[StepResult] = []
        start = time.perf_counter()
        earlier_seconds, begin = self.seconds, start
        stopped_early, stopping = self._should_stop(), 0
        with stop_requests() as requests:
            while trainer.step < self.max_steps and not stopped_early and not stopping:
                self.on_the_way.append(trainer.train_step())
                last = trainer.step == self.max_steps
                # Looked at once: a later one waits for the next step.
                stopping = largest(requests[0] if requests else 0)
                validates = last or trainer.step % settings.validate_every == 0
                saves = validates or stopping or self._is_planned(trainer.step)
                results += self._arrived(0 if saves else self.steps_ahead)
                if results and (last or trainer.step % settings.log_every == 0):
                    if monitor is not None:
                        seconds = time.perf_counter() - start
                        monitor.progress(self._summary(results, seconds=seconds))
                    results, start = [], time.perf_counter()
                if saves:
                    paused = time.perf_counter()
                    if monitor is not None:
                        scores = self._validate(monitor) if validates else None
                        self.seconds = earlier_seconds + time.perf_counter() - begin
                        self._save(scores)
                    stopped_early = agree(self._should_stop)
                    start += time.perf_counter() - paused
            stopping = largest(requests[0] if requests else 0)
            if stopping:
                if monitor is not None:
                    monitor.close()
                again = "the same command"
                if settings.resume is Resume.never:
                    again = f"train.run_name={self.run.path.name} without train.resume=never"
                log.info("stopped at step %d; %s goes on from there", trainer.step, again)
                raise SystemExit(128 + stopping)
        if monitor is None:
            return
        self.seconds = earlier_seconds + time.perf_counter() - begin
        if settings.average:
            self._average(monitor)
        monitor.close()
        if stopped_early:
            log.info("no better validation for %d times: stopped early", self.num_worse)
        best = None if self.run.best is None else self.run.best.name
        log.info("trained for %s; best checkpoint %s", clock(self.seconds), best)
        self.run.write("finished.json", {"step": trainer.step, "seconds": self.seconds})

    # One step

    def _arrived(self, ahead: int) -> list[StepResult]:
        """The steps that the device has done, but for the last ``ahead``; all are looked at."""
        arrived = []
        while len(self.on_the_way) > ahead:
            result = self.on_the_way.popleft()
            self.num_skipped = self.num_skipped + 1 if result.skipped else 0
            # In fp16 the first steps overflow until the loss scale has come down, 16 halvings at
            # most.
            normal = self.runtime.precision is Precision.fp16 and self.num_skipped <= 16
            if result.skipped and not normal:
                self._report_skipped(result)
            arrived.append(result)
        return arrived

    def _report_skipped(self, result: StepResult) -> None:
        """Write down what made the loss or a gradient non-finite; give up after a few in a row."""
        name = f"nonfinite-{result.step:08d}.json"
        if is_first():
            self._write_down(result, name)
        log.warning(
            "step %d: the loss or a gradient is not finite; step skipped, its sentences are in %s",
            result.step,
            self.run.path / name,
        )
        if self.num_skipped >= self.config.train.max_skipped:
            raise ValueError(
                f"{self.num_skipped} non-finite steps in a row, the last in {self.run.path / name}."
                " Lower optim.lr, raise optim.warmup_steps, or use train.precision=fp32"
            )

    def _write_down(self, result: StepResult, name: str) -> None:
        indices = [int(index) for batch in result.batches for index in batch.indices]
        rows = self.corpus.train[indices]
        self.run.write(
            name,
            {
                "step": result.step,
                "loss": str(result.loss),
                "gradient_norm": str(result.gradient_norm),
                "learning_rate": result.learning_rate,
                "weight_norms": {
                    key: str(float(tensor.detach().norm()))
                    for key, tensor in self.trainer.weights().items()
                },
                "sentences": [
                    {"number": index, "source": source, "target": target}
                    for index, source, target in zip(
                        indices, rows["source"], rows["target"], strict=True
                    )
                ],
            },
        )

    def _summary(self, results: list[StepResult], *, seconds: float) -> Progress:
        """The steps since the last summary."""
        num_tokens = sum(result.num_tokens for result in results)
        losses = [result.loss for result in results if not result.skipped]
        kept_tokens = sum(result.num_tokens for result in results if not result.skipped)
        length_losses = [result.length_loss for result in results if not result.skipped]
        sentences = sum(result.num_sentences for result in results if not result.skipped)
        return Progress(
            step=self.trainer.step,
            loss=sum(losses) / kept_tokens if kept_tokens else math.nan,
            length_loss=sum(length_losses) / sentences if sentences else math.nan,
            gradient_norm=results[-1].gradient_norm,
            learning_rate=results[-1].learning_rate,
            tokens_per_second=num_tokens / seconds,
            padding_share=sum(result.num_padding for result in results)
            / sum(result.num_positions for result in results),
            epoch=self.trainer.epochs,
            epoch_seconds=seconds
            / len(results)
            * len(self.trainer.planned)
            / self.config.train.accumulate,
        )

    # Validation

    def _validate(self, monitor: Monitor) -> Validation:
        model = self.trainer.model_to_use()
        return self.validator.validate(model, step=self.trainer.step, monitor=monitor)

    def _should_stop(self) -> bool:
        patience = self.config.train.patience
        return patience is not None and self.num_worse >= patience

    # Checkpoints

    def _save(self, scores: Validation | None) -> None:
        """Write a checkpoint; point ``best`` and ``last`` to it; delete what is not kept."""
        path = self.run.checkpoint(self.trainer.step)
        is_best = scores is not None and self._is_best(scores)
        state = self.trainer.state()
        state.values.update(
            best_score=self.best_score,
            num_worse=self.num_worse,
            num_skipped=self.num_skipped,
            seconds=self.seconds,
        )
        save_checkpoint(
            path,
            weights=self.trainer.weights(),
            tokenizer=self.corpus.tokenizer,
            config=self.config,
            info=self._info(scores),
            trainer=state,
        )
        if is_best:
            point(self.run.path / "best", path)
        point(self.run.path / "last", path)
        point(self.run.path.parent / "last", self.run.path)
        self._prune()

    def _is_best(self, scores: Validation) -> bool:
        value = {Metric.loss: -scores.loss, Metric.bleu: scores.bleu, Metric.chrf: scores.chrf}[
            self.config.train.metric
        ]
        assert value is not None
        if value > self.best_score:
            self.best_score, self.num_worse = value, 0
            return True
        self.num_worse += 1
        return False

    def _info(self, scores: Validation | None) -> dict[str, Any]:
        data = self.config.data
        return {
            "step": self.trainer.step,
            "epochs": round(self.trainer.epochs, 3),
            "seconds": round(self.seconds, 1),
            "valid_loss": scores.loss if scores else None,
            "valid_bleu": scores.bleu if scores else None,
            "valid_chrf": scores.chrf if scores else None,
            "source_lang": data.source_lang,
            "target_lang": data.target_lang,
            "corpus": str(self.corpus.path),
            "corpus_fingerprint": self.corpus.fingerprint,
            "num_leaked": self.corpus.num_leaked,
            **self.origin,
        }

    def _is_planned(self, step: int) -> bool:
        """Whether a step has a checkpoint in every run; others come from being stopped."""
        settings = self.config.train
        return (
            step % settings.save_every == 0
            or step % settings.validate_every == 0
            or step == self.max_steps
        )

    def _planned(self) -> list[Path]:
        """The planned checkpoints up to now, oldest first."""
        steps = range(1, self.trainer.step + 1)
        paths = [self.run.checkpoint(step) for step in steps if self._is_planned(step)]
        return [path for path in paths if path.exists()]

    def _prune(self) -> None:
        """Delete what is not kept: so, too, what a killed or stopped process left beside it."""
        last = self.run.last
        kept = {
            last,
            self.run.best,
            *(p.resolve() for p in self._planned()[-self.config.train.keep :]),
        }
        for path in self.run.checkpoints.glob("step-*"):
            if path.resolve() not in kept:
                gone = path.rename(path.with_name(f".{path.name}.old"))
                shutil.rmtree(gone, ignore_errors=True)
            elif path.resolve() != last:
                shutil.rmtree(path / TRAINER, ignore_errors=True)

    def _restore(self, path: Path) -> None:
        state = load_trainer_state(path)
        self.trainer.restore(state, weights=load_tensors(path / WEIGHTS), origin=path)
        self.best_score = state.values["best_score"]
        self.num_worse = state.values["num_worse"]
        self.num_skipped = state.values["num_skipped"]
        self.seconds = state.values["seconds"]

    def _average(self, monitor: Monitor) -> None:
        """Average the last checkpoints; the result is the best one if it validates best."""
        paths = self._planned()[-self.config.train.average :]
        log.info("averaging %s", ", ".join(path.name for path in paths))
        weights = average_weights(paths)
        self.trainer.average = None
        set_weights(self.trainer.model, weights, origin=paths[-1])
        scores = self._validate(monitor)
        path = self.run.checkpoints / "averaged"
        is_best = self._is_best(scores)
        save_checkpoint(
            path,
            weights=weights,
            tokenizer=self.corpus.tokenizer,
            config=self.config,
            info=self._info(scores),
        )
        if is_best:
            point(self.run.path / "best", path)
