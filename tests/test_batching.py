"""Batches: what they hold, how they are padded, and an order that can be resumed."""

import itertools
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from mt.batching import (
    Batch,
    BatchOrder,
    PlannedBatch,
    Sequences,
    collate,
    length_batches,
    load_batch,
    pad,
    round_up,
)
from mt.tokenizer import BOS, EOS, PAD

RANDOM = np.random.default_rng(1)
# Like text: lengths that go together, with a long tail.
SOURCE = np.minimum(2 + RANDOM.lognormal(2.8, 0.6, 5000).astype(int), 150)
TARGET = np.clip((SOURCE * RANDOM.normal(1.1, 0.2, 5000)).astype(int), 2, 150)


def order(*, seed: int = 1, max_tokens: int = 1024, max_length: int = 100) -> BatchOrder:
    return BatchOrder(
        SOURCE.tolist(), TARGET.tolist(), max_tokens=max_tokens, max_length=max_length, seed=seed
    )


def plain(batches: Iterable[PlannedBatch]) -> list[tuple[list[int], int, int]]:
    return [(batch.indices.tolist(), batch.source_length, batch.target_length) for batch in batches]


# The order


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    first, second = order(), order()
    second.epoch(7)  # what came before plays no part
    np.random.seed(99)
    torch.manual_seed(99)
    assert plain(first.epoch(3)) == plain(second.epoch(3))


def test_epochs_and_seeds_differ() -> None:
    plans = [order().epoch(0), order().epoch(1), order(seed=2).epoch(0)]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        # Not only the order of the batches: other sentences come together.
        together = [{frozenset(batch.indices.tolist()) for batch in plans[i]} for i in (one, other)]
        assert len(together[0] & together[1]) < 0.1 * len(together[0])


@pytest.mark.parametrize("max_tokens", [300, 1024, 100_000])
def test_every_pair_once_an_epoch(max_tokens: int) -> None:
    batches = order(max_tokens=max_tokens).epoch(0)
    seen = np.concatenate([batch.indices for batch in batches])
    fits = np.flatnonzero((SOURCE <= 100) & (TARGET <= 100))
    assert sorted(seen.tolist()) == fits.tolist()
    assert all(len(batch.indices) for batch in batches)


@pytest.mark.parametrize("max_tokens", [300, 1024])
def test_the_budget_holds_on_both_sides(max_tokens: int) -> None:
    batches = order(max_tokens=max_tokens).epoch(0)
    for batch in batches:
        assert len(batch.indices) * batch.source_length <= max_tokens
        assert len(batch.indices) * batch.target_length <= max_tokens
        assert SOURCE[batch.indices].max() <= batch.source_length
        assert TARGET[batch.indices].max() <= batch.target_length
    # It is used, too: most batches have no room for another sentence.
    full = [
        (len(batch.indices) + 1) * max(batch.source_length, batch.target_length) > max_tokens
        for batch in batches
    ]
    assert np.mean(full) > 0.9


def test_a_sentence_longer_than_the_budget_is_a_batch() -> None:
    batches = BatchOrder([50, 3], [40, 3], max_tokens=30, max_length=64, seed=1).epoch(0)
    assert sorted(len(batch.indices) for batch in batches) == [1, 1]


def test_few_shapes_and_little_padding() -> None:
    plan = BatchOrder(
        np.tile(SOURCE, 8), np.tile(TARGET, 8), max_tokens=1024, max_length=100, seed=1
    )
    batches = plan.epoch(0)
    shapes = {(len(b.indices), b.source_length, b.target_length) for b in batches}
    assert len(shapes) < len(batches) / 3
    grid = set(range(2, 33, 2)) | set(range(36, 65, 4)) | set(range(72, 129, 8))
    assert {length for _, *lengths in shapes for length in lengths} <= grid
    assert plan.padding_share(batches) < 0.08


def test_lengths_are_mixed_over_an_epoch() -> None:
    lengths = np.array([batch.target_length for batch in order().epoch(0)])
    means = [part.mean() for part in np.array_split(lengths, 4)]
    assert max(means) < 1.5 * min(means)


