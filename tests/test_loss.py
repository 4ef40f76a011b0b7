"""The losses against PyTorch's own, and as sums."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mt import loss as losses
from mt.loss import cross_entropy, length_loss, linear_cross_entropy

PAD = 0

CHUNKS = pytest.mark.parametrize("chunk", [1, 40, 1 << 24])  # logits at once; there are 165


def example(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """States [3, 5, 7], an output map [11, 7], and targets [3, 5] with padding."""
    torch.manual_seed(1)
    states = torch.randn(3, 5, 7, dtype=torch.float64).to(dtype).requires_grad_()
    table = torch.randn(11, 7, dtype=torch.float64).to(dtype).requires_grad_()
    target = torch.randint(1, 11, (3, 5))
    target[0, 3:] = PAD
    target[2, 1:] = PAD
    return states, table, target


def reference(states: Tensor, table: Tensor, target: Tensor, smoothing: float) -> Tensor:
    return F.cross_entropy(
        (states @ table.t()).flatten(0, 1),
        target.flatten(),
        ignore_index=PAD,
        label_smoothing=smoothing,
        reduction="sum",
    )


@CHUNKS
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_loss_and_gradients_are_pytorchs(
    dtype: torch.dtype, smoothing: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "CHUNK", chunk)
    states, table, target = example(dtype)
    loss = linear_cross_entropy(states, table, target, smoothing=smoothing, ignore=PAD)
    expected = reference(states, table, target, smoothing)
    torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-5, atol=1e-5)
    # A factor checks that the gradients are scaled by what comes from above.
    gradients = torch.autograd.grad(loss * 3, (states, table))
    expected_gradients = torch.autograd.grad(expected * 3, (states, table))
    torch.testing.assert_close(gradients, expected_gradients)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_with_and_without_a_gradient_it_is_the_same(smoothing: float) -> None:
    states, table, target = example(torch.float32)
    with_gradient = linear_cross_entropy(states, table, target, smoothing=smoothing, ignore=PAD)
    with torch.no_grad():
        logits = states @ table.t()
    plain = cross_entropy(logits, target, smoothing=smoothing, ignore=PAD)
    fixed = linear_cross_entropy(
        states.detach(), table.detach(), target, smoothing=smoothing, ignore=PAD
    )
    torch.testing.assert_close(with_gradient, plain)
    torch.testing.assert_close(with_gradient, fixed)


def test_the_gradient_is_the_slope() -> None:
    states, table, target = example()
    linear_cross_entropy(states, table, target, smoothing=0.1, ignore=PAD).backward()
    generator = torch.Generator().manual_seed(2)
    direction = torch.randn(states.shape, dtype=torch.float64, generator=generator)
    ahead, behind = (
        float(reference(states.detach() + step * direction, table.detach(), target, 0.1))
        for step in (1e-5, -1e-5)
    )
    assert float((states.grad * direction).sum()) == pytest.approx(
        (ahead - behind) / 2e-5, rel=1e-6
    )


@CHUNKS
def test_bf16_is_close_in_loss_and_gradients(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK", chunk)
    states, table, target = example(torch.bfloat16)
    loss = linear_cross_entropy(states, table, target, smoothing=0.1, ignore=PAD)
    assert loss.dtype == torch.float32
    exact = [tensor.detach().double().requires_grad_() for tensor in (states, table)]
    expected = reference(*exact, target, 0.1)
    assert loss.item() == pytest.approx(expected.item(), rel=0.01)
    loss.backward()
    expected.backward()
    for tensor, exact_tensor in zip((states, table), exact, strict=True):
        assert tensor.grad.dtype == torch.bfloat16
        torch.testing.assert_close(tensor.grad.double(), exact_tensor.grad, rtol=0.05, atol=0.05)


def test_what_is_ignored_counts_for_nothing() -> None:
    states, table, target = example(torch.float32)
    moved = torch.where((target == PAD)[..., None], 9.0, states.detach()).requires_grad_()
    results = []
    for variant in (states, moved):
        loss = linear_cross_entropy(variant, table, target, smoothing=0.1, ignore=PAD)
        results.append((loss, torch.autograd.grad(loss, table, retain_graph=True)[0]))
        loss.backward()
        assert (variant.grad[target == PAD] == 0).all()
        assert (variant.grad[target != PAD] != 0).all()
    torch.testing.assert_close(results[0], results[1])


def test_everything_ignored_is_zero() -> None:
    states, table, _ = example(torch.float32)
    nothing = torch.zeros(3, 5, dtype=torch.long)
    loss = linear_cross_entropy(states, table, nothing, smoothing=0.1, ignore=PAD)
    loss.backward()
    assert loss.item() == 0
    assert (states.grad == 0).all() and (table.grad == 0).all()


@pytest.mark.parametrize("gradient", [True, False])
def test_it_is_a_sum(gradient: bool) -> None:
    states, table, target = example(torch.float32)
    with torch.set_grad_enabled(gradient):
        whole = linear_cross_entropy(states, table, target, smoothing=0.1, ignore=PAD)
        parts = [
            linear_cross_entropy(states[row], table, target[row], smoothing=0.1, ignore=PAD)
            for row in range(3)
        ]
    torch.testing.assert_close(whole, sum(parts))


def test_a_hopeless_target_gives_a_large_but_finite_loss() -> None:
    states = torch.tensor([[1.0]], requires_grad=True)
    table = torch.tensor([[0.0], [500.0], [-500.0]], requires_grad=True)
    loss = linear_cross_entropy(states, table, torch.tensor([2]), ignore=PAD)
    loss.backward()
    assert 50 < loss.item() < math.inf
    torch.testing.assert_close(table.grad, torch.tensor([[0.0], [1.0], [-1.0]]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_state_that_is_not_finite_shows_in_the_loss(bad: float) -> None:
    states, table, target = example(torch.float32)
    with torch.no_grad():
        states[1, 3, 2] = bad
    loss = linear_cross_entropy(states, table, target, smoothing=0.1, ignore=PAD)
    loss.backward()
    assert not loss.isfinite()
    assert not table.grad.isfinite().all()


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
