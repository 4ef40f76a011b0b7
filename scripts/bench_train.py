"""Training speed: target tokens a second, padding, memory, and the share of the machine's limit."""

import dataclasses
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench_machine import median_ratio, peak_memory, product_rate, synchronize
from mt.config import Activation, Config, ModelConfig, Optimizer
from mt.corpus import Corpus
from mt.runtime import DTYPES, Runtime
from mt.trainer import Trainer


@dataclass(frozen=True, slots=True)
class Round:
    """Some optimizer steps, one after the other."""

    seconds: float
    num_steps: int
    num_sentences: int
    num_tokens: int  # target pieces, without padding
    num_positions: int  # source and target, with padding
    num_padding: int

    @property
    def speed(self) -> float:
        """Target tokens a second."""
        return self.num_tokens / self.seconds


class OurTraining:
    """The app's own trainer, a few steps at a time."""

    def __init__(self, config: Config, corpus: Corpus, runtime: Runtime) -> None:
        self.trainer = Trainer(config, corpus, runtime, max_steps=None)
        self.device = runtime.device

    def run(self, seconds: float) -> Round:
        """Train for so long, then to the end of the step."""
        results = []
        synchronize(self.device)
        start = time.perf_counter()
        while not results or time.perf_counter() - start < seconds:
            results.append(self.trainer.train_step())
        synchronize(self.device)
        return Round(
            seconds=time.perf_counter() - start,
            num_steps=len(results),
            num_sentences=sum(result.num_sentences for result in results),
            num_tokens=sum(result.num_tokens for result in results),
            num_positions=sum(result.num_positions for result in results),
            num_padding=sum(result.num_padding for result in results),
        )


def training_flops(
    model: ModelConfig,
    *,
    vocab_size: int,
    source_lengths: Sequence[int] | np.ndarray,
    target_lengths: Sequence[int] | np.ndarray,
) -> float:
    """What training on these sentences costs once, in floating-point operations.

    Six for each weight that a piece meets (two forward, four backward), and the attention's two
    products, causal ones in full (Chowdhery et al. 2022, app. B). Padding, embedding lookups,
    biases, norms and the length head do not count.

    Lengths are in pieces, with EOS, one a sentence.
    """
    source = np.asarray(source_lengths, dtype=np.float64)
    target = np.asarray(target_lengths, dtype=np.float64)
    square = model.dim**2
    ffn = model.dim * model.ffn_dim * (3 if model.activation is Activation.swiglu else 2)
    encoder = model.encoder_layers * (4 * square + ffn)
    cross_keys = model.decoder_layers * 2 * square  # the decoder's maps that read the source
    decoder = model.decoder_layers * (6 * square + ffn) + model.dim * vocab_size
    weights = (encoder + cross_keys) * source.sum() + decoder * target.sum()
    scores = model.encoder_layers * (source**2).sum()
    scores += model.decoder_layers * ((target**2).sum() + (source * target).sum())
    # Q Kᵀ and weights · V: two multiplications and two additions for each score and dimension.
    return float(6 * weights + 3 * 4 * model.dim * scores)


def flops_per_token(config: Config, corpus: Corpus) -> float:
    """The training FLOPs for each target piece, on average over the training text."""
    source, target = (
        corpus.train.data.column(name).combine_chunks().value_lengths().to_numpy() + 1  # EOS
        for name in ("source_ids", "target_ids")
    )
    fits = np.maximum(source, target) <= config.train.max_length
    flops = training_flops(
        config.model,
        vocab_size=len(corpus.tokenizer),
        source_lengths=source[fits],
        target_lengths=target[fits],
    )
    return flops / float(target[fits].sum())


def measure_training(
    config: Config,
    corpus: Corpus,
    runtime: Runtime,
    *,
    with_peer: bool,
    peer_choice: str | None,
    num_rounds: int,
    seconds: float,
    warm_up: float,
) -> dict[str, Any]:
    """Train by turns: ours, the peer, ours with Muon, and again. A turn lasts ``seconds``.

    ``peer_choice`` is the peer's precision and attention ("bf16 eager"); None: try all.
    """
    flops = flops_per_token(config, corpus)
    ours = OurTraining(config, corpus, runtime)
    first = ours.run(warm_up)
    memory = peak_memory(runtime.device)  # before anything else is in it

    sides: dict[str, Any] = {"ours": ours}
    precisions = {"ours": runtime.precision}
    if with_peer:
        from bench_peer import PeerTraining  # the only room that needs the optional packages

        peer = PeerTraining.best(
            config,
            corpus,
            runtime,
            batch_size=round(first.num_sentences / first.num_steps),
            choice=peer_choice,
        )
        peer.run(warm_up)
        sides["peer"] = peer
        precisions["peer"] = peer.precision
    if config.optim.algorithm is not Optimizer.muon:
        optim = dataclasses.replace(config.optim, algorithm=Optimizer.muon)
        muon = OurTraining(dataclasses.replace(config, optim=optim), corpus, runtime)
        muon.run(warm_up)
        sides["ours, Muon"] = muon
        precisions["ours, Muon"] = runtime.precision

    rounds: dict[str, list[Round]] = {name: [] for name in sides}
    limits: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(num_rounds):
        for name, side in sides.items():
            rounds[name].append(side.run(seconds))
            limits[name].append(product_rate(DTYPES[precisions[name]], runtime.device))

    result: dict[str, Any] = {"flops_per_token": flops}
    for name in sides:
        speed = statistics.median(part.speed for part in rounds[name])
        limit = statistics.median(limits[name])
        result[name] = {
            "precision": precisions[name].value,
            "tokens_per_second": speed,
            "tokens_per_step": sum(part.num_tokens for part in rounds[name])
            / sum(part.num_steps for part in rounds[name]),
            "padding_share": sum(part.num_padding for part in rounds[name])
            / sum(part.num_positions for part in rounds[name]),
            "machine_flops": limit,
            "share_of_machine": speed * flops / limit,
            "rounds": [part.speed for part in rounds[name]],
        }
    result["ours"]["peak_memory"] = memory
    result["ours"]["optimizer"] = config.optim.algorithm.value
    if with_peer:
        result["peer"] |= {"name": peer.NAME, "attention": peer.attention, "trials": peer.trials}
        result["ratio"] = median_ratio(result["ours"]["rounds"], result["peer"]["rounds"])
    return result