def test_the_padding_share_counts_padding() -> None:
    plan = order()
    batches = plan.epoch(0)[:20]
    padding = total = 0
    for batch in batches:
        made = collate(
            [[5] * (SOURCE[i] - 1) for i in batch.indices],
            [[5] * (TARGET[i] - 1) for i in batch.indices],
            source_length=batch.source_length,
            target_length=batch.target_length,
        )
        padding += int((~made.source_mask).sum() + (~made.target_mask).sum())
        total += made.source.numel() + made.target_out.numel()
    assert plan.padding_share(batches) == pytest.approx(padding / total)


def test_pairs_too_long_are_left_out_and_counted() -> None:
    plan = BatchOrder([10, 11, 3, 3], [10, 3, 11, 3], max_tokens=100, max_length=10, seed=1)
    assert plan.num_too_long == 2
    seen = np.concatenate([batch.indices for batch in plan.epoch(0)])
    assert sorted(seen.tolist()) == [0, 3]


def test_nothing_short_enough() -> None:
    with pytest.raises(ValueError, match="train.max_length"):
        BatchOrder([10], [10], max_tokens=100, max_length=9, seed=1)


def test_the_grid() -> None:
    lengths = np.arange(1, 400)
    rounded = round_up(lengths)
    assert (rounded >= lengths).all()
    assert (np.diff(rounded) >= 0).all()
    assert (round_up(rounded) == rounded).all()
    assert ((rounded - lengths) / rounded)[3:].max() < 0.2
    assert len(set(rounded.tolist())) < 60


def test_a_plan_is_a_sequence_of_batches() -> None:
    plan = order().epoch(0)
    batches = list(plan)
    assert len(batches) == len(plan)
    for part in (slice(20), slice(3, None, 4), slice(None, None, -1)):
        assert plain(plan[part]) == plain(batches[part])
    assert plain([plan[-1], plan[5]]) == plain([batches[-1], batches[5]])
    with pytest.raises(IndexError):
        plan[len(plan)]


def test_a_plan_is_small() -> None:
    """Of 50 million pairs, it must fit into memory beside the model."""
    plan = BatchOrder(
        np.tile(SOURCE, 20), np.tile(TARGET, 20), max_tokens=1024, max_length=150, seed=1
    ).epoch(0)
    arrays = (plan.indices, plan.starts, plan.sizes, plan.lengths)
    assert sum(array.nbytes for array in arrays) < 5 * 20 * len(SOURCE)


# Batches


def plain_pad(rows: list[list[int]], length: int) -> list[list[int]]:
    width = max(length, *map(len, rows))
    return [row + [PAD] * (width - len(row)) for row in rows]


@pytest.mark.parametrize("length", [0, 7, 40])
def test_collate_is_its_plain_definition(length: int) -> None:
    sources, targets = ROWS[:30], ROWS[30:60]
    batch = collate(sources, targets, source_length=length, target_length=length)
    ended = [[*row, EOS] for row in targets]
    assert batch.source.tolist() == plain_pad([[*row, EOS] for row in sources], length)
    assert batch.target_out.tolist() == plain_pad(ended, length)
    assert batch.target_in.tolist() == plain_pad([[BOS, *row] for row in targets], length)
    assert torch.equal(batch.source_mask, batch.source != PAD)
    assert torch.equal(batch.target_mask, batch.target_out != PAD)
    assert batch.num_tokens == sum(map(len, ended))


def test_collate_frames_and_masks() -> None:
    batch = collate([[5, 6, 7], [8]], [[9], [10, 11]])
    assert batch.source.tolist() == [[5, 6, 7, EOS], [8, EOS, PAD, PAD]]
    assert batch.target_in.tolist() == [[BOS, 9, PAD], [BOS, 10, 11]]
    assert batch.target_out.tolist() == [[9, EOS, PAD], [10, 11, EOS]]
    assert batch.source_mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert batch.target_mask.tolist() == [[True, True, False], [True] * 3]
    assert batch.num_tokens == 5
    assert batch.source.dtype == torch.long


def test_collate_pads_to_the_lengths_asked_for() -> None:
    batch = collate([[5]], [[6]], source_length=4, target_length=6)
    assert batch.source.shape == (1, 4)
    assert batch.target_in.shape == batch.target_out.shape == batch.target_mask.shape == (1, 6)
    assert batch.num_tokens == 2


def test_an_empty_side_is_only_its_end() -> None:
    batch = collate([[]], [[]])
    assert batch.source.tolist() == [[EOS]]
    assert batch.target_in.tolist() == [[BOS]]
    assert batch.target_out.tolist() == [[EOS]]


