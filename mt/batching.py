"""Sentences of similar length into batches, in an order that can be resumed anywhere.

Shapes: B sentences, S source positions, T target positions.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from mt.tokenizer import BOS, EOS, PAD

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, slots=True)
class Batch:
    """Sentence pairs, padded. Masks: True = a piece, False = padding."""

    source: Tensor  # [B, S] pieces, EOS
    target_in: Tensor  # [B, T] BOS, pieces
    target_out: Tensor  # [B, T] pieces, EOS
    source_mask: Tensor  # [B, S]
    target_mask: Tensor  # [B, T]
    num_tokens: int  # target pieces with EOS, without padding

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device. A GPU fetches it by itself while the host goes on."""

        def move(tensor: Tensor) -> Tensor:
            if device.type == "cuda" and not tensor.is_cuda:
                tensor = tensor.pin_memory()
            return tensor.to(device, non_blocking=True)

        return Batch(
            source=move(self.source),
            target_in=move(self.target_in),
            target_out=move(self.target_out),
            source_mask=move(self.source_mask),
            target_mask=move(self.target_mask),
            num_tokens=self.num_tokens,
        )


def pad(sequences: Sequence[Sequence[int]], *, length: int = 0) -> Tensor:
    """Sequences of ids as one tensor [B, longest or ``length``], filled up with PAD."""
    rows = _rows(sequences)
    table, _ = _table(rows, width=max(length, int(rows.lengths.max())))
    return torch.from_numpy(table)


def collate(
    source_ids: Sequence[Sequence[int]],
    target_ids: Sequence[Sequence[int]],
    *,
    source_length: int = 0,
    target_length: int = 0,
) -> Batch:
    """Pieces without BOS and EOS -> a batch, padded to the lengths given or the longest there."""
    return _batch(
        _rows(source_ids),
        _rows(target_ids),
        source_length=source_length,
        target_length=target_length,
    )


def load_batch(sources: "Sequences", targets: "Sequences", planned: "PlannedBatch") -> Batch:
    """The batch that was planned, from the ids of all sentences of both sides."""
    return _batch(
        sources.rows(planned.indices),
        targets.rows(planned.indices),
        source_length=planned.source_length,
        target_length=planned.target_length,
    )


class Rows(NamedTuple):
    """Some sequences of ids, one after the other."""

    ids: np.ndarray
    lengths: np.ndarray


def _rows(sequences: Sequence[Sequence[int]]) -> Rows:
    lengths = np.fromiter(map(len, sequences), dtype=np.int64, count=len(sequences))
    ids = itertools.chain.from_iterable(sequences)
    return Rows(np.fromiter(ids, dtype=np.int64, count=lengths.sum()), lengths)


def _table(rows: Rows, *, width: int) -> tuple[np.ndarray, np.ndarray]:
    """([B, width] rows, padded; True where an id stands)"""
    mask = np.arange(width) < rows.lengths[:, None]
    table = np.full(mask.shape, PAD, dtype=np.int64)
    table[mask] = rows.ids
    return table, mask


