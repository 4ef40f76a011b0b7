"""The losses against PyTorch's own, and as sums."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mt.loss import cross_entropy, length_loss

PAD = 0


def example(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Logits [3, 5, 11] and targets with padding."""
    torch.manual_seed(1)
    logits = (3 * torch.randn(3, 5, 11, dtype=torch.float64)).to(dtype).requires_grad_()
    target = torch.randint(1, 11, (3, 5))
    target[0, 3:] = PAD
    target[2, 1:] = PAD
    return logits, target


def reference(logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
    return F.cross_entropy(
        logits.flatten(0, 1),
        target.flatten(),
        ignore_index=PAD,
        label_smoothing=smoothing,
        reduction="sum",
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_loss_and_gradient_are_pytorchs(dtype: torch.dtype, smoothing: float) -> None:
    logits, target = example(dtype)
    loss = cross_entropy(logits, target, smoothing=smoothing, ignore=PAD)
    expected = reference(logits, target, smoothing)
    torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-5, atol=1e-5)
    # A factor checks that the gradient is scaled by what comes from above.
    (gradient,) = torch.autograd.grad(loss * 3, logits)
    (expected_gradient,) = torch.autograd.grad(expected * 3, logits)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_with_and_without_a_gradient_it_is_the_same(smoothing: float) -> None:
    logits, target = example(torch.float32)
    with_gradient = cross_entropy(logits, target, smoothing=smoothing, ignore=PAD)
    without = cross_entropy(logits.detach(), target, smoothing=smoothing, ignore=PAD)
    torch.testing.assert_close(with_gradient, without)


def test_the_gradient_is_the_slope() -> None:
    logits, target = example()
    cross_entropy(logits, target, smoothing=0.1, ignore=PAD).backward()
    generator = torch.Generator().manual_seed(2)
    direction = torch.randn(logits.shape, dtype=torch.float64, generator=generator)
    ahead, behind = (
        float(reference(logits.detach() + step * direction, target, 0.1)) for step in (1e-5, -1e-5)
    )
    assert float((logits.grad * direction).sum()) == pytest.approx(
        (ahead - behind) / 2e-5, rel=1e-6
    )


def test_bf16_is_close_in_loss_and_gradient() -> None:
    logits, target = example(torch.bfloat16)
    loss = cross_entropy(logits, target, smoothing=0.1, ignore=PAD)
    assert loss.dtype == torch.float32
    exact = logits.detach().double().requires_grad_()
    expected = reference(exact, target, 0.1)
    assert loss.item() == pytest.approx(expected.item(), rel=0.01)
    loss.backward()
    expected.backward()
    assert logits.grad.dtype == torch.bfloat16
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("requires_grad", [True, False])
def test_what_is_ignored_counts_for_nothing(requires_grad: bool) -> None:
    logits, target = example(torch.float32)
    logits = logits.detach()
    changed = torch.where((target == PAD)[..., None], torch.full_like(logits, 50.0), logits)
    losses = [
        cross_entropy(table.requires_grad_(requires_grad), target, smoothing=0.1, ignore=PAD)
        for table in (logits, changed)
    ]
    torch.testing.assert_close(*losses)
    if requires_grad:
        losses[0].backward()
        assert (logits.grad[target == PAD] == 0).all()
        assert (logits.grad[target != PAD] != 0).all()


def test_everything_ignored_is_zero() -> None:
    logits, _ = example(torch.float32)
    loss = cross_entropy(logits, torch.zeros(3, 5, dtype=torch.long), smoothing=0.1, ignore=PAD)
    loss.backward()
    assert loss.item() == 0
    assert (logits.grad == 0).all()


def test_it_is_a_sum() -> None:
    logits, target = example(torch.float32)
    whole = cross_entropy(logits, target, smoothing=0.1, ignore=PAD)
    parts = [cross_entropy(logits[row], target[row], smoothing=0.1, ignore=PAD) for row in range(3)]
    torch.testing.assert_close(whole, sum(parts))


def test_a_hopeless_target_gives_a_large_but_finite_loss() -> None:
    logits = torch.tensor([[0.0, 500.0, -500.0]], requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([2]), ignore=PAD)
    loss.backward()
    assert 50 < loss.item() < float("inf")
    torch.testing.assert_close(logits.grad, torch.tensor([[0.0, 1.0, -1.0]]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_logit_that_is_not_finite_shows_in_the_loss(bad: float) -> None:
    logits = torch.zeros(2, 5)
    logits[1, 3] = bad
    loss = cross_entropy(logits.requires_grad_(), torch.tensor([1, 2]), smoothing=0.1, ignore=PAD)
    loss.backward()
    assert not loss.isfinite()
    assert not logits.grad.isfinite().all()


def test_length_loss_is_zero_for_the_truth_and_a_sum() -> None:
    source, target = torch.tensor([4, 5, 10]), torch.tensor([8, 5, 3])
    truth = (target / source).log()
    assert float(length_loss(truth, source, target)) == pytest.approx(0, abs=1e-6)
    guess = truth + torch.tensor([0.1, -0.2, 3.0])
    single = [float(length_loss(guess[[i]], source[[i]], target[[i]])) for i in range(3)]
    assert float(length_loss(guess, source, target)) == pytest.approx(sum(single))
    assert single[0] < single[1] < single[2]
    # Far from the truth it grows like a line: an outlier has a bounded pull.
    far, farther = (
        float(length_loss(truth[:1] + distance, source[:1], target[:1])) for distance in (4, 8)
    )
    assert farther < 2.2 * far
    assert float(length_loss(-truth, source, target)) > 0.1  # not the inverse ratio
