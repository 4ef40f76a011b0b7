"""Training speed: tokens a second, padding, memory, and the share of the machine's limit."""

import dataclasses
import statistics
import time
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from benchmarks.elsewhere import Elsewhere
from benchmarks.machine import (
    STEPS_AHEAD,
    forget_peak_memory,
    median_ratio,
    peak_memory,
    product_rate,
    synchronize,
)
from mt.batching import Sequences
from mt.config import Activation, Config, ModelConfig, Optimizer, Precision
from mt.corpus import Corpus
from mt.runtime import DTYPES, Runtime, resolve
from mt.trainer import Trainer


@dataclass(frozen=True, slots=True)
class Turn:
    """Some optimizer steps, one after the other."""

    seconds: float
    num_tokens: int  # target pieces, without padding
    num_positions: int  # source and target, with padding
    num_padding: int

    @property
    def speed(self) -> float:
        """Target tokens a second."""
        return self.num_tokens / self.seconds


class Side(Protocol):
    """Someone who trains by turns."""

    precision: Precision

    def run(self, seconds: float) -> Turn:
        """Train for so long, then to the end of the step."""
        ...


class OurTraining:
    """The app's own trainer."""

    def __init__(self, config: Config, corpus: Corpus, runtime: Runtime) -> None:
        self.trainer = Trainer(config, corpus, runtime, max_steps=None)
        self.device = runtime.device
        self.precision = runtime.precision
        self.num_steps = 0

    def run(self, seconds: float) -> Turn:
        """Train for so long, then to the end of the step."""
        results = []
        synchronize(self.device)
        start = time.perf_counter()
        while not results or time.perf_counter() - start < seconds:
            results.append(self.trainer.train_step())
            if len(results) % STEPS_AHEAD == 0:
                synchronize(self.device)
        synchronize(self.device)
        self.num_steps += len(results)
        return Turn(
            seconds=time.perf_counter() - start,
            num_tokens=sum(result.num_tokens for result in results),
            num_positions=sum(result.num_positions for result in results),
            num_padding=sum(result.num_padding for result in results),
        )


class PeerElsewhere(Elsewhere):
    """The peer, in a process of its own."""

    @property
    def precision(self) -> Precision:
        """That of its matrix products."""
        return self.call("precision")

    def run(self, seconds: float) -> Turn:
        """Train for so long, then to the end of the step."""
        return self.call("run", seconds)


def fitting_lengths(config: Config, corpus: Corpus) -> tuple[np.ndarray, np.ndarray]:
    """The lengths, with EOS, of the sources and targets that are trained on."""
    source, target = (
        Sequences(corpus.train.data.column(name).chunks).lengths + 1
        for name in ("source_ids", "target_ids")
    )
    fits = np.maximum(source, target) <= config.train.max_length
    return source[fits], target[fits]


def training_flops(
    model: ModelConfig,
    *,
    vocab_size: int,
    source_lengths: np.ndarray,
    target_lengths: np.ndarray,
) -> float:
    """What training on these sentences once costs, in floating-point operations.

    Six for each weight that a piece meets (two forward, four backward), and the two products of
    each attention, a causal one in full (Chowdhery et al. 2022, app. B). Padding, embedding
    lookups, biases, norms and the length head do not count.

    Lengths [N] are in pieces, with EOS, one a sentence.
    """
    source = np.asarray(source_lengths, dtype=np.float64)
    target = np.asarray(target_lengths, dtype=np.float64)
    square = model.dim**2
    ffn = model.dim * model.ffn_dim * (3 if model.activation is Activation.swiglu else 2)
    encoder = model.encoder_layers * (4 * square + ffn)
    cross = model.decoder_layers * 2 * square  # the decoder's maps of the source: keys, values
    decoder = model.decoder_layers * (6 * square + ffn) + model.dim * vocab_size
    weights = (encoder + cross) * source.sum() + decoder * target.sum()
    scores = model.encoder_layers * (source**2).sum()
    scores += model.decoder_layers * ((target**2).sum() + (source * target).sum())
    # Q Kᵀ and weights V: for each score and dimension one multiplication and addition each.
    return float(6 * weights + 6 * 2 * model.dim * scores)