def test_to_returns_the_same_batch() -> None:
    batch = collate([[5, 6], [7]], [[8], [9]])
    moved = batch.to(torch.device("cpu"))
    assert moved is not batch
    for name in ("source", "target_in", "target_out", "source_mask", "target_mask"):
        assert torch.equal(getattr(moved, name), getattr(batch, name))
    assert moved.num_tokens == batch.num_tokens
    elsewhere = batch.to(torch.device("meta"))
    assert elsewhere.source_mask.device.type == elsewhere.target_in.device.type == "meta"


def test_pad() -> None:
    assert pad([[1], [2, 3]]).tolist() == [[1, PAD], [2, 3]]
    assert pad([[1]], length=3).tolist() == [[1, PAD, PAD]]


@pytest.mark.parametrize("max_tokens", [1, 64, 10_000])
def test_length_batches(max_tokens: int) -> None:
    lengths = SOURCE[:500].tolist()
    batches = length_batches(lengths, max_tokens=max_tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(500))
    ordered = [lengths[index] for batch in batches for index in batch]
    assert ordered == sorted(lengths, reverse=True)
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= max_tokens


def test_length_batches_of_nothing() -> None:
    assert length_batches([], max_tokens=10) == []


# The ids of a corpus

ROWS = [RANDOM.integers(3, 1000, length).tolist() for length in RANDOM.integers(0, 30, 200)]
IDS = pa.list_(pa.int32())


def many_chunks() -> list[pa.ListArray]:
    """``ROWS`` in chunks of several sizes, some of them slices of larger ones."""
    cuts = [0, 1, 1, 50, 77, 200]
    chunks = []
    for start, end in itertools.pairwise(cuts):
        whole = pa.array([[1, 2], *ROWS[start:end], [3]], IDS)
        chunks.append(whole.slice(1, end - start))
    return chunks


def test_sequences_give_back_every_row() -> None:
    sequences = Sequences(many_chunks())
    assert [sequences[i] for i in range(len(ROWS))] == ROWS
    assert sequences.lengths.tolist() == [len(row) for row in ROWS]


def test_rows_are_those_of_the_numbers_in_their_order() -> None:
    sequences = Sequences(many_chunks())
    numbers = RANDOM.integers(0, len(ROWS), 500)
    ids, lengths = sequences.rows(numbers)
    assert np.split(ids, np.cumsum(lengths)[:-1])[7].tolist() == ROWS[numbers[7]]
    assert ids.tolist() == [id for number in numbers for id in ROWS[number]]
    assert lengths.tolist() == [len(ROWS[number]) for number in numbers]


def test_ids_are_not_copied(tmp_path: Path) -> None:
    schema = pa.schema([("ids", IDS)])
    with pa.ipc.new_stream(str(tmp_path / "ids.arrow"), schema) as stream:
        for chunk in many_chunks():
            stream.write_batch(pa.record_batch([chunk], schema=schema))
    before = pa.total_allocated_bytes()
    table = pa.ipc.open_stream(pa.memory_map(str(tmp_path / "ids.arrow"))).read_all()
    chunks = table.column("ids").chunks
    sequences = Sequences(chunks)
    assert [sequences[i] for i in range(len(ROWS))] == ROWS
    assert pa.total_allocated_bytes() == before
    for chunk, values in zip([c for c in chunks if len(c)], sequences.values, strict=True):
        assert np.shares_memory(values, chunk.values.to_numpy())
        assert not values.flags.owndata


def test_a_planned_batch_is_what_collate_makes_of_its_rows() -> None:
    sources, targets = Sequences(many_chunks()), Sequences(many_chunks()[::-1])
    planned = PlannedBatch(RANDOM.integers(0, len(ROWS), 40), source_length=32, target_length=34)
    expected = collate(
        [sources[index] for index in planned.indices],
        [targets[index] for index in planned.indices],
        source_length=32,
        target_length=34,
    )
    assert as_lists(load_batch(sources, targets, planned)) == as_lists(expected)


def as_lists(batch: Batch) -> list[object]:
    tensors = (batch.source, batch.target_in, batch.target_out)
    masks = (batch.source_mask, batch.target_mask)
    return [*(tensor.tolist() for tensor in (*tensors, *masks)), batch.num_tokens]
