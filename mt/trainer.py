"""The training step, and all the state that it changes."""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mt.batching import Batch, BatchOrder, PlannedBatch, Sequences, load_batch
from mt.checkpoint import TrainerState, set_weights, unique_weights
from mt.config import Config, Precision, TrainConfig
from mt.corpus import Corpus
from mt.loss import cross_entropy, length_loss
from mt.model import Transformer
from mt.optim import build_optimizers, learning_rate_scale, set_learning_rate
from mt.runtime import Runtime, is_out_of_memory
from mt.tokenizer import PAD


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step did."""

    loss: Tensor  # [] summed over the target pieces
    length_loss: Tensor  # [] summed over the sentences
    gradient_norm: float  # before clipping
    learning_rate: float  # AdamW's
    num_tokens: int  # target pieces, without padding
    num_sentences: int
    num_positions: int  # source and target, with padding
    num_padding: int
    batches: Sequence[PlannedBatch]
    skipped: bool  # for a loss or gradient that is not finite


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


class Trainer:
    """A model in training.

    The weights that learn are fp32. In bf16 or fp16 a working copy of the model does the forward
    and backward pass: its weights are rounded from the fp32 ones after every step, and its
    gradients are added up in fp32. (Autocast would convert weights and activations in every
    layer instead, which takes a tenth of the time of a small model.)
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
        self.optimizers = build_optimizers(self.model, config.optim)
        self.scaler = torch.amp.GradScaler(
            runtime.device.type, enabled=runtime.precision is Precision.fp16
        )
        self.average: list[Tensor] | None = None  # of the weights, exponential
        if config.train.ema_decay is not None:
            self.average = [parameter.detach().clone() for parameter in self.parameters]

        self.sources = Sequences(corpus.train.data.column("source_ids").chunks)
        self.targets = Sequences(corpus.train.data.column("target_ids").chunks)
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
        self.planned = self.order.epoch(0)

    @property
    def parameters(self) -> list[Tensor]:
        """The fp32 weights."""
        return list(unique_weights(self.model).values())

    @property
    def epochs(self) -> float:
        """How often the training text has been seen."""
        return self.epoch + self.position / len(self.planned)

    def train_step(self) -> StepResult:
        """One optimizer step, over ``train.accumulate`` batches."""
        config = self.config.train
        planned = [self._next_batch() for _ in range(config.accumulate)]
        batches = [self._load(batch) for batch in planned]
        num_tokens = sum(batch.num_tokens for batch in batches)
        num_sentences = sum(len(batch.source) for batch in batches)
        rate = self._set_learning_rate()

        # Every loss is a sum, divided by what the whole step holds: how the sentences are dealt
        # into batches changes nothing.
        self.working.train()
        total = total_length = torch.zeros((), device=self.runtime.device)
        for batch in batches:
            with advice_on_memory(batch, config):
                loss, ratio_loss = self._losses(batch)
                objective = loss / num_tokens + config.length_loss * ratio_loss / num_sentences
                self.scaler.scale(objective).backward()
            self._collect_gradients()
            total, total_length = total + loss.detach(), total_length + ratio_loss.detach()

        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        max_norm = self.config.optim.clip_norm or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, max_norm))
        finite = math.isfinite(norm) and math.isfinite(float(total))
        if finite:
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
            self._publish()
        self.scaler.update()
        for parameter in self.parameters:
            parameter.grad = None
        self.step += 1
        filled = sum(int(self.order.source[batch.indices].sum()) for batch in planned) + num_tokens
        positions = sum(batch.source.numel() + batch.target_in.numel() for batch in batches)
        return StepResult(
            loss=total,
            length_loss=total_length,
            gradient_norm=norm,
            learning_rate=rate,
            num_tokens=num_tokens,
            num_sentences=num_sentences,
            num_positions=positions,
            num_padding=positions - filled,
            batches=planned,
            skipped=not finite,
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

    def _losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(cross-entropy summed over target pieces, length head's loss summed over sentences)"""
        model = self.working
        memory = model.encode(batch.source, batch.source_mask)
        states = model.decode(batch.target_in, memory, batch.source_mask)
        loss = cross_entropy(
            model.logits(states),
            batch.target_out,
            smoothing=self.config.train.label_smoothing,
            ignore=PAD,
        )
        if model.length_head is None:
            return loss, torch.zeros_like(loss)
        ratio_loss = length_loss(
            model.log_length_ratio(memory, batch.source_mask),
            batch.source_mask.sum(1),
            batch.target_mask.sum(1),
        )
        return loss, ratio_loss

    def _collect_gradients(self) -> None:
        """Add the working copy's gradients to the fp32 ones."""
        if self.working is self.model:
            return
        for own, worker in zip(self.parameters, self.working.parameters(), strict=True):
            if worker.grad is None:
                continue
            gradient = worker.grad.float()
            own.grad = gradient if own.grad is None else own.grad.add_(gradient)
            worker.grad = None

    @torch.no_grad()
    def _publish(self) -> None:
        """Give the new weights to the working copy and to the average."""
        if self.working is not self.model:
            torch._foreach_copy_(list(self.working.parameters()), self.parameters)
        if self.average is not None:
            assert self.config.train.ema_decay is not None
            # A short memory at first, else the average would remember the initial weights.
            decay = min(self.config.train.ema_decay, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(self.average, self.parameters, 1 - decay)

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
        tensors = {"random.cpu": torch.get_rng_state()}
        if self.runtime.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.runtime.device)
        if self.runtime.device.type == "mps":
            tensors["random.mps"] = torch.mps.get_rng_state()
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
            torch.set_rng_state(state.tensors["random.cpu"])
            if self.runtime.device.type == "cuda":
                torch.cuda.set_rng_state(state.tensors["random.cuda"], self.runtime.device)
            if self.runtime.device.type == "mps":
                torch.mps.set_rng_state(state.tensors["random.mps"])
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
