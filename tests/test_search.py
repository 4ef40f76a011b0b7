"""Beam search, driven by decoders that are plain tables of probabilities."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from mt.search import Hypothesis, beam_search
from mt.tokenizer import BOS, EOS, PAD, UNK

FIRST = UNK + 1


class TableDecoder:
    """Next-piece logits from a fixed table: one for every (sentence, previous piece, piece)."""

    def __init__(self, table: Tensor) -> None:
        self.table = table  # [sentences, V, V]
        self.sentences = torch.arange(len(table))
        self.history = torch.empty((len(table), 1, 0), dtype=torch.long)  # [B, W, pieces so far]
        self.rows_seen: list[int] = []

    def step(self, tokens: Tensor, parents: Tensor) -> Tensor:
        assert tokens.shape == parents.shape
        assert len(tokens) == len(self.sentences)
        self.rows_seen.append(tokens.numel())
        rows = torch.arange(len(tokens))[:, None]
        self.history = torch.cat([self.history[rows, parents], tokens.unsqueeze(-1)], dim=-1)
        return self.table[self.sentences[:, None], tokens]

    def keep(self, sentences: Tensor) -> None:
        self.sentences = self.sentences[sentences]
        self.history = self.history[sentences]


class HistoryDecoder(TableDecoder):
    """Logits that depend on all earlier pieces, as this decoder itself remembers them."""

    def step(self, tokens: Tensor, parents: Tensor) -> Tensor:
        logits = super().step(tokens, parents)
        weights = torch.arange(1, self.history.shape[-1] + 1)
        mood = (self.history * weights).sum(dim=-1, keepdim=True)
        return logits + torch.sin(mood + torch.arange(logits.shape[-1]) * 1.7)


ONE = torch.zeros((1, 1), dtype=torch.long)  # the parent of the only hypothesis of one sentence


def random_table(num_sentences: int, vocab_size: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((num_sentences, vocab_size, vocab_size), generator=generator) * 1.5


def log_probs(decoder: TableDecoder, sentence: int, ids: list[int]) -> list[float]:
    """Log probabilities of ids, one by one, from a fresh decoder of one sentence."""
    single = type(decoder)(decoder.table[sentence : sentence + 1])
    return [
        single.step(torch.tensor([[previous]]), ONE).log_softmax(-1)[0, 0, following].item()
        for previous, following in itertools.pairwise([BOS, *ids])
    ]


def brute_force(
    decoder: TableDecoder, sentence: int, *, max_length: int, length_penalty: float
) -> list[Hypothesis]:
    """All outputs up to max_length, the best first."""
    pieces = range(FIRST, decoder.table.shape[-1])
    outputs = [
        [*ids] for length in range(max_length) for ids in itertools.product(pieces, repeat=length)
    ]
    scored = [
        Hypothesis(
            ids, sum(log_probs(decoder, sentence, [*ids, EOS])) / (len(ids) + 1) ** length_penalty
        )
        for ids in outputs
    ]
    return sorted(scored, key=lambda h: h.score, reverse=True)


@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.0, 2.0])
def test_wide_beam_finds_what_brute_force_finds(length_penalty: float) -> None:
    decoder = HistoryDecoder(random_table(3, FIRST + 3))
    bounds = [4, 2, 3]
    found = beam_search(
        decoder, max_lengths=bounds, beam_size=60, length_penalty=length_penalty, n_best=5
    )
    for sentence, hypotheses in enumerate(found):
        expected = brute_force(
            decoder, sentence, max_length=bounds[sentence], length_penalty=length_penalty
        )[:5]
        assert [h.ids for h in hypotheses] == [h.ids for h in expected]
        assert [h.score for h in hypotheses] == pytest.approx([h.score for h in expected], abs=1e-4)


def greedy(decoder: TableDecoder, sentence: int, *, max_length: int) -> list[int]:
    single = type(decoder)(decoder.table[sentence : sentence + 1])
    ids: list[int] = []
    previous = BOS
    while len(ids) < max_length - 1:
        logits = single.step(torch.tensor([[previous]]), ONE)[0, 0]
        logits[[PAD, BOS, UNK]] = -torch.inf
        previous = int(logits.argmax())
        if previous == EOS:
            break
        ids.append(previous)
    return ids


def test_beam_of_one_is_greedy() -> None:
    decoder = HistoryDecoder(random_table(20, 12))
    found = beam_search(decoder, max_lengths=[9] * 20, beam_size=1, length_penalty=1.0)
    expected = [greedy(decoder, sentence, max_length=9) for sentence in range(20)]
    assert [hypotheses[0].ids for hypotheses in found] == expected
    assert len({len(ids) for ids in expected}) > 3  # some end early, some at the bound


@pytest.mark.parametrize("beam_size", [1, 2, 5])
def test_company_changes_nothing(beam_size: int) -> None:
    """A sentence gets the same hypotheses alone and among others that end sooner or later."""
    table = random_table(12, 11)
    bounds = [3 + sentence % 7 for sentence in range(12)]

    def search(rows: list[int]) -> list[list[Hypothesis]]:
        return beam_search(
            HistoryDecoder(table[rows]),
            max_lengths=[bounds[row] for row in rows],
            beam_size=beam_size,
            length_penalty=1.0,
            n_best=beam_size,
        )

    together = search(list(range(12)))
    for sentence, hypotheses in enumerate(together):
        (alone,) = search([sentence])
        assert [h.ids for h in alone] == [h.ids for h in hypotheses]


@pytest.mark.parametrize("beam_size", [1, 4])
def test_scores_are_normalized_log_probabilities(beam_size: int) -> None:
    decoder = HistoryDecoder(random_table(6, 10))
    found = beam_search(
        decoder, max_lengths=[8] * 6, beam_size=beam_size, length_penalty=0.7, n_best=beam_size
    )
    for sentence, hypotheses in enumerate(found):
        for hypothesis in hypotheses:
            terms = log_probs(decoder, sentence, [*hypothesis.ids, EOS])
            assert hypothesis.score == pytest.approx(sum(terms) / len(terms) ** 0.7, abs=1e-4)


def test_n_best_is_sorted_and_distinct() -> None:
    found = beam_search(
        HistoryDecoder(random_table(8, 20)),
        max_lengths=[10] * 8,
        beam_size=6,
        length_penalty=1.0,
        n_best=6,
    )
    for hypotheses in found:
        scores = [h.score for h in hypotheses]
        assert len(hypotheses) == 6
        assert scores == sorted(scores, reverse=True)
        assert len({tuple(h.ids) for h in hypotheses}) == 6


def test_a_wider_beam_scores_no_worse_on_the_whole() -> None:
    table = random_table(30, 15)

    def total(beam_size: int) -> float:
        found = beam_search(
            HistoryDecoder(table), max_lengths=[8] * 30, beam_size=beam_size, length_penalty=0.0
        )
        return sum(hypotheses[0].score for hypotheses in found)

    assert total(1) < total(3) < total(12)


def test_bounds_hold_and_special_ids_never_appear() -> None:
    table = random_table(8, 9)
    table[:, :, [PAD, BOS, UNK]] = 20.0  # by far the likeliest
    table[:, :, EOS] = -20.0  # never by itself
    bounds = [1, 2, 3, 4, 5, 6, 7, 8]
    found = beam_search(
        TableDecoder(table), max_lengths=bounds, beam_size=3, length_penalty=1.0, n_best=3
    )
    for bound, hypotheses in zip(bounds, found, strict=True):
        assert hypotheses
        for hypothesis in hypotheses:
            assert len(hypothesis.ids) == bound - 1
            assert min(hypothesis.ids, default=FIRST) >= FIRST


def test_starts_with_a_row_a_sentence_and_drops_the_finished() -> None:
    table = torch.zeros((3, 10, 10))
    table[0, :, EOS] = 50.0  # sentence 0 ends at once
    table[1:, :, EOS] = -50.0
    decoder = TableDecoder(table)
    beam_search(decoder, max_lengths=[9, 4, 6], beam_size=2, length_penalty=1.0)
    assert decoder.rows_seen[0] == 3
    # In its second step sentence 0 has its two hypotheses; sentence 1 meets its bound at 4.
    assert decoder.rows_seen[1:] == [6, 4, 4, 2, 2]


def test_vocabulary_smaller_than_the_beam() -> None:
    found = beam_search(
        HistoryDecoder(random_table(2, FIRST + 1)),
        max_lengths=[3, 2],
        beam_size=7,
        length_penalty=1.0,
        n_best=7,
    )
    assert [sorted(len(h.ids) for h in hypotheses) for hypotheses in found] == [[0, 1, 2], [0, 1]]
    assert all(math.isfinite(h.score) for hypotheses in found for h in hypotheses)


def test_forbidden_pieces_are_not_an_error() -> None:
    table = random_table(2, 10)
    table[:, :, FIRST + 1 :] = -torch.inf
    found = beam_search(TableDecoder(table), max_lengths=[5, 5], beam_size=4, length_penalty=1.0)
    assert all(set(h.ids) <= {FIRST} for hypotheses in found for h in hypotheses)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_refused(value: float) -> None:
    table = random_table(3, 10)
    table[1, :, 7] = value
    with pytest.raises(ValueError, match="not finite"):
        beam_search(TableDecoder(table), max_lengths=[5] * 3, beam_size=2, length_penalty=1.0)


def test_the_decoders_logits_are_left_alone() -> None:
    table = random_table(3, 10)
    before = table.clone()
    beam_search(TableDecoder(table), max_lengths=[5] * 3, beam_size=3, length_penalty=1.0)
    assert torch.equal(table, before)


def test_no_sentences() -> None:
    decoder = TableDecoder(random_table(0, 10))
    assert beam_search(decoder, max_lengths=[], beam_size=3, length_penalty=1.0) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beam_size": 2, "n_best": 3}, "n_best"),
        ({"beam_size": 0, "n_best": 1}, "beam_size"),
        ({"beam_size": 2, "max_lengths": [4, 0]}, "max_lengths"),
    ],
)
def test_impossible_settings(settings: dict, message: str) -> None:
    decoder = TableDecoder(random_table(2, 10))
    with pytest.raises(ValueError, match=message):
        beam_search(decoder, **{"max_lengths": [4, 4], "length_penalty": 1.0, **settings})
