"""The training step, and all the state that it changes."""

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mt.batching import Batch, BatchOrder, PlannedBatch, Sequences, load_batch
from mt.checkpoint import TrainerState, set_weights, unique_weights
from mt.config import Config, Precision, TrainConfig
from mt.corpus import Corpus
from mt.loss import length_loss, linear_cross_entropy
from mt.model import Transformer
from mt.optim import build_optimizers, learning_rate_scale, set_learning_rate
from mt.ranks import add_up, shared
from mt.runtime import Runtime, compiles, is_out_of_memory
from mt.tokenizer import PAD


class OnTheWay:
    """A few numbers on their way from the device to the host, which need not wait for them."""

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers.to("cpu", non_blocking=True)
        self.arrival = torch.cuda.Event() if numbers.is_cuda else None
        if self.arrival is not None:
            self.arrival.record()

    def read(self) -> list[float]:
        """The numbers, as soon as the device has come to them."""
        if self.arrival is not None:
            self.arrival.synchronize()
        return self.numbers.tolist()


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step did, all processes together."""

    step: int  # its number, from 1
    learning_rate: float  # AdamW's
    num_tokens: int  # target pieces, without padding
    num_sentences: int
    num_positions: int  # source and target, with padding
    num_padding: int
    batches: Sequence[PlannedBatch]
    computed: OnTheWay  # what the properties below read; the first look waits for the device

    @property
    def loss(self) -> float:
        """Summed over the target pieces."""
        return self.computed.read()[0]

    @property
    def length_loss(self) -> float:
        """Summed over the sentences."""
        return self.computed.read()[1]

    @property
    def gradient_norm(self) -> float:
        """Before clipping."""
        return self.computed.read()[2]

    @property
    def skipped(self) -> bool:
        """Whether the loss or a gradient was not finite, so that the step changed nothing."""
        return bool(self.computed.read()[3])


class Losses(nn.Module):
    """A model with its losses as one module: what is compiled, and what processes share."""

    def __init__(self, model: Transformer, *, smoothing: float) -> None:
        super().__init__()
        self.model = model
        self.smoothing = smoothing

    def forward(
        self,
        source: Tensor,
        target_in: Tensor,
        target_out: Tensor,
        source_mask: Tensor,
        target_mask: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Arguments as in :class:`Batch` -> (cross-entropy summed over the target pieces, the
        length head's loss summed over the sentences)."""
        memory = self.model.encode(source, source_mask)
        states = self.model.decode(target_in, memory, source_mask)
        loss = linear_cross_entropy(
            states, self.model.output_table, target_out, smoothing=self.smoothing, ignore=PAD
        )
        if self.model.length_head is None:
            return loss, torch.zeros_like(loss)
        ratios = self.model.log_length_ratio(memory, source_mask)
        return loss, length_loss(ratios, source_mask.sum(1), target_mask.sum(1))


