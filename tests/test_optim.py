"""The learning rate as a function of the step, the parameter groups, and Muon."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from mt.config import ModelConfig, OptimConfig, Optimizer, Schedule
from mt.model import Transformer
from mt.optim import (
    Muon,
    build_optimizers,
    learning_rate_scale,
    orthogonalize,
    set_learning_rate,
)

MAX_STEPS = 100


def scales(config: OptimConfig) -> list[float]:
    return [learning_rate_scale(step, config, max_steps=MAX_STEPS) for step in range(MAX_STEPS + 1)]


@pytest.mark.parametrize("schedule", list(Schedule))
@pytest.mark.parametrize("warmup", [0, 1, 20])
def test_it_rises_to_the_peak_and_falls(schedule: Schedule, warmup: int) -> None:
    rates = scales(OptimConfig(schedule=schedule, warmup_steps=warmup))
    assert max(rates) == pytest.approx(1, abs=0.01)
    assert all(0 < rate <= 1 for rate in rates[:-1])  # no step is for nothing
    rising = rates[: max(1, warmup)]
    assert all(before < after for before, after in itertools.pairwise(rising))
    falling = rates[max(1, warmup) :]
    assert all(before > after for before, after in itertools.pairwise(falling))


def test_the_warm_up_is_a_line() -> None:
    rates = scales(OptimConfig(warmup_steps=20))
    assert rates[0] == pytest.approx(1 / 20)
    assert rates[9] == pytest.approx(1 / 2)
    assert rates[19] == pytest.approx(1)


@pytest.mark.parametrize("schedule", [Schedule.cosine, Schedule.linear])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 1.0])
def test_the_end_is_the_final_ratio(schedule: Schedule, ratio: float) -> None:
    config = OptimConfig(schedule=schedule, warmup_steps=10, final_lr_ratio=ratio)
    rates = scales(config)
    assert rates[-1] == pytest.approx(ratio, abs=1e-9)
    assert min(rates[10:]) == pytest.approx(ratio, abs=1e-9)
    later = learning_rate_scale(10 * MAX_STEPS, config, max_steps=MAX_STEPS)
    assert later == pytest.approx(ratio, abs=1e-9)
    middle = learning_rate_scale(55, config, max_steps=MAX_STEPS)
    assert middle == pytest.approx((1 + ratio) / 2)


def test_the_cosine_is_flat_at_its_ends() -> None:
    rates = scales(OptimConfig(schedule=Schedule.cosine, warmup_steps=0))
    falls = [before - after for before, after in itertools.pairwise(rates)]
    assert falls[0] < falls[50] / 10
    assert falls[-1] < falls[50] / 10


def test_the_inverse_square_root() -> None:
    config = OptimConfig(schedule=Schedule.inverse_sqrt, warmup_steps=10)
    one, four = (learning_rate_scale(step - 1, config, max_steps=1000) for step in (50, 200))
    assert one == pytest.approx(2 * four)
    assert learning_rate_scale(10, config, max_steps=1000) > 0.9  # no jump behind the warm-up
    assert one == learning_rate_scale(49, config, max_steps=10**6)  # the end plays no part


# Groups


def model() -> Transformer:
    torch.manual_seed(1)
    config = ModelConfig(name="test", dim=16, ffn_dim=32, encoder_layers=1, decoder_layers=1)
    return Transformer(config, vocab_size=30)


@pytest.mark.parametrize("algorithm", list(Optimizer))
def test_every_parameter_has_one_optimizer(algorithm: Optimizer) -> None:
    net = model()
    config = OptimConfig(algorithm=algorithm, weight_decay=0.1, lr=1e-3, muon_lr=1e-2)
    optimizers = build_optimizers(net, config)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in net.parameters())
    for group in groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.1 if parameter.ndim == 2 else 0)


def test_muon_takes_the_matrices_of_the_blocks_only() -> None:
    net = model()
    _, muon = build_optimizers(net, OptimConfig(algorithm=Optimizer.muon, muon_lr=1e-2))
    held = {id(parameter) for group in muon.param_groups for parameter in group["params"]}
    for name, parameter in net.named_parameters():
        inside = parameter.ndim == 2 and name.startswith(("encoder.", "decoder."))
        assert (id(parameter) in held) == inside, name
    assert len(build_optimizers(net, OptimConfig())) == 1


def test_weight_decay_acts_on_matrices_only() -> None:
    for algorithm in Optimizer:
        net = model()
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        config = OptimConfig(algorithm=algorithm, weight_decay=0.5, lr=0.1, muon_lr=0.1)
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for optimizer in build_optimizers(net, config):
            optimizer.step()
        for name, parameter in net.named_parameters():
            expected = before[name] * (0.95 if parameter.ndim == 2 else 1)
            torch.testing.assert_close(parameter.data, expected, msg=name)


def test_every_group_follows_its_own_peak() -> None:
    config = OptimConfig(algorithm=Optimizer.muon, lr=1e-3, muon_lr=2e-2)
    optimizers = build_optimizers(model(), config)
    for scale in (0.5, 0.1, 1.0):
        set_learning_rate(optimizers, scale)
        adamw, muon = optimizers
        assert {group["lr"] for group in adamw.param_groups} == {1e-3 * scale}
        assert {group["lr"] for group in muon.param_groups} == {2e-2 * scale}


# Muon


def directions(*, number: int, rows: int, columns: int) -> Tensor:
    """Matrices whose singular values lie a factor of a hundred apart."""
    generator = torch.Generator().manual_seed(rows * 100 + columns)
    shape = (number, min(rows, columns))
    left, _ = torch.linalg.qr(torch.randn(number, rows, shape[1], generator=generator))
    right, _ = torch.linalg.qr(torch.randn(number, columns, shape[1], generator=generator))
    return left @ torch.diag_embed(torch.logspace(0, -2, shape[1]).expand(shape)) @ right.mT


@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (16, 48), (48, 16), (5, 40)])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_orthogonalized_singular_values_are_near_one(rows: int, columns: int, size: float) -> None:
    matrices = directions(number=3, rows=rows, columns=columns)
    found = orthogonalize(matrices * size)
    assert found.shape == matrices.shape
    assert found.dtype == matrices.dtype
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.5
    assert values.max() < 1.3
    # The singular vectors stay: it is the nearest such matrix, not any.
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    cosine = (found * (left @ right)).sum((1, 2)) / (
        found.norm(dim=(1, 2)) * min(rows, columns) ** 0.5
    )
    assert cosine.min() > 0.95


def test_a_batch_is_orthogonalized_one_by_one() -> None:
    matrices = (
        directions(number=4, rows=12, columns=20) * torch.tensor([1.0, 9, 0.1, 3])[:, None, None]
    )
    together = orthogonalize(matrices)
    for matrix, found in zip(matrices, together, strict=True):
        torch.testing.assert_close(orthogonalize(matrix[None])[0], found, rtol=0.02, atol=0.02)


def test_a_zero_matrix_stays_zero() -> None:
    assert (orthogonalize(torch.zeros(1, 4, 4)) == 0).all()


def test_fused_maps_are_updated_in_their_parts() -> None:
    """Queries, keys and values in one matrix are three maps, keys and values two."""
    net = model()
    _, muon = build_optimizers(net, OptimConfig(algorithm=Optimizer.muon))
    num_parts = {
        id(parameter): group["num_parts"]
        for group in muon.param_groups
        for parameter in group["params"]
    }
    found = {name: num_parts[id(p)] for name, p in net.named_parameters() if id(p) in num_parts}
    assert {name.split(".")[-2] for name, number in found.items() if number == 3} == {"qkv"}
    assert {name.split(".")[-2] for name, number in found.items() if number == 2} == {"key_value"}
    assert 1 in found.values()


def test_the_warm_up_is_at_most_a_quarter() -> None:
    config = OptimConfig(warmup_steps=1000)
    assert max(scales(config)) == pytest.approx(1)
    assert learning_rate_scale(MAX_STEPS // 4 - 1, config, max_steps=MAX_STEPS) == 1


def test_a_first_step_of_muon() -> None:
    """Each block moves against its gradient by 0.2 · √max(rows, columns) · lr, orthogonalized."""
    torch.manual_seed(1)
    shapes = [(16, 16), (48, 16), (16, 64), (16, 16)]
    weights = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    before = [weight.detach().clone() for weight in weights]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    groups = [
        {"params": weights[:1] + weights[2:], "num_parts": 1},
        {"params": weights[1:2], "num_parts": 3},
    ]
    Muon(groups, lr=0.1, weight_decay=0.0).step()
    for number, (weight, old) in enumerate(zip(weights, before, strict=True)):
        parts = 3 if number == 1 else 1
        changes = zip((weight.detach() - old).chunk(parts), weight.grad.chunk(parts), strict=True)
        for moved, gradient in changes:
            expected = -0.1 * 0.2 * max(moved.shape) ** 0.5 * orthogonalize(gradient[None])[0]
            torch.testing.assert_close(moved, expected, rtol=0.05, atol=0.01)


def test_muon_remembers_gradients() -> None:
    """After many steps one way, a single other gradient does not turn it round."""
    weight = nn.Parameter(torch.zeros(8, 8))
    optimizer = Muon([weight], lr=0.1, weight_decay=0.0)
    for _ in range(20):
        weight.grad = torch.eye(8)
        optimizer.step()
    old = weight.detach().clone()
    weight.grad = -torch.eye(8)
    optimizer.step()
    assert (weight.detach() - old).diagonal().max() < 0


def test_muon_leaves_parameters_without_a_gradient() -> None:
    weight, frozen = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    weight.grad = torch.eye(4)
    Muon([weight, frozen], lr=0.1, weight_decay=0.5).step()
    assert (frozen == 1).all()
    assert not (weight == 1).all()


@pytest.mark.parametrize("algorithm", list(Optimizer))
def test_the_loss_goes_down(algorithm: Optimizer) -> None:
    net = model().train()
    config = OptimConfig(algorithm=algorithm, lr=3e-3, muon_lr=5e-3)
    optimizers = build_optimizers(net, config)
    ids = torch.randint(4, 30, (8, 6), generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(net(ids, ids, ids != 0).flatten(0, 1), ids.flatten())
        losses.append(float(loss.detach()))
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]
