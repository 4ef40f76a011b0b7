"""Decoding speed: a fixed amount of work for random weights, real text for a trained model."""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench_machine import median_ratio, seconds_of
from mt.config import ModelConfig, Precision
from mt.model import Transformer
from mt.runtime import DTYPES, Runtime
from mt.search import Hypothesis, beam_search
from mt.tokenizer import EOS, UNK

TRIAL = 1.0  # seconds for each precision and attention, to choose the best one


def random_sources(num_sentences: int, *, length: int, vocab_size: int, seed: int = 1) -> Tensor:
    """Sentences [B, S] of random pieces and EOS, all of the same length."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(UNK + 1, vocab_size, (num_sentences, length), generator=generator)
    ids[:, -1] = EOS
    return ids


class OurDecoding:
    """A model with random weights, which never ends a sentence before its bound."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        vocab_size: int,
        device: torch.device,
        precision: Precision,
    ) -> None:
        torch.manual_seed(1)
        self.model = Transformer(config, vocab_size=vocab_size).eval()
        with torch.no_grad():
            # The states' mean is 0 before and 1 after this; so the logit of EOS is -30 D.
            self.model.decoder_norm.bias.fill_(1.0)
            self.model.output_table[EOS] = -30.0
        self.model.to(device=device, dtype=DTYPES[precision])
        self.device = device
        self.precision = precision

    @torch.inference_mode()
    def run(self, source: Tensor, *, beam_size: int, length: int) -> list[list[Hypothesis]]:
        """Translate source [B, S] into ``length`` pieces each, EOS included."""
        source = source.to(self.device)
        mask = torch.ones_like(source, dtype=torch.bool)
        memory = self.model.encode(source, mask)
        bounds = torch.full((len(source),), length, device=self.device)
        return beam_search(
            self.model.start(memory, mask),
            max_lengths=bounds,
            beam_size=beam_size,
            length_penalty=1.0,
        )


def repeat(work: Callable[[], object], device: torch.device, *, seconds: float) -> list[float]:
    """How long each call takes; as many as fill ``seconds``."""
    times = [seconds_of(work, device)]
    while sum(times) < seconds:
        times.append(seconds_of(work, device))
    return times


def measure_decoding(
    config: ModelConfig,
    runtime: Runtime,
    *,
    vocab_size: int,
    batch_size: int,
    beam_size: int,
    length: int,
    with_peer: bool,
    num_rounds: int,
    seconds: float,
) -> dict[str, Any]:
    """Decode by turns, ours and the peer, every sentence from and into ``length`` pieces.

    A turn is one call of each, repeated for ``seconds``; there are ``num_rounds`` at least.
    """
    source = random_sources(batch_size, length=length, vocab_size=vocab_size)
    precisions = [Precision.fp32, Precision.bf16]

    def ours(precision: Precision) -> Callable[[], object]:
        decoding = OurDecoding(
            config, vocab_size=vocab_size, device=runtime.device, precision=precision
        )
        return lambda: decoding.run(source, beam_size=beam_size, length=length)

    choices: dict[str, dict[str, Callable[[], object]]] = {
        "ours": {precision.value: ours(precision) for precision in precisions}
    }
    if with_peer:
        from bench_peer import (  # the only room that needs the optional packages
            ATTENTIONS,
            PeerDecoding,
        )

        choices["peer"] = {}
        for precision in precisions:
            for attention in ATTENTIONS:
                decoding = PeerDecoding(
                    config,
                    vocab_size=vocab_size,
                    device=runtime.device,
                    precision=precision,
                    attention=attention,
                )
                choices["peer"][f"{precision.value} {attention}"] = decoding.work(
                    source, beam_size=beam_size, length=length
                )

    result: dict[str, Any] = {"batch_size": batch_size, "beam_size": beam_size, "length": length}
    best: dict[str, Callable[[], object]] = {}
    for name, works in choices.items():
        trials = {}
        for choice, work in works.items():
            work()  # compiles kernels
            trials[choice] = statistics.median(repeat(work, runtime.device, seconds=TRIAL))
        choice = min(trials, key=lambda choice: trials[choice])
        best[name] = works[choice]
        result[name] = {"choice": choice, "trials": trials}

    times: dict[str, list[float]] = {name: [] for name in best}
    spent = 0.0
    while len(times["ours"]) < num_rounds or spent < seconds:
        for name, work in best.items():
            times[name].append(seconds_of(work, runtime.device))
            spent += times[name][-1]
    for name in best:
        median = statistics.median(times[name])
        result[name] |= {
            "seconds": median,
            "sentences_per_second": batch_size / median,
            "tokens_per_second": batch_size * length / median,
            "num_calls": len(times[name]),
        }
    if with_peer:
        result["peer"]["name"] = PeerDecoding.NAME
        result["ratio"] = median_ratio(times["peer"], times["ours"])  # of seconds: upside down
    return result
