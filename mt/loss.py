"""Losses as sums, so that a step can divide once by all of its target tokens."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 1 << 24  # logits that the CPU has at once, where the loss makes its own gradient


def cross_entropy(logits: Tensor, target: Tensor, *, smoothing: float = 0.0, ignore: int) -> Tensor:
    """The label-smoothed cross-entropy (Szegedy et al. 2016), summed over the targets.

    loss = (1 - smoothing) * -log p(target) + smoothing * mean over the vocabulary of -log p

    Args:
        logits: [..., V].
        target: [...], ids.
        ignore: the id of targets that do not count (padding).

    Returns: a scalar in fp32. Divide it by the number of targets that count.
    """
    return F.cross_entropy(
        logits.flatten(0, -2).float(),
        target.flatten(),
        ignore_index=ignore,
        label_smoothing=smoothing,
        reduction="sum",
    )


def linear_cross_entropy(
    states: Tensor, table: Tensor, target: Tensor, *, smoothing: float = 0.0, ignore: int
) -> Tensor:
    """The cross-entropy of the logits that an output map makes of states.

    Args: states [..., D], table [V, D]; the rest and the result as in :func:`cross_entropy`.

    On the CPU the gradient is made together with the loss: the table of logits, by far the
    largest tensor of a step, is written and read as seldom as possible and not kept.
    """
    if states.device.type == "cpu" and states.requires_grad and not torch.compiler.is_compiling():
        return _LinearCrossEntropy.apply(
            states.flatten(0, -2), table, target.flatten(), smoothing, ignore
        )
    return cross_entropy(F.linear(states, table), target, smoothing=smoothing, ignore=ignore)


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and gradient in one pass over the logits, some rows at a time.

    Products are in the precision of the states. The value is capped at 87 a target (a smaller
    probability is 0 in fp32), the gradient is not.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, table: Tensor, target: Tensor, smoothing: float, ignore: int
    ) -> Tensor:
        num_rows = max(1, min(len(states), CHUNK // len(table)))
        logits = states.new_empty(num_rows, len(table))
        exact = torch.promote_types(states.dtype, torch.float32)
        keep = (target != ignore).to(exact).unsqueeze(1)
        mean_row = table.mean(0, dtype=exact)  # its product with a state is the mean of the logits
        means = states.to(exact) @ mean_row
        loss = torch.zeros((), dtype=exact, device=states.device)
        grad_states, grad_table = torch.empty_like(states), torch.empty_like(table)
        for start in range(0, len(states), num_rows):
            rows = slice(start, start + num_rows)
            some = states[rows]
            gradient = logits[: len(some)]
            torch.mm(some, table.t(), out=gradient)
            loss += _to_gradient(gradient, means[rows], target[rows], keep[rows], smoothing)
            torch.mm(gradient, table, out=grad_states[rows])
            beta = 0 if start == 0 else 1  # the first chunk's product, then the sum
            torch.addmm(grad_table, gradient.t(), some, beta=beta, out=grad_table)
        # What smoothing takes from every logit's gradient, keep * smoothing / V, is of rank one.
        grad_states -= keep * (smoothing * mean_row)
        grad_table -= (keep.t() @ states.to(exact)) * (smoothing / len(table))
        ctx.save_for_backward(grad_states, grad_table)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_states, grad_table = ctx.saved_tensors
        return grad_states * grad_loss, grad_table * grad_loss, None, None, None


def _to_gradient(
    logits: Tensor, means: Tensor, target: Tensor, keep: Tensor, smoothing: float
) -> Tensor:
    """Turn logits [N, V] into the gradient of the loss by them; return the loss.

    d loss / d logits = softmax - (1 - smoothing) * onehot, less smoothing / V everywhere, which is
    left to the caller. ``means`` [N] are the means of the logits; ``keep`` [N, 1] is 1 for the
    targets that count, 0 for the others.
    """
    places = torch.arange(0, logits.numel(), logits.size(1), device=target.device) + target
    true_logits = logits.flatten()[places].to(means.dtype)
    softmax = torch.softmax(logits, 1, out=logits)
    true = softmax.flatten()[places].to(means.dtype)
    # The sum's logarithm by way of the target's probability: rounding a probability to bf16
    # moves its logarithm by 0.004 at most, rounding the sum's logarithm itself by far more.
    log_true = true.clamp_min(1e-38).log()
    log_mean = means - (true_logits - log_true)
    losses = -(1 - smoothing) * log_true - smoothing * log_mean

    softmax.flatten()[places] = (true - (1 - smoothing)).to(softmax.dtype)
    softmax.index_fill_(0, (keep == 0).flatten().nonzero().flatten(), 0.0)
    return torch.where(keep.flatten() > 0, losses, 0).sum()


def length_loss(log_ratio: Tensor, source_lengths: Tensor, target_lengths: Tensor) -> Tensor:
    """Huber loss of the predicted log(target length / source length), summed over the sentences.

    All arguments are [B]; lengths count pieces including EOS.
    """
    true = (target_lengths / source_lengths).log()
    return F.huber_loss(log_ratio.float(), true, delta=0.5, reduction="sum")