def _with_ends(rows: Rows, *, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The same with EOS behind every row, and at least ``length`` wide."""
    table, mask = _table(rows, width=max(length, int(rows.lengths.max()) + 1))
    ends = np.arange(len(table)), rows.lengths
    table[ends], mask[ends] = EOS, True
    return table, mask


def _batch(sources: Rows, targets: Rows, *, source_length: int, target_length: int) -> Batch:
    source, source_mask = _with_ends(sources, length=source_length)
    target_out, target_mask = _with_ends(targets, length=target_length)
    target_in = np.full_like(target_out, BOS)
    # One place to the right, without EOS, which falls onto padding or off the row.
    target_in[:, 1:] = np.where(target_mask[:, 1:], target_out[:, :-1], PAD)
    return Batch(
        source=torch.from_numpy(source),
        target_in=torch.from_numpy(target_in),
        target_out=torch.from_numpy(target_out),
        source_mask=torch.from_numpy(source_mask),
        target_mask=torch.from_numpy(target_mask),
        num_tokens=len(targets.ids) + len(targets.lengths),
    )


def length_batches(lengths: Sequence[int], *, max_tokens: int) -> list[list[int]]:
    """Indices in batches, longest sentences first, each at most max_tokens with its padding.

    A sentence longer than max_tokens makes a batch of its own.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        # The first sentence of a batch is its longest.
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def round_up(lengths: np.ndarray) -> np.ndarray:
    """Lengths onto a grid: even up to 32, multiples of 4 up to 64, of 8 up to 128, of 16 beyond."""
    step = 2 << np.searchsorted([32, 64, 128], lengths)
    return -(-lengths // step) * step


@dataclass(frozen=True, slots=True)
class PlannedBatch:
    """The sentences of a batch, and the lengths to pad both sides to."""

    indices: np.ndarray
    source_length: int
    target_length: int


class Plan(Sequence[PlannedBatch]):
    """The batches of an epoch. Numbers only: of a large corpus there are millions."""

    def __init__(
        self, indices: np.ndarray, *, starts: np.ndarray, sizes: np.ndarray, lengths: np.ndarray
    ) -> None:
        """``sizes[n]`` of the ``indices`` from ``starts[n]`` on make batch n, padded to
        ``lengths[n]``, (source, target)."""
        self.indices = indices
        self.starts = starts
        self.sizes = sizes
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, number: int) -> PlannedBatch: ...

    @overload
    def __getitem__(self, number: slice) -> "Plan": ...

    def __getitem__(self, number: "int | slice") -> "PlannedBatch | Plan":
        starts, sizes, lengths = self.starts[number], self.sizes[number], self.lengths[number]
        if isinstance(number, slice):
            return Plan(self.indices, starts=starts, sizes=sizes, lengths=lengths)
        source_length, target_length = lengths.tolist()
        return PlannedBatch(
            self.indices[starts : starts + sizes],
            source_length=source_length,
            target_length=target_length,
        )


class BatchOrder:
    """Which sentences make which batch of an epoch: a pure function of (seed, epoch).

    Batches come in few shapes, since every new shape costs time: the CPU's matrix library
    compiles a kernel for each, a compiled GPU model is compiled again. Both lengths are rounded up
    to a grid; pairs of the same rounded lengths are shuffled and cut into batches of at most
    ``max_tokens`` on either side, padding included; what is left over joins the next larger shape;
    last, the batches are shuffled.

    The pairs are sorted by shape once; an epoch only shuffles those of a shape. 12 bytes a pair
    stay in memory, and 4 more for every plan that is kept.
    """

    def __init__(
        self,
        source_lengths: Sequence[int] | np.ndarray,
        target_lengths: Sequence[int] | np.ndarray,
        *,
        max_tokens: int,
        max_length: int,
        seed: int,
    ) -> None:
        """Lengths in pieces with EOS. Pairs with a side longer than max_length are left out.

        Raises: ValueError if no pair is left.
        """
        self.source = np.asarray(source_lengths, dtype=np.int32)
        self.target = np.asarray(target_lengths, dtype=np.int32)
        fits = np.flatnonzero(np.maximum(self.source, self.target) <= max_length)
        self.num_too_long = len(self.source) - len(fits)
        if len(fits) == 0:
            raise ValueError(
                f"no training pair has at most train.max_length={max_length} pieces a side; "
                "raise train.max_length"
            )
        self.max_tokens = max_tokens
        self.seed = seed

        rounded = round_up(np.arange(max_length + 1))
        grid = np.unique(rounded)
        kind = np.min_scalar_type(len(grid) ** 2)  # 16 bits as a rule, which sort in no time
        level = np.searchsorted(grid, rounded).astype(kind)  # of every length
        shapes = level[self.target[fits]] * kind.type(len(grid)) + level[self.source[fits]]
        order = np.argsort(shapes, kind="stable")
        self.indices = fits[order].astype(np.int32)  # by rounded target length, then source length
        shapes = shapes[order]
        starts = [0, *(np.flatnonzero(shapes[1:] != shapes[:-1]) + 1).tolist()]
        self.shapes: dict[int, dict[int, slice]] = {}  # [target][source] -> part of the indices
        for start, end in zip(starts, [*starts[1:], len(shapes)], strict=True):
            target, source = (int(grid[number]) for number in divmod(int(shapes[start]), len(grid)))
            self.shapes.setdefault(target, {})[source] = slice(start, end)

    def epoch(self, epoch: int) -> Plan:
        """The batches of an epoch."""
        random = np.random.default_rng([self.seed, epoch])
        indices = np.empty_like(self.indices)
        cuts: list[tuple[int, int, int, int]] = []  # batches, their size, source, target length
        end = 0
        rest = indices[:0]  # left over from narrower targets
        for target, sources in self.shapes.items():
            cells = {source: self.indices[part] for source, part in sources.items()}
            cells = {source: random.permutation(cell) for source, cell in cells.items()}
            lengths = round_up(self.source[rest])
            for source in np.unique(lengths).tolist():
                cell = cells.get(source, rest[:0])
                cells[source] = np.concatenate([rest[lengths == source], cell])
            rest = rest[:0]  # left over from narrower sources
            for source, cell in sorted(cells.items(), key=itemgetter(0)):
                cell = np.concatenate([rest, cell])
                size = max(1, self.max_tokens // max(source, target))
                num_full = len(cell) // size
                full, rest = np.split(cell, [num_full * size])
                indices[end : end + len(full)] = full
                end += len(full)
                cuts.append((num_full, size, source, target))
        if len(rest):
            indices[end:] = rest
            cuts.append((1, len(rest), source, target))
        numbers = np.array(cuts, dtype=np.int32)
        numbers = np.repeat(numbers[:, 1:], numbers[:, 0], axis=0)  # a row a batch
        starts = np.cumsum(numbers[:, 0], dtype=np.int64) - numbers[:, 0]
        order = random.permutation(len(numbers))
        return Plan(
            indices, starts=starts[order], sizes=numbers[order, 0], lengths=numbers[order, 1:]
        )

    def padding_share(self, batches: Sequence[PlannedBatch]) -> float:
        """The share of positions, source and target, that hold padding."""
        indices = np.concatenate([batch.indices for batch in batches])
        filled = self.source[indices].sum(dtype=np.int64) + self.target[indices].sum(dtype=np.int64)
        total = sum(
            len(batch.indices) * (batch.source_length + batch.target_length) for batch in batches
        )
        return 1 - int(filled) / total


class Sequences:
    """The ids of many sentences, where Arrow has them: mapped from disk, never copied as a whole.

    Only their lengths are held in memory, 4 bytes a sentence.
    """

    def __init__(self, lists: "Iterable[pa.ListArray]") -> None:
        """``lists`` are the chunks of an Arrow column of lists of int32, without nulls."""
        chunks = [chunk for chunk in lists if len(chunk)]
        assert not any(chunk.null_count for chunk in chunks)
        self.offsets = [chunk.offsets.to_numpy(zero_copy_only=True) for chunk in chunks]
        self.values = [chunk.values.to_numpy(zero_copy_only=True) for chunk in chunks]
        self.first_rows = np.cumsum([0, *map(len, chunks)])[:-1]  # of every chunk
        self.lengths = np.concatenate([np.empty(0, np.int32), *map(np.diff, self.offsets)])

    def __getitem__(self, index: int) -> list[int]:
        return self.rows([index]).ids.tolist()

    def rows(self, indices: "Sequence[int] | np.ndarray") -> Rows:
        """The sequences of these numbers."""
        indices = np.asarray(indices)
        chunks = np.searchsorted(self.first_rows, indices, side="right") - 1
        places = indices - self.first_rows[chunks]
        parts = []
        for chunk, place in zip(chunks.tolist(), places.tolist(), strict=True):
            start, end = self.offsets[chunk][place : place + 2].tolist()
            parts.append(self.values[chunk][start:end])
        return Rows(np.concatenate(parts), self.lengths[indices])