@contextmanager
def advice_on_memory(batch: Batch, config: TrainConfig) -> Iterator[None]:
    """Turn running out of memory into a ValueError that says on which batch, and what helps."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        (num_sentences, source_length), target_length = batch.source.shape, batch.target_in.size(1)
        raise ValueError(
            f"out of memory on a batch of {num_sentences} sentences, source length "
            f"{source_length}, target length {target_length}; lower train.batch_tokens (now "
            f"{config.batch_tokens}) and raise train.accumulate (now {config.accumulate}) by the "
            "same factor, or lower train.max_length"
        ) from error


def deal(batch: PlannedBatch, *, rank: int, world_size: int) -> tuple[PlannedBatch, bool]:
    """(a process's rows of a batch, in the batch's shape; whether they count).

    All processes have about the same to do. One that gets no row of a small batch does a row that
    does not count: every process must take part in every exchange of gradients.
    """
    indices = batch.indices[rank::world_size]
    if len(indices):
        return dataclasses.replace(batch, indices=indices), True
    return dataclasses.replace(batch, indices=batch.indices[:1]), False


class Trainer:
    """A model in training.

    The weights that learn are fp32. In bf16 or fp16 a working copy of the model does the forward
    and backward pass: its weights are rounded from the fp32 ones after every step, and its
    gradients are added up in fp32. (Autocast would convert weights and activations in every
    layer instead, which takes a tenth of the time of a small model.)

    Several processes hold the same weights. Each of them does its rows of every batch; gradients
    and losses are added up, and all take the same step.
    """

    def __init__(
        self, config: Config, corpus: Corpus, runtime: Runtime, *, max_steps: int | None
    ) -> None:
        """``max_steps`` shapes the learning rate; None where no more than warm-up is needed."""
        self.config = config
        self.runtime = runtime
        self.max_steps = max_steps
        torch.manual_seed(config.train.seed)
        self.model = Transformer(config.model, vocab_size=len(corpus.tokenizer)).to(runtime.device)
        self.working = self.model
        if runtime.precision is not Precision.fp32:
            self.working = copy.deepcopy(self.model).to(runtime.dtype)
        self.losses: nn.Module = Losses(self.working, smoothing=config.train.label_smoothing)
        if compiles(config.train.compile, runtime.device):
            # Lengths and sizes stay symbols: one compilation, where every shape would have its own.
            self.losses = torch.compile(self.losses, dynamic=True)  # type: ignore[assignment]
        if runtime.world_size > 1:
            self.losses = shared(self.losses)
        self.optimizers = build_optimizers(self.model, config.optim)
        self.scaler = torch.amp.GradScaler(
            runtime.device.type, enabled=runtime.precision is Precision.fp16
        )
        self.average: list[Tensor] | None = None  # of the weights, exponential
        if config.train.ema_decay is not None:
            self.average = [parameter.detach().clone() for parameter in self.parameters]

        self.sources = Sequences(corpus.train.data.column("source_ids").chunks)
        self.targets = Sequences(corpus.train.data.column("target_ids").chunks)
        assert isinstance(config.train.batch_tokens, int)  # auto is resolved by now
        self.order = BatchOrder(
            self.sources.lengths + 1,  # EOS
            self.targets.lengths + 1,
            max_tokens=config.train.batch_tokens,
            max_length=config.train.max_length,
            seed=config.train.seed,
        )
        self.step = 0
        self.epoch = 0
        self.position = 0  # of the next batch in the epoch
        self.planned: Sequence[PlannedBatch] = self.order.epoch(0)

    @property
    def parameters(self) -> list[Tensor]:
        """The fp32 weights."""
        return list(unique_weights(self.model).values())

    @property
    def epochs(self) -> float:
        """How often the training text has been seen."""
        return self.epoch + self.position / len(self.planned)

    def train_step(self) -> StepResult:
        """One optimizer step, over ``train.accumulate`` batches.

        The host does not wait for the device anywhere in it: whether the step was finite decides
        on the device if it counts, and :class:`StepResult` tells when asked.
        """
        config = self.config.train
        planned = [self._next_batch() for _ in range(config.accumulate)]
        indices = np.concatenate([batch.indices for batch in planned])
        num_tokens, num_sentences = int(self.order.target[indices].sum()), len(indices)
        rate = self._set_learning_rate()
        self._seed_dropout()

        # Every loss is a sum, divided by what the whole step holds: how the sentences are dealt
        # into batches, and batches among processes, changes nothing. What is shared is the mean
        # of the processes' gradients, so each loss is multiplied by their number.
        self.working.train()
        total = torch.zeros(2, device=self.runtime.device)
        for whole in planned:
            part, counts = deal(whole, rank=self.runtime.rank, world_size=self.runtime.world_size)
            batch = self._load(part)
            with advice_on_memory(batch, config):
                loss, ratio_loss = self._losses(batch)
                objective = loss / num_tokens + config.length_loss * ratio_loss / num_sentences
                weight = self.runtime.world_size * counts
                self.scaler.scale(weight * objective).backward()
            self._collect_gradients()
            total += counts * torch.stack([loss.detach(), ratio_loss.detach()])

        if self.runtime.world_size > 1:
            add_up(total)
        norm, skipped = self._clip_gradients(total)
        for optimizer in self.optimizers:
            optimizer.found_inf = skipped  # type: ignore[attr-defined]
            optimizer.step()
        self.scaler.update()
        self._publish(skipped)
        self.step += 1
        positions = sum(
            len(batch.indices) * (batch.source_length + batch.target_length) for batch in planned
        )
        return StepResult(
            step=self.step,
            learning_rate=rate,
            num_tokens=num_tokens,
            num_sentences=num_sentences,
            num_positions=positions,
            num_padding=positions - num_tokens - int(self.order.source[indices].sum()),
            batches=planned,
            computed=OnTheWay(torch.cat([total, torch.stack([norm, skipped])])),
        )

    def _next_batch(self) -> PlannedBatch:
        if self.position == len(self.planned):
            self.epoch += 1
            self.position = 0
            self.planned = self.order.epoch(self.epoch)
        self.position += 1
        return self.planned[self.position - 1]

    def _load(self, planned: PlannedBatch) -> Batch:
        return load_batch(self.sources, self.targets, planned).to(self.runtime.device)

    def _set_learning_rate(self) -> float:
        scale = learning_rate_scale(
            self.step, self.config.optim, max_steps=self.max_steps or 1 << 40
        )
        set_learning_rate(self.optimizers, scale)
        return self.config.optim.lr * scale

    def _seed_dropout(self) -> None:
        """Make what is dropped a function of the seed and the step alone, as the batches are."""
        entropy = [self.config.train.seed, self.step]
        if self.runtime.rank > 0:
            entropy.append(self.runtime.rank)
        numbers = np.random.SeedSequence(entropy)
        torch.manual_seed(int(numbers.generate_state(1, np.uint64)[0] >> np.uint64(1)))

    def _losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.losses(
            batch.source, batch.target_in, batch.target_out, batch.source_mask, batch.target_mask
        )

    def _collect_gradients(self) -> None:
        """Add the working copy's gradients to the fp32 ones."""
        if self.working is self.model:
            return
        sums: list[Tensor] = []
        gradients: list[Tensor] = []
        first = True
        for own, worker in zip(self.parameters, self.working.parameters(), strict=True):
            if worker.grad is None:
                continue
            first = own.grad is None
            if own.grad is None:
                own.grad = torch.empty_like(own)
            sums.append(own.grad)
            gradients.append(worker.grad)
        if first:
            torch._foreach_copy_(sums, gradients)
        else:
            torch._foreach_add_(sums, gradients)
        for worker in self.working.parameters():
            worker.grad = None

    def _clip_gradients(self, total: Tensor) -> tuple[Tensor, Tensor]:
        """(the gradient's norm, 1.0 where it or a loss of ``total`` is not finite, else 0.0)"""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.config.optim.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.config.optim.clip_norm, norm)
        return norm, 1.0 - (norm.isfinite() & total.isfinite().all()).float()

    @torch.no_grad()
    def _publish(self, skipped: Tensor) -> None:
        """Give the new weights to the working copy and to the average; forget the gradients."""
        for parameter in self.parameters:
            parameter.grad = None
        if self.working is not self.model:
            torch._foreach_copy_(list(self.working.parameters()), self.parameters)
        if self.average is not None:
            assert self.config.train.ema_decay is not None
            # A short memory at first, else the average would remember the initial weights.
            decay = min(self.config.train.ema_decay, (1 + self.step) / (10 + self.step))
            share = (1 - decay) * (1.0 - skipped)
            for average, parameter in zip(self.average, self.parameters, strict=True):
                average.lerp_(parameter, share)

    def weights(self) -> dict[str, Tensor]:
        """The weights to use: the exponential average where there is one."""
        own = unique_weights(self.model)
        if self.average is None:
            return own
        return dict(zip(own, self.average, strict=True))

    def model_to_use(self) -> Transformer:
        """An fp32 model with the weights to use, in eval mode."""
        if self.average is None:
            return self.model.eval()
        model = copy.deepcopy(self.model).eval()
        with torch.no_grad():
            torch._foreach_copy_(list(model.parameters()), self.average)
        return model

    def state(self) -> TrainerState:
        """Everything that the next steps depend on."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in unique_weights(self.model).items():
            tensors[f"weights.{name}"] = parameter
        for number, optimizer in enumerate(self.optimizers):
            for index, entries in optimizer.state_dict()["state"].items():
                for key, tensor in entries.items():
                    tensors[f"optimizer.{number}.{index}.{key}"] = tensor
        values = {
            "step": self.step,
            "epoch": self.epoch,
            "position": self.position,
            "scaler": self.scaler.state_dict(),
        }
        return TrainerState(tensors=tensors, values=values)

    def restore(self, state: TrainerState, *, weights: dict[str, Tensor], origin: Any) -> None:
        """Go on from a state; ``weights`` are those to use (the average, if there is one).

        Raises: ValueError when it is the state of another model.
        """
        own = {
            name.removeprefix("weights."): tensor
            for name, tensor in state.tensors.items()
            if name.startswith("weights.")
        }
        set_weights(self.model, own, origin=origin)
        if self.average is not None:
            self.average = [
                weights[name].to(self.runtime.device) for name in unique_weights(self.model)
            ]
        try:
            self._restore_optimizers(state.tensors)
            self.step = state.values["step"]
            self.epoch = state.values["epoch"]
            self.position = state.values["position"]
            self.scaler.load_state_dict(state.values["scaler"])
        except KeyError as error:
            raise ValueError(f"the trainer state in {origin} is not complete: {error}") from error
        self.planned = self.order.epoch(self.epoch)
        if self.working is not self.model:
            with torch.no_grad():
                torch._foreach_copy_(list(self.working.parameters()), self.parameters)

    def _restore_optimizers(self, tensors: dict[str, Tensor]) -> None:
        for number, optimizer in enumerate(self.optimizers):
            entries: dict[int, dict[str, Tensor]] = {}
            for name, tensor in tensors.items():
                if name.startswith(f"optimizer.{number}."):
                    _, _, index, key = name.split(".", 3)
                    entries.setdefault(int(index), {})[key] = tensor
            saved = optimizer.state_dict()
            optimizer.load_state_dict({"state": entries, "param_groups": saved["param_groups"]})
