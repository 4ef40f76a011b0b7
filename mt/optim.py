"""Optimizers over the model's parameters, and the learning rate as a function of the step."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mt.config import OptimConfig, Optimizer, Schedule


def learning_rate_scale(step: int, config: OptimConfig, *, max_steps: int) -> float:
    """The learning rate of a step (from 0), as a share of its peak.

    It rises linearly over the warm-up (at most a quarter of all steps), then falls with 1/√step,
    a half cosine or a line; the last two reach ``final_lr_ratio`` at ``max_steps``.
    """
    warmup = min(config.warmup_steps, max_steps // 4)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule is Schedule.inverse_sqrt:
        return math.sqrt(max(warmup, 1) / (step + 1))
    progress = min(1.0, (step - warmup) / max(1, max_steps - warmup))
    if config.schedule is Schedule.cosine:
        left = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        left = 1 - progress
    return config.final_lr_ratio + (1 - config.final_lr_ratio) * left


def build_optimizers(model: nn.Module, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """AdamW for every parameter; or Muon for the matrices of encoder and decoder, AdamW for the
    embeddings, gains and biases.

    Weight decay acts on matrices only. Each parameter group remembers its ``peak_lr``.
    """
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    inner: dict[str, Tensor] = {}
    if config.algorithm is Optimizer.muon:
        inner = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.ndim == 2 and name.startswith(("encoder.", "decoder."))
        }
        chosen = {id(parameter) for parameter in inner.values()}
        matrices = [p for p in matrices if id(p) not in chosen]
    adamw = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
    optimizers: list[torch.optim.Optimizer] = [adamw]
    if inner:
        by_parts: dict[int, list[Tensor]] = {}
        for name, parameter in inner.items():
            num_parts = {"qkv": 3, "key_value": 2}.get(name.split(".")[-2], 1)
            by_parts.setdefault(num_parts, []).append(parameter)
        groups = [
            {"params": parameters, "num_parts": num_parts}
            for num_parts, parameters in by_parts.items()
        ]
        optimizers.append(Muon(groups, lr=config.muon_lr, weight_decay=config.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], scale: float) -> None:
    """Set every group's learning rate to a share of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * scale


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalized (Jordan et al. 2024), for matrices.

    Matrices of one shape are orthogonalized together, as a batch: at the sizes of a translation
    model the many small products would otherwise cost more than the steps saved. A map that
    makes several things at once (queries, keys and values) has so many ``num_parts``, which are
    orthogonalized apart.
    The update is scaled to the size of AdamW's: 0.2 · √max(rows, columns) (Liu et al. 2025).

    Like PyTorch's fused AdamW it looks at ``found_inf``: a scalar on the device, 1.0 where this
    step must change nothing.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "num_parts": 1,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        assert closure is None
        keep: Tensor | float = 1.0 if self.found_inf is None else 1.0 - self.found_inf
        by_shape: dict[torch.Size, list[tuple[Tensor, Tensor, float]]] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state: dict[str, Any] = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                gradient = parameter.grad
                if self.found_inf is not None:
                    gradient.nan_to_num_(0.0, 0.0, 0.0)
                average = state["momentum"]
                average.lerp_(gradient, (1 - group["momentum"]) * keep)
                update = gradient.lerp(average, group["momentum"])  # Nesterov's
                if group["weight_decay"]:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"] * keep)
                parts = zip(
                    parameter.chunk(group["num_parts"]),
                    update.chunk(group["num_parts"]),
                    strict=True,
                )
                for part, part_update in parts:
                    by_shape.setdefault(part.shape, []).append((part, part_update, group["lr"]))
        for shape, entries in by_shape.items():
            updates = orthogonalize(torch.stack([update for _, update, _ in entries])) * keep
            size = 0.2 * math.sqrt(max(shape))
            for (part, _, rate), update in zip(entries, updates, strict=True):
                part.add_(update, alpha=-rate * size)


def orthogonalize(matrices: Tensor, *, num_iterations: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices of a batch [N, R, C], by a Newton-Schulz iteration.

    The quintic's coefficients are Jordan's: they pull all singular values to about 1 (0.7 to 1.2)
    in five iterations, in bf16.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16()
    tall = x.size(1) > x.size(2)
    if tall:
        x = x.transpose(1, 2)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(num_iterations):
        gram = x @ x.transpose(1, 2)
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, poly, x, beta=a)
    if tall:
        x = x.transpose(1, 2)
    return x.to(matrices.dtype)
