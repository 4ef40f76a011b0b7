"""How a model in training does on held-out text, measured the same way every time."""

import dataclasses
import time

import numpy as np
import torch

from mt.batching import collate
from mt.config import Config, Precision
from mt.corpus import Corpus
from mt.evaluate import heldout_loss, loss_batches, quick_scores
from mt.model import Transformer
from mt.monitor import Monitor, Validation
from mt.runtime import Runtime
from mt.translate import Translator

NUM_SAMPLES = 5  # translations shown at each validation
MAX_PLOTTED = 40  # pieces a side of an attention map


class Validator:
    """The loss on the whole validation split, and greedy translations of a fixed sample of it."""

    def __init__(self, config: Config, corpus: Corpus, runtime: Runtime) -> None:
        """Raises: ValueError when no validation pair is short enough."""
        self.config = config
        self.corpus = corpus
        self.runtime = dataclasses.replace(runtime, precision=Precision.fp32)
        split = corpus.valid[:]
        pairs = zip(split["source_ids"], split["target_ids"], strict=True)
        self.batches = loss_batches(pairs, max_length=config.train.max_length)
        if not self.batches:
            raise ValueError(
                f"no validation pair has at most train.max_length={config.train.max_length} "
                "pieces a side; raise train.max_length"
            )
        number = min(config.train.valid_sentences, len(corpus.valid))
        places = np.linspace(0, len(corpus.valid) - 1, number).round()  # spread evenly
        self.sample = corpus.valid[places.astype(int).tolist()]

    def validate(self, model: Transformer, *, step: int, monitor: Monitor) -> Validation:
        """Score an fp32 model, and show the scores, some translations and an attention map."""
        start = time.perf_counter()
        loss = heldout_loss(model, self.batches, self.runtime)
        bleu = chrf = None
        samples: list[tuple[str, str, str]] = []
        if sources := self.sample["source"]:
            references = self.sample["target"]
            greedy = dataclasses.replace(self.config.decode, beam_size=1)
            translator = Translator(
                model, self.corpus.tokenizer, self.config, self.runtime, decode=greedy
            )
            hypotheses = [best[0].text for best in translator.translate(sources)]
            bleu, chrf = quick_scores(
                hypotheses, references, target_lang=self.config.data.target_lang
            )
            samples = list(zip(sources, references, hypotheses, strict=True))[:NUM_SAMPLES]
        scores = Validation(
            step=step,
            loss=loss,
            bleu=bleu,
            chrf=chrf,
            num_leaked=self.corpus.num_leaked["valid"],
            seconds=time.perf_counter() - start,
        )
        monitor.validation(scores, samples=samples)
        self._plot(model, step=step, monitor=monitor)
        return scores

    @torch.inference_mode()
    def _plot(self, model: Transformer, *, step: int, monitor: Monitor) -> None:
        """Show the cross-attention of the sample's first pair that fits into a picture."""
        ids = zip(self.sample["source_ids"], self.sample["target_ids"], strict=True)
        short = (pair for pair in ids if max(map(len, pair)) <= MAX_PLOTTED)
        if (pair := next(short, None)) is None:
            return
        batch = collate([pair[0]], [pair[1]]).to(self.runtime.device)
        weights = model.cross_weights(batch.source, batch.target_in, batch.source_mask)
        pieces = self.corpus.tokenizer.pieces
        monitor.attention(
            weights[0],
            source=pieces(batch.source[0].tolist()),
            target=pieces(batch.target_out[0].tolist()),
            step=step,
        )
