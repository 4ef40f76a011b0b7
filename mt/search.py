"""Batched beam search over any decoder that can take a step.

The score of a hypothesis is CTranslate2's: the sum of its log probabilities over length^alpha,
where the length counts the generated pieces and the end of sentence (CTranslate2 drops the end of
sentence from its output only after it has computed the score).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mt.tokenizer import BOS, EOS, UNK

FIRST_PIECE = UNK + 1  # the special ids come first; of them only EOS is ever produced
PAUSE = 4  # steps between two looks at what a GPU has done, for which it has to stand still
GROUP = 100  # columns whose maximum stands for them in `largest`
MANY = 1 << 18  # elements from which on this pays
CROWD = 0.1  # share of the sentences that are done, from which on it pays to leave them behind

# Dimensions: B sentences still searched, W live hypotheses a sentence (1 in the first step, then
# K), K beam size, V vocabulary. Hypotheses are never moved: a step says of each which one of the
# step before it extends, and the outputs are read off these links in the end.


class Decoder(Protocol):
    """A model in the middle of its output: W hypotheses for each of B sentences."""

    def step(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """Append a piece to hypotheses; return logits of the next piece, [B, W, V].

        tokens, parents [B, W] (long): hypothesis w of sentence b is from now on the one that was
        at parents[b, w] of that sentence, followed by tokens[b, w]. In the first step W is 1, and
        every parent 0.
        """
        ...

    def keep(self, sentences: Tensor) -> None:
        """Go on with some sentences only: their places [B'], in ascending order."""
        ...


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A finished output: its ids without begin and end of sentence, and its normalized score."""

    ids: list[int]
    score: float


class Live(NamedTuple):
    """The hypotheses that go on. A sentence that is done has none: all its scores are -inf."""

    sentences: list[int]  # B numbers of the sentences
    bounds: Tensor  # [B] largest length, the end of sentence included
    num_ended: Tensor  # [B] hypotheses that have ended
    scores: Tensor  # [B, W] sums of log probabilities, best first; -inf marks an empty place
    tokens: Tensor  # [B, W] the last piece of each
    parents: Tensor  # [B, W] place of the hypothesis that it extends, in the step before


class Step(NamedTuple):
    """What is remembered of a step."""

    sentences: list[int]  # B numbers of the sentences that were still searched
    tokens: Tensor  # [B, W] as in Live
    parents: Tensor  # [B, W]
    end_scores: Tensor  # [B, K] sums of log probabilities of what ends here; -inf: nothing does
    end_places: Tensor  # [B, K] place in [0, W) of the hypothesis that ends


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

    num_sentences, longest = len(limits), max(limits, default=0)
    device = bounds.device
    live = Live(
        sentences=list(range(num_sentences)),
        bounds=bounds,
        num_ended=torch.zeros_like(bounds),
        scores=torch.zeros((num_sentences, 1), device=device),
        tokens=torch.full((num_sentences, 1), BOS, device=device),
        parents=torch.zeros((num_sentences, 1), dtype=torch.long, device=device),
    )
    history: list[Step] = []
    checksum = torch.zeros((), device=device)  # stays finite as long as all numbers are
    pause = 1 if device.type == "cpu" else PAUSE
    for length in range(1, longest + 1):
        log_probs = decoder.step(live.tokens, live.parents).log_softmax(-1, dtype=torch.float32)
        checksum += log_probs[..., EOS].sum()
        step, live = _advance(live, log_probs, beam_size=beam_size, length=length)
        history.append(step)
        if length % pause and length < longest:
            continue
        goes_on = (live.scores[:, 0] > -torch.inf).tolist()
        if not any(goes_on):
            break
        if goes_on.count(False) >= CROWD * len(goes_on):
            live = _compact(live, decoder, [place for place, goes in enumerate(goes_on) if goes])
    if not checksum.isfinite():
        raise ValueError(
            "the model's output is not finite (NaN or infinity): its weights are damaged, or the "
            "precision is too low; try another checkpoint, or precision fp32"
        )
    return _outputs(
        history,
        shape=(len(history), num_sentences, beam_size),
        n_best=n_best,
        length_penalty=length_penalty,
    )


def _advance(live: Live, log_probs: Tensor, *, beam_size: int, length: int) -> tuple[Step, Live]:
    """Extend the live hypotheses by one piece each, and end some.

    log_probs [B, W, V] are of the piece that follows; with it there are ``length``.
    """
    scores, parents, tokens = _extensions(live.scores, log_probs, beam_size=beam_size)
    scores = scores.masked_fill((live.bounds == length).unsqueeze(1), -torch.inf)

    ranked = torch.cat([scores, live.scores + log_probs[..., EOS]], dim=1)  # [B, K + W]
    best, places = ranked.topk(beam_size, dim=1)  # [B, K]
    ends = (places >= beam_size) & (best > -torch.inf)
    num_ended = live.num_ended + ends.sum(1)
    step = Step(
        sentences=live.sentences,
        tokens=live.tokens,
        parents=live.parents,
        end_scores=best.masked_fill(~ends, -torch.inf),
        end_places=places - beam_size,
    )
    return step, live._replace(
        num_ended=num_ended,
        scores=scores.masked_fill((num_ended >= beam_size).unsqueeze(1), -torch.inf),
        tokens=tokens,
        parents=parents,
    )


def _extensions(
    scores: Tensor, log_probs: Tensor, *, beam_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The K best ways to go on, a sentence, best first: (scores, parents, tokens), [B, K] each."""
    num_sentences, width = scores.shape
    pieces = log_probs[..., FIRST_PIECE:]
    num_candidates = min(beam_size, pieces.shape[-1])
    best, ids = largest(pieces, num_candidates)  # [B, W, C]
    best = (best + scores.unsqueeze(-1)).view(num_sentences, -1)  # [B, W * C]
    ids = (ids + FIRST_PIECE).view(num_sentences, -1)
    if best.shape[1] < beam_size:  # a vocabulary smaller than the beam
        missing = (0, beam_size - best.shape[1])
        best = F.pad(best, missing, value=-torch.inf)
        ids = F.pad(ids, missing, value=EOS)
    best, places = best.topk(beam_size, dim=-1)
    return best, (places // num_candidates).clamp(max=width - 1), ids.gather(1, places)


def largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``x.topk(k)`` over the last dimension, on the CPU for many long rows in half the time.

    The k groups of columns with the largest maxima hold the k largest elements; finding maxima
    is far cheaper than sorting, and what is left to sort is short.
    """
    num_groups = x.shape[-1] // GROUP
    if x.device.type != "cpu" or x.numel() < MANY or num_groups < 4 * k:
        return x.topk(k)
    head, tail = x.split([num_groups * GROUP, x.shape[-1] - num_groups * GROUP], dim=-1)
    groups = head.unflatten(-1, (num_groups, GROUP)).amax(-1).topk(k).indices
    columns = (groups.unsqueeze(-1) * GROUP + torch.arange(GROUP)).flatten(-2)
    rest = torch.arange(num_groups * GROUP, x.shape[-1]).expand(*tail.shape)
    columns = torch.cat([columns, rest], dim=-1)
    values, places = x.gather(-1, columns).topk(k)
    return values, columns.gather(-1, places)


def _compact(live: Live, decoder: Decoder, kept: list[int]) -> Live:
    """Leave the sentences behind that are done; ``kept`` are the places of the others."""
    places = torch.tensor(kept, device=live.scores.device)
    decoder.keep(places)
    return Live(
        [live.sentences[place] for place in kept],
        *(tensor[places] for tensor in live[1:]),
    )


def _outputs(
    history: list[Step],
    *,
    shape: tuple[int, int, int],
    n_best: int,
    length_penalty: float,
) -> list[list[Hypothesis]]:
    """Follow the best ends back to the first piece. ``shape`` is (steps, sentences, beam size)."""
    tokens, parents, places = (np.zeros(shape, dtype=np.int64) for _ in range(3))
    scores = np.full(shape, -np.inf)
    for index, step in enumerate(history):
        width = step.tokens.shape[1]
        tokens[index, step.sentences, :width] = step.tokens.cpu()
        parents[index, step.sentences, :width] = step.parents.cpu()
        places[index, step.sentences] = step.end_places.cpu()
        scores[index, step.sentences] = step.end_scores.cpu()
    scores /= np.arange(1, len(history) + 1)[:, None, None] ** length_penalty

    found: list[list[Hypothesis]] = []
    for sentence in range(shape[1]):
        flat = scores[:, sentence].ravel()
        best = (-flat).argsort(kind="stable")[:n_best]
        found.append([])
        for end in best[flat[best] > -np.inf].tolist():
            last, rank = divmod(end, shape[2])
            place = places[last, sentence, rank]
            ids: list[int] = []
            for index in range(last, 0, -1):
                ids.append(int(tokens[index, sentence, place]))
                place = parents[index, sentence, place]
            found[-1].append(Hypothesis(ids[::-1], float(flat[end])))
    return found
