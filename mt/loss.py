"""Losses as sums, so that a step can divide once by all of its target tokens."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def cross_entropy(logits: Tensor, target: Tensor, *, smoothing: float = 0.0, ignore: int) -> Tensor:
    """The label-smoothed cross-entropy (Szegedy et al. 2016), summed over the targets.

    loss = (1 - smoothing) * -log p(target) + smoothing * mean over the vocabulary of -log p

    Args:
        logits: [..., V].
        target: [...], ids.
        ignore: the id of targets that do not count (padding).

    Returns: a scalar in fp32. Divide it by the number of targets that count.
    """
    logits, target = logits.flatten(0, -2), target.flatten()
    if logits.device.type == "cpu" and logits.requires_grad:
        return _CrossEntropy.apply(logits, target, smoothing, ignore)
    return F.cross_entropy(
        logits.float(), target, ignore_index=ignore, label_smoothing=smoothing, reduction="sum"
    )


class _CrossEntropy(torch.autograd.Function):
    """The same with its gradient made in the forward pass, in the precision of the logits.

    On the CPU the plain version reads and writes the [N, V] table about three times as often.
    The value is capped at 87 a target (a smaller probability is 0 in fp32), the gradient is not.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, smoothing: float, ignore: int) -> Tensor:
        keep = target != ignore
        index = target.unsqueeze(1)
        vocab_size = logits.size(1)
        grad = logits.softmax(1)
        # The sum's logarithm by way of the target's probability: rounding a probability to bf16
        # moves its logarithm by 0.004 at most, rounding the sum's logarithm itself by far more.
        log_true = grad.gather(1, index).squeeze(1).float().clamp_min(1e-38).log()
        log_norm = logits.gather(1, index).squeeze(1).float() - log_true
        log_mean = logits.sum(1).float() / vocab_size - log_norm
        loss = -(1 - smoothing) * log_true - smoothing * log_mean
        # d loss / d logits = softmax - (1 - smoothing) * onehot - smoothing / V
        grad.sub_(smoothing / vocab_size)
        grad.scatter_add_(1, index, grad.new_full(index.shape, smoothing - 1))
        grad.mul_(keep.unsqueeze(1))
        ctx.save_for_backward(grad)
        return torch.where(keep, loss, 0).sum()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grad_loss.to(grad.dtype), None, None, None


def length_loss(log_ratio: Tensor, source_lengths: Tensor, target_lengths: Tensor) -> Tensor:
    """Huber loss of the predicted log(target length / source length), summed over the sentences.

    All arguments are [B]; lengths count pieces including EOS.
    """
    true = (target_lengths / source_lengths).log()
    return F.huber_loss(log_ratio.float(), true, delta=0.5, reduction="sum")