def measure_training(
    config: Config,
    corpus: Corpus,
    *,
    with_peer: bool,
    peer_choice: str | None = None,
    num_rounds: int,
    seconds: float,
    warm_up: float,
) -> dict[str, Any]:
    """Train by turns: ours, the peer, ours with Muon, and again. A turn lasts ``seconds``.

    ``peer_choice`` is the peer's precision and attention ("bf16 eager"); None: try all.

    Raises: ValueError for train.batch_tokens=auto, which would be another work on each machine.
    """
    settings = config.train
    if not isinstance(settings.batch_tokens, int):
        raise ValueError("a benchmark needs a number: train.batch_tokens=4096")
    runtime = resolve(
        device=settings.device, precision=settings.precision, num_threads=settings.num_threads
    )
    source_lengths, target_lengths = fitting_lengths(config, corpus)
    flops = training_flops(
        config.model,
        vocab_size=len(corpus.tokenizer),
        source_lengths=source_lengths,
        target_lengths=target_lengths,
    ) / float(target_lengths.sum())

    forget_peak_memory(runtime.device)
    ours = OurTraining(config, corpus, runtime)
    ours.run(warm_up)
    memory = peak_memory(runtime.device)  # before the others are in it
    sides: dict[str, Side] = {"ours": ours}
    if with_peer:
        from benchmarks.peer import NAME, PeerTraining  # needs the optional packages

        steps_an_epoch = ours.num_steps / ours.trainer.epochs
        peer = PeerElsewhere(
            PeerTraining.best,
            num_threads=runtime.num_threads,
            config=config,
            corpus=corpus,
            runtime=runtime,
            batch_size=round(len(target_lengths) / steps_an_epoch),
            choice=peer_choice,
        )
        peer.run(warm_up)
        sides["peer"] = peer
    if config.optim.algorithm is not Optimizer.muon:
        optim = dataclasses.replace(config.optim, algorithm=Optimizer.muon)
        muon = OurTraining(dataclasses.replace(config, optim=optim), corpus, runtime)
        muon.run(warm_up)
        sides["muon"] = muon

    turns: dict[str, list[Turn]] = {name: [] for name in sides}
    # One limit for all sides of a precision: a product's rate varies more than theirs do.
    limits: dict[Precision, list[float]] = {side.precision: [] for side in sides.values()}
    for _ in range(num_rounds):
        for name, side in sides.items():
            turns[name].append(side.run(seconds))
            rate = product_rate(DTYPES[side.precision], runtime.device)
            limits[side.precision].append(rate)

    subject = (
        f"{config.model.name}, {config.data.name}, {len(corpus.tokenizer)} pieces, "
        f"batches of {settings.batch_tokens * settings.accumulate}, {config.optim.algorithm.value}"
    )
    row: dict[str, Any] = {
        "kind": "train",
        "name": f"train: {subject}, {runtime.device.type}",
        "subject": subject,
        "device": str(runtime),
        "flops_per_token": flops,
    }
    for name, side in sides.items():
        speed = statistics.median(turn.speed for turn in turns[name])
        limit = statistics.median(limits[side.precision])
        row[name] = {
            "precision": side.precision.value,
            "tokens_per_second": speed,
            "padding_share": sum(turn.num_padding for turn in turns[name])
            / sum(turn.num_positions for turn in turns[name]),
            "limit": limit,  # FLOP/s
            "share_of_limit": speed * flops / limit,
            "turns": [turn.speed for turn in turns[name]],
        }
    row["ours"]["peak_memory"] = memory
    if with_peer:
        row["peer"] |= {"library": NAME, "batch_size": peer.call("batch_size")}
        row["peer"] |= {name: peer.call(name) for name in ("choice", "trials")}
        peer.close()
        row["ratio"] = median_ratio(row["ours"]["turns"], row["peer"]["turns"])
    return row
