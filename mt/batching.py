"""Sentences of similar length into batches, in an order that can be resumed anywhere.

Shapes: B sentences, S source positions, T target positions.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

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
        """The same batch on a device."""
        return Batch(
            source=self.source.to(device, non_blocking=True),
            target_in=self.target_in.to(device, non_blocking=True),
            target_out=self.target_out.to(device, non_blocking=True),
            source_mask=self.source_mask.to(device, non_blocking=True),
            target_mask=self.target_mask.to(device, non_blocking=True),
            num_tokens=self.num_tokens,
        )


def pad(sequences: Sequence[Sequence[int]], *, length: int = 0) -> Tensor:
    """Sequences of ids as one tensor [B, longest or ``length``], filled up with PAD."""
    width = max(length, max(map(len, sequences)))
    table = np.full((len(sequences), width), PAD, dtype=np.int64)
    for row, sequence in zip(table, sequences, strict=True):
        row[: len(sequence)] = sequence
    return torch.from_numpy(table)


def collate(
    source_ids: Sequence[Sequence[int]],
    target_ids: Sequence[Sequence[int]],
    *,
    source_length: int = 0,
    target_length: int = 0,
) -> Batch:
    """Pieces without BOS and EOS -> a batch, padded to the lengths given or the longest there."""
    source = pad([[*ids, EOS] for ids in source_ids], length=source_length)
    target_out = pad([[*ids, EOS] for ids in target_ids], length=target_length)
    target_in = pad([[BOS, *ids] for ids in target_ids], length=target_length)
    target_mask = target_out != PAD
    return Batch(
        source=source,
        target_in=target_in,
        target_out=target_out,
        source_mask=source != PAD,
        target_mask=target_mask,
        num_tokens=int(target_mask.sum()),
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


class BatchOrder:
    """Which sentences make which batch of an epoch: a pure function of (seed, epoch).

    Batches come in few shapes, since every new shape costs time: the CPU's matrix library
    compiles a kernel for each, a compiled GPU model is compiled again. Both lengths are rounded up
    to a grid; pairs of the same rounded lengths are shuffled and cut into batches of at most
    ``max_tokens`` on either side, padding included; what is left over joins the next larger shape;
    last, the batches are shuffled.
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
        self.source = np.asarray(source_lengths, dtype=np.int64)
        self.target = np.asarray(target_lengths, dtype=np.int64)
        fits = np.maximum(self.source, self.target) <= max_length
        self.indices = np.flatnonzero(fits)
        self.num_too_long = int(len(fits) - len(self.indices))
        if len(self.indices) == 0:
            raise ValueError(
                f"no training pair has at most train.max_length={max_length} pieces a side; "
                "raise train.max_length"
            )
        self.max_tokens = max_tokens
        self.seed = seed

    def epoch(self, epoch: int) -> list[PlannedBatch]:
        """The batches of an epoch."""
        random = np.random.default_rng([self.seed, epoch])
        indices = random.permutation(self.indices)
        source, target = round_up(self.source[indices]), round_up(self.target[indices])
        # The sort is stable: pairs of the same shape stay shuffled.
        order = np.lexsort((source, target))
        indices, source, target = indices[order], source[order], target[order]

        batches: list[PlannedBatch] = []
        rest = np.empty(0, dtype=np.int64)  # left over from narrower targets
        width = height = 0
        for row in np.split(np.arange(len(indices)), np.flatnonzero(np.diff(target)) + 1):
            height = int(target[row[0]])
            members = np.concatenate([rest, indices[row]])
            widths = round_up(self.source[members])
            rest = members[:0]  # left over from narrower sources
            for width in np.unique(widths).tolist():
                cell = np.concatenate([rest, members[widths == width]])
                size = max(1, self.max_tokens // max(width, height))
                num_full = len(cell) // size
                batches += [
                    PlannedBatch(part, source_length=width, target_length=height)
                    for part in cell[: num_full * size].reshape(num_full, size)
                ]
                rest = cell[num_full * size :]
        if len(rest):
            batches.append(PlannedBatch(rest, source_length=width, target_length=height))
        return [batches[index] for index in random.permutation(len(batches))]

    def padding_share(self, batches: Sequence[PlannedBatch]) -> float:
        """The share of positions, source and target, that hold padding."""
        filled = sum(
            int(self.source[batch.indices].sum() + self.target[batch.indices].sum())
            for batch in batches
        )
        total = sum(
            len(batch.indices) * (batch.source_length + batch.target_length) for batch in batches
        )
        return 1 - filled / total


class Sequences:
    """The ids of many sentences in one flat array."""

    def __init__(self, lists: "Iterable[pa.ListArray]") -> None:
        """``lists`` are the chunks of an Arrow column of lists of int32."""
        chunks = list(lists)
        self.lengths = _joined([chunk.value_lengths().to_numpy() for chunk in chunks], np.int64)
        self.values = _joined([chunk.flatten().to_numpy() for chunk in chunks], np.int32)
        self.ends = np.cumsum(self.lengths)

    def __getitem__(self, index: int) -> list[int]:
        end = self.ends[index]
        return self.values[end - self.lengths[index] : end].tolist()


def _joined(arrays: Sequence[np.ndarray], dtype: type[np.integer]) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *arrays]).astype(dtype, copy=False)
