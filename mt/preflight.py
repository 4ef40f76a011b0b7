"""Before the first step: how large a batch fits, and whether the longest one does."""

import dataclasses
import logging
import resource
import sys
import time
from collections.abc import Sequence

import torch

from mt.batching import PlannedBatch
from mt.config import Config
from mt.corpus import Corpus
from mt.runtime import Runtime, is_out_of_memory
from mt.trainer import Trainer

CPU_BATCH_TOKENS = 1024  # what learns most in a minute there
MIN_STEPS_AN_EPOCH = 50  # however much memory there is
SHARE = 0.9  # of a GPU's memory that may be used

log = logging.getLogger(__name__)


def rehearse(trial: Trainer) -> None:
    """Take a step on the batches that need most memory, and tell what they took.

    ``trial`` is to be thrown away. Whoever would run out of memory in an hour does so now, and
    what has to be compiled is compiled.

    Raises: ValueError that says what helps, when memory runs out.
    """
    start = time.perf_counter()
    longest = _take_hardest(trial)
    log.info(
        "the longest batch, %d sentences of %d and %d pieces, fits; memory so far %.1f GB (%.1f s)",
        len(longest.indices),
        longest.source_length,
        longest.target_length,
        peak_memory(trial.runtime) / 1e9,
        time.perf_counter() - start,
    )


def _take_hardest(trial: Trainer) -> PlannedBatch:
    """Take a step on each of the hardest batches; return the longest. An epoch follows them."""
    epoch = trial.planned
    batches = hardest(epoch)
    trial.planned = [*(batch for batch in batches for _ in range(trial.config.train.accumulate))]
    for _ in batches:
        trial.train_step().computed.read()
    trial.planned, trial.position = epoch, 0
    return batches[0]


def hardest(planned: Sequence[PlannedBatch]) -> list[PlannedBatch]:
    """The batch with the longest sentences (attention grows with their square), and the fullest."""

    def length(batch: PlannedBatch) -> int:
        return batch.source_length + batch.target_length

    longest = max(planned, key=lambda batch: (length(batch), len(batch.indices)))
    fullest = max(planned, key=lambda batch: len(batch.indices) * length(batch))
    return [longest, fullest]


def largest_batch_tokens(config: Config, corpus: Corpus, runtime: Runtime) -> int:
    """The largest ``train.batch_tokens`` whose hardest batches fit into the GPUs' memory.

    It doubles while they do, then closes in on the limit. Larger than a fiftieth of the training
    text it does not get: an epoch should have some steps. One process finds out for all.
    """
    if runtime.device.type != "cuda":
        return CPU_BATCH_TOKENS
    alone = dataclasses.replace(runtime, rank=0, world_size=1)
    lengths = corpus.train.data.column("target_ids")
    num_pieces = sum(len(chunk.flatten()) + len(chunk) for chunk in lengths.chunks)
    limit = max(config.train.max_length, num_pieces // MIN_STEPS_AN_EPOCH)
    fitting, too_large = config.train.max_length, limit + 1
    while too_large - fitting > fitting // 16:
        tokens = min(2 * fitting, (fitting + too_large) // 2)
        share = -(-tokens // runtime.world_size)
        if _fits(with_batch_tokens(config, share), corpus, alone):
            fitting = tokens
        else:
            too_large = tokens
    log.info("train.batch_tokens=auto comes to %d", fitting)
    return fitting


def with_batch_tokens(config: Config, tokens: int | str) -> Config:
    """The same config with another ``train.batch_tokens``."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, batch_tokens=tokens))


def _fits(config: Config, corpus: Corpus, runtime: Runtime) -> bool:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(runtime.device)
    total = torch.cuda.get_device_properties(runtime.device).total_memory
    try:
        eager = dataclasses.replace(config.train, compile=False)  # which needs more memory
        _take_hardest(
            Trainer(dataclasses.replace(config, train=eager), corpus, runtime, max_steps=None)
        )
    except ValueError as error:
        if error.__cause__ is None or not is_out_of_memory(error.__cause__):
            raise
        return False
    return torch.cuda.max_memory_reserved(runtime.device) <= SHARE * total


def peak_memory(runtime: Runtime) -> int:
    """The most memory that this process has held, in bytes: of the GPU, or else of the machine."""
    if runtime.device.type == "cuda":
        return torch.cuda.max_memory_reserved(runtime.device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
