"""Decoding speed: a fixed amount of work for random weights, real text for a trained model."""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.elsewhere import Elsewhere
from benchmarks.machine import median_ratio, seconds_of
from mt.config import Config, Device, ModelConfig, Precision
from mt.model import Transformer
from mt.packed import can_pack, for_inference
from mt.runtime import Runtime, resolve
from mt.search import Hypothesis, beam_search
from mt.tokenizer import EOS, UNK
from mt.translate import Translator

TRIAL = 1.0  # seconds for each precision and attention, to choose the best one


def random_sources(num_sentences: int, *, length: int, vocab_size: int) -> Tensor:
    """Sentences [B, S] of random pieces and EOS, all of the same length."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(UNK + 1, vocab_size, (num_sentences, length), generator=generator)
    ids[:, -1] = EOS
    return ids


class OurDecoding:
    """A model with random weights that never ends a sentence before its bound."""

    def __init__(self, config: ModelConfig, runtime: Runtime, *, vocab_size: int) -> None:
        torch.manual_seed(1)
        model = Transformer(config, vocab_size=vocab_size).eval()
        with torch.no_grad():
            # The elements of a state have mean 1 with this, so that EOS has the logit -30 D.
            model.decoder_norm.bias.fill_(1.0)
            model.output_table[EOS] = -30.0
        # Laid out as the Translator's is.
        dtype = torch.float32 if can_pack(runtime) else runtime.dtype
        self.model = for_inference(model.to(device=runtime.device, dtype=dtype), runtime)
        self.device = runtime.device

    @torch.inference_mode()
    def run(self, source: Tensor, *, beam_size: int, length: int) -> list[list[Hypothesis]]:
        """Translate source [B, S] into ``length`` pieces each, EOS included."""
        source = source.to(self.device)
        mask = torch.ones_like(source, dtype=torch.bool)
        return beam_search(
            self.model.start(self.model.encode(source, mask), mask),
            max_lengths=torch.full((len(source),), length, device=self.device),
            beam_size=beam_size,
            length_penalty=1.0,
        )


def measure_decoding(
    config: Config,
    *,
    batch_size: int,
    beam_size: int,
    length: int,
    dtypes: Sequence[str],
    with_peer: bool,
    num_rounds: int,
    seconds: float,
) -> dict[str, Any]:
    """Decode by turns, ours and the peer, each sentence from and into ``length`` pieces.

    A turn is one call; there are so many that they fill ``seconds``, ``num_rounds`` at least.
    Of each side's precisions and attentions the fastest is taken.
    """
    settings = config.train
    runtime = resolve(
        device=settings.device, precision=settings.precision, num_threads=settings.num_threads
    )
    vocab_size, device = config.tokenizer.vocab_size, runtime.device
    source = random_sources(batch_size, length=length, vocab_size=vocab_size)

    def ours(dtype: str) -> Callable[[], object]:
        variant = dataclasses.replace(runtime, precision=Precision[dtype])
        decoding = OurDecoding(config.model, variant, vocab_size=vocab_size)
        return lambda: decoding.run(source, beam_size=beam_size, length=length)

    choices = {"ours": {dtype: ours(dtype) for dtype in dtypes}}
    if with_peer:
        from benchmarks.peer import NAME, PeerDecoding  # needs the optional packages

        peer = Elsewhere(
            PeerDecoding,
            num_threads=runtime.num_threads,
            config=config.model,
            source=source,
            vocab_size=vocab_size,
            device=device,
            beam_size=beam_size,
            length=length,
        )
        choices["peer"] = {
            choice: partial(peer.call, "run", choice) for choice in peer.call("choices")
        }

    subject = f"{config.model.name}, {vocab_size} pieces, sentences of {length}"
    row: dict[str, Any] = {
        "kind": "decode",
        "name": f"decode: {subject}, batch {batch_size}, beam {beam_size}, {device.type}",
        "subject": subject,
        "device": str(runtime),
        "batch_size": batch_size,
        "beam_size": beam_size,
    }
    best: dict[str, Callable[[], object]] = {}
    for side, works in choices.items():
        trials = {choice: _trial(work, device) for choice, work in works.items()}
        choice = min(trials, key=lambda choice: trials[choice])
        best[side] = works[choice]
        row[side] = {"choice": choice, "trials": trials}

    times: dict[str, list[float]] = {side: [] for side in best}
    while len(times["ours"]) < num_rounds or sum(map(sum, times.values())) < seconds:
        for side, work in best.items():
            times[side].append(seconds_of(work, device))
    for side in best:
        median = statistics.median(times[side])
        row[side] |= {
            "seconds": median,  # a batch
            "sentences_per_second": batch_size / median,
            "tokens_per_second": batch_size * length / median,
            "num_calls": len(times[side]),
        }
    if with_peer:
        row["peer"]["library"] = NAME
        peer.close()
        row["ratio"] = median_ratio(times["peer"], times["ours"])  # of seconds, so upside down
    return row


def _trial(work: Callable[[], object], device: torch.device) -> float:
    """The median seconds of a call, after one that compiles kernels."""
    work()
    times = [seconds_of(work, device)]
    while sum(times) < TRIAL:
        times.append(seconds_of(work, device))
    return statistics.median(times)


def measure_model(
    path: str, text: Path, *, batch_size: int, beam_size: int, dtypes: Sequence[str]
) -> dict[str, Any]:
    """Translate the lines of a file with a trained model, ``batch_size`` at a time, in order."""
    lines = text.read_text(encoding="utf-8").splitlines()
    batches = [lines[start : start + batch_size] for start in range(0, len(lines), batch_size)]
    sides = {}
    for dtype in dtypes:
        translator = Translator.load(path, device=Device.auto, precision=Precision[dtype])
        translator.decode = dataclasses.replace(
            translator.decode,
            beam_size=beam_size,
            batch_tokens=1 << 30,  # all of a batch at once
        )
        outputs: list[str] = []

        def translate(
            batch: list[str], translator: Translator = translator, outputs: list[str] = outputs
        ) -> None:
            outputs += [best[0].text for best in translator.translate(batch)]

        translate(batches[0])
        outputs.clear()
        times = [
            seconds_of(lambda batch=batch: translate(batch), translator.device) for batch in batches
        ]
        num_tokens = sum(len(ids) + 1 for ids in translator.tokenizer.encode(outputs))
        sides[dtype] = {
            "choice": dtype,
            "seconds": statistics.median(times),  # a batch
            "sentences_per_second": len(lines) / sum(times),
            "tokens_per_second": num_tokens / sum(times),
            "num_calls": len(times),
        }
    ours = max(sides.values(), key=lambda side: side["sentences_per_second"])
    subject = f"{Path(path).resolve().name}, {text.name}"
    device = translator.device.type
    return {
        "kind": "decode",
        "name": f"decode: {subject}, batch {batch_size}, beam {beam_size}, {device}",
        "subject": subject,
        "batch_size": batch_size,
        "beam_size": beam_size,
        "ours": ours,
    }
