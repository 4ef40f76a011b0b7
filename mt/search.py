"""Batched beam search over any decoder that can take a step and reorder its rows.

The score of a hypothesis is CTranslate2's: the sum of its log probabilities over length^alpha,
where the length counts the generated pieces and the end of sentence (CTranslate2 drops the end of
sentence from its output only after it has computed the score).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from mt.tokenizer import BOS, EOS, UNK

FIRST_PIECE = UNK + 1  # the special ids come first; of them only EOS is ever produced

# Dimensions: B sentences still searched, W live hypotheses a sentence (1 in the first step, then
# K), K beam size, T pieces so far, V vocabulary. Rows are the flat [B * W], sentence by sentence.


class Decoder(Protocol):
    """A model in the middle of its output. A row is a hypothesis; at first, a sentence."""

    def step(self, tokens: Tensor) -> Tensor:
        """Append ``tokens`` [N] (long) to the N rows; return logits [N, V] of what comes next."""
        ...

    def reorder(self, rows: Tensor) -> None:
        """Make row ``rows[i]`` the new row i; rows [M] may repeat, leave out and grow."""
        ...


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A finished output: its ids without begin and end of sentence, and its normalized score."""

    ids: list[int]
    score: float


class Live(NamedTuple):
    """The hypotheses that go on, for the sentences that are not done."""

    sentences: list[int]  # B numbers of the sentences
    bounds: Tensor  # [B] largest length, the end of sentence included
    prefixes: Tensor  # [B, W, 1 + T] ids, begin of sentence first
    scores: Tensor  # [B, W] sums of log probabilities; -inf marks an empty place


class Extensions(NamedTuple):
    """One step's best ways to go on and to end, a sentence."""

    scores: Tensor  # [B, K] sums of log probabilities of the K best that go on
    parents: Tensor  # [B, K] place of the hypothesis that each extends, in [0, W)
    tokens: Tensor  # [B, K] the piece that each appends
    end_scores: Tensor  # [B, W] sum of log probabilities of each hypothesis if it ends here


@torch.inference_mode()
def beam_search(
    decoder: Decoder,
    *,
    max_lengths: Sequence[int] | Tensor,
    beam_size: int,
    length_penalty: float,
    n_best: int = 1,
) -> list[list[Hypothesis]]:
    """Return the ``n_best`` best hypotheses found for each of the decoder's sentences, best first.

    ``max_lengths`` [B] bounds each sentence's pieces, the end of sentence included; a tensor also
    says on which device to work.

    A hypothesis ends when its end of sentence is among the K best extensions of its sentence, and
    a sentence is done as soon as K hypotheses have ended: CTranslate2's rule, so that an exported
    model finds the same translations, and with a beam of 1 exactly greedy search. At its bound a
    hypothesis must end: it pays for the unlikely end of sentence, so that one cut short ranks
    behind one that is equally good and complete, and it loses no more than its last piece.

    Raises ``ValueError`` for impossible settings and for logits that are not finite.
    """
    if not 1 <= n_best <= beam_size:
        raise ValueError(f"n_best must be between 1 and beam_size={beam_size}, not {n_best}")
    bounds = torch.as_tensor(max_lengths, dtype=torch.long)
    limits: list[int] = bounds.tolist()
    if min(limits, default=1) < 1:
        raise ValueError(f"max_lengths must be at least 1, not {min(limits)}")

    found: list[list[Hypothesis]] = [[] for _ in limits]
    live = Live(
        sentences=list(range(len(limits))),
        bounds=bounds,
        prefixes=torch.full((len(limits), 1, 1), BOS, device=bounds.device),
        scores=torch.zeros((len(limits), 1), device=bounds.device),
    )
    length = 0
    while live.sentences:
        length += 1
        logits = decoder.step(live.prefixes[:, :, -1].flatten())
        extensions = _extend(live, logits, beam_size=beam_size, length=length)
        for place, ids, score in _ended(live, extensions):
            found[live.sentences[place]].append(Hypothesis(ids, score / length**length_penalty))
        kept = [
            place
            for place, sentence in enumerate(live.sentences)
            if len(found[sentence]) < beam_size and length < limits[sentence]
        ]
        if kept:
            _reorder(decoder, live, extensions, kept)
        live = _advance(live, extensions, kept)
    return [sorted(ended, key=lambda h: h.score, reverse=True)[:n_best] for ended in found]


def _extend(live: Live, logits: Tensor, *, beam_size: int, length: int) -> Extensions:
    """Rank what can follow the live hypotheses; ``length`` counts the piece that follows."""
    num_sentences, width = live.scores.shape
    log_probs = logits.float().log_softmax(-1)  # [B * W, V]
    if not log_probs[:, EOS].isfinite().all():
        raise ValueError(
            "the model's output is not finite (NaN or infinity): its weights are damaged, or the "
            "precision is too low; try another checkpoint, or precision fp32"
        )
    end_scores = live.scores + log_probs[:, EOS].view(num_sentences, width)

    pieces = log_probs[:, FIRST_PIECE:]
    num_candidates = min(beam_size, pieces.shape[1])
    best, ids = pieces.topk(num_candidates, dim=-1)  # [B * W, C]
    best = (best + live.scores.view(-1, 1)).view(num_sentences, -1)  # [B, W * C]
    ids = (ids + FIRST_PIECE).view(num_sentences, -1)
    if best.shape[1] < beam_size:  # a vocabulary smaller than the beam
        missing = (0, beam_size - best.shape[1])
        best = F.pad(best, missing, value=-torch.inf)
        ids = F.pad(ids, missing, value=EOS)
    scores, places = best.topk(beam_size, dim=-1)  # [B, K]
    at_bound = (live.bounds == length).unsqueeze(1)
    return Extensions(
        scores=scores.masked_fill(at_bound, -torch.inf),
        parents=(places // num_candidates).clamp(max=width - 1),
        tokens=ids.gather(1, places),
        end_scores=end_scores,
    )


def _ended(live: Live, extensions: Extensions) -> list[tuple[int, list[int], float]]:
    """Return (place of the sentence, ids, sum of log probabilities) of what ends in this step."""
    beam_size = extensions.scores.shape[1]
    ranked = torch.cat([extensions.scores, extensions.end_scores], dim=1)
    best, indices = ranked.topk(beam_size, dim=1)  # [B, K]
    places, ranks = ((indices >= beam_size) & best.isfinite()).nonzero(as_tuple=True)
    if not len(places):
        return []
    prefixes = live.prefixes[places, indices[places, ranks] - beam_size, 1:]
    return list(zip(places.tolist(), prefixes.tolist(), best[places, ranks].tolist(), strict=True))


def _reorder(decoder: Decoder, live: Live, extensions: Extensions, kept: list[int]) -> None:
    """Give the decoder one row for each hypothesis that goes on."""
    num_sentences, width = live.scores.shape
    beam_size = extensions.parents.shape[1]
    if beam_size == 1 and len(kept) == num_sentences:
        return  # every row stays where it is
    first_rows = torch.tensor(kept, device=live.scores.device) * width  # [B]
    decoder.reorder((first_rows.unsqueeze(1) + extensions.parents[kept]).flatten())


def _advance(live: Live, extensions: Extensions, kept: list[int]) -> Live:
    """Append the chosen pieces, and leave the sentences that are done behind."""
    parents = extensions.parents.unsqueeze(-1).expand(-1, -1, live.prefixes.shape[-1])
    prefixes = live.prefixes.gather(1, parents)  # [B, K, 1 + T]
    prefixes = torch.cat([prefixes, extensions.tokens.unsqueeze(-1)], dim=-1)
    sentences = [live.sentences[place] for place in kept]
    return Live(sentences, live.bounds[kept], prefixes[kept], extensions.scores[kept])
