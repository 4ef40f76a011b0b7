"""Attention against its formulas, its masks, and dropout from random bytes."""

import math

import pytest
import torch
from torch import Tensor, nn

from mt.attention import (
    ROOM,
    CrossAttention,
    Dropout,
    KeyValueCache,
    SelfAttention,
    WeightedAttention,
    attend,
    attention_weights,
    cheap_dropout,
    merge_heads,
    split_heads,
)

B, H, T, S, K = 3, 2, 5, 7, 4
LENGTHS = torch.tensor([7, 1, 4])
KEEP = torch.arange(S) < LENGTHS[:, None]  # [B, S]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(1)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def with_biases(module: nn.Module) -> nn.Module:
    """The module in float64, its biases other than 0."""
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return module.double()


def same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


# attend


@pytest.mark.parametrize("explicit", [True, False, None])
@pytest.mark.parametrize("masking", ["none", "padding", "any", "causal"])
def test_attend_is_the_formula(masking: str, explicit: bool | None) -> None:
    queries = S if masking == "causal" else T
    query, key, value = random(B, H, queries, K), random(B, H, S, K), random(B, H, S, K)
    mask = {
        "none": None,
        "padding": KEEP[:, None, None],
        "any": (torch.rand(B, H, T, S) < 0.5) | (torch.arange(S) == 2),
        "causal": None,
    }[masking]
    allowed = torch.ones(B, H, queries, S, dtype=torch.bool)
    if masking == "causal":
        allowed = torch.arange(S)[None, :] <= torch.arange(S)[:, None]
    elif mask is not None:
        allowed = mask.expand(B, H, T, S)
    exponentials = (query @ key.mT / math.sqrt(K)).exp() * allowed
    weights = exponentials / exponentials.sum(-1, keepdim=True)

    same(attention_weights(query, key, mask, causal=masking == "causal"), weights)
    found = attend(query, key, value, mask, causal=masking == "causal", explicit=explicit)
    same(found, weights @ value)


@pytest.mark.parametrize("causal", [True, False])
def test_both_ways_have_the_same_gradients(causal: bool) -> None:
    inputs = [random(B, H, S, K).requires_grad_() for _ in range(3)]
    mask = None if causal else KEEP[:, None, None]
    weight = random(B, H, S, K)
    gradients = [
        torch.autograd.grad(
            (attend(*inputs, mask, causal=causal, explicit=explicit) * weight).sum(), inputs
        )
        for explicit in (True, False)
    ]
    for one, other in zip(*gradients, strict=True):
        same(one, other)


def test_bf16_on_the_cpu_keeps_its_type_and_is_close() -> None:
    query, key, value = (random(B, H, S, K) for _ in range(3))
    exact = attend(query, key, value, KEEP[:, None, None])
    rounded = attend(query.bfloat16(), key.bfloat16(), value.bfloat16(), KEEP[:, None, None])
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.double(), exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("explicit", [True, False])
def test_attention_dropout_drops_weights_and_keeps_the_mean(explicit: bool) -> None:
    query, key = random(B, H, T, K).float(), random(B, H, S, K).float()
    value = torch.eye(S).expand(B, H, S, S)  # so that the output is the weights
    exact = attention_weights(query, key)
    runs = torch.stack(
        [attend(query, key, value, dropout=0.25, explicit=explicit) for _ in range(2000)]
    )
    assert (runs == 0).double().mean() == pytest.approx(0.25, abs=0.02)
    torch.testing.assert_close(runs.mean(0), exact, rtol=0.2, atol=0.02)


def test_heads_are_split_and_merged_without_a_mix_up() -> None:
    x = random(B, T, H * K)
    heads = split_heads(x, H)
    assert heads.shape == (B, H, T, K)
    same(heads[1, 1, 2], x[1, 2, K:])
    same(merge_heads(heads), x)


# The three kinds, one head, written out


def test_self_attention_is_the_formula() -> None:
    dim = 6
    layer = with_biases(SelfAttention(dim, num_heads=1))
    x = random(B, S, dim)
    w_query, w_key, w_value = layer.qkv.weight.split(dim)
    b_query, b_key, b_value = layer.qkv.bias.split(dim)
    for sentence in range(B):
        q = x[sentence] @ w_query.T + b_query
        k = x[sentence] @ w_key.T + b_key
        v = x[sentence] @ w_value.T + b_value
        weights = torch.softmax(q @ k.T / math.sqrt(dim), dim=1)
        same(layer.weights(x)[sentence, 0], weights)
        same(layer(x)[sentence], layer.out(weights @ v))


def test_cross_attention_is_the_formula() -> None:
    dim = 6
    layer = with_biases(CrossAttention(dim, num_heads=1))
    x, key = random(B, T, dim), random(B, S, dim)
    w_key, w_value = layer.key_value.weight.split(dim)
    b_key, b_value = layer.key_value.bias.split(dim)
    for sentence in range(B):
        q = layer.query(x[sentence])
        k = key[sentence] @ w_key.T + b_key
        v = key[sentence] @ w_value.T + b_value
        weights = torch.softmax(q @ k.T / math.sqrt(dim), dim=1)
        same(layer.weights(x, key)[sentence, 0], weights)
        same(layer(x, key)[sentence], layer.out(weights @ v))


def test_weighted_attention_is_the_formula() -> None:
    dim = 6
    layer = with_biases(WeightedAttention(dim))
    x = random(B, S, dim)
    for sentence in range(B):
        scores = [layer.score(element).item() for element in x[sentence]]
        total = sum(math.exp(score) for score in scores)
        weights = [math.exp(score) / total for score in scores]
        same(layer.weights(x)[sentence], torch.tensor(weights, dtype=torch.float64))
        pooled = sum(weight * element for weight, element in zip(weights, x[sentence], strict=True))
        same(layer(x)[sentence], pooled)


def test_every_head_is_an_attention_of_its_own() -> None:
    """Two heads are two one-headed layers, each on its share of the projections."""
    dim = H * K
    layer = with_biases(CrossAttention(dim, num_heads=H))
    x, key = random(B, T, dim), random(B, S, dim)
    keys, values = layer.key_value(key).chunk(2, dim=-1)
    heads = []
    for head in range(H):
        part = slice(head * K, (head + 1) * K)
        scores = layer.query(x)[..., part] @ keys[..., part].mT / math.sqrt(K)
        heads.append(scores.softmax(-1) @ values[..., part])
    same(layer(x, key), layer.out(torch.cat(heads, dim=-1)))


# Masks


def test_weights_sum_to_one_and_padding_has_none() -> None:
    dim = H * K
    x, key = random(B, T, dim), random(B, S, dim)
    keep = KEEP[:, None, None]
    tables = [
        with_biases(SelfAttention(dim, num_heads=H)).weights(key, keep),
        with_biases(CrossAttention(dim, num_heads=H)).weights(x, key, keep),
        with_biases(WeightedAttention(dim)).weights(key, KEEP)[:, None, None],
    ]
    for weights in tables:
        same(weights.sum(-1), torch.ones_like(weights.sum(-1)))
        assert (weights[~keep.expand_as(weights)] == 0).all()
        assert (weights[keep.expand_as(weights)] > 0).all()


def test_what_padding_holds_changes_nothing() -> None:
    dim = H * K
    cross = with_biases(CrossAttention(dim, num_heads=H))
    alone = with_biases(SelfAttention(dim, num_heads=H))
    pool = with_biases(WeightedAttention(dim))
    x, key = random(B, T, dim), random(B, S, dim)
    other = torch.where(KEEP[..., None], key, 100 * random(B, S, dim))
    keep = KEEP[:, None, None]
    same(cross(x, key, keep), cross(x, other, keep))
    same(alone(key, keep)[KEEP], alone(other, keep)[KEEP])
    same(pool(key, KEEP), pool(other, KEEP))
    assert not torch.allclose(cross(x, key), cross(x, other))


def test_causal_weights_do_not_look_ahead() -> None:
    layer = with_biases(SelfAttention(H * K, num_heads=H))
    x = random(B, S, H * K)
    assert (layer.weights(x, causal=True).triu(1) == 0).all()
    changed = x.clone()
    changed[:, 4:] += 1
    same(layer(x, causal=True)[:, :4], layer(changed, causal=True)[:, :4])
    assert not torch.allclose(layer(x)[:, :4], layer(changed)[:, :4])


# Caches


@torch.no_grad()
def test_one_position_at_a_time_is_all_at_once() -> None:
    layer = with_biases(SelfAttention(H * K, num_heads=H))
    length = 2 * ROOM + 5  # the cache grows more than once
    x = random(B, length, H * K)
    cache = KeyValueCache(1)
    steps = [
        layer(x[:, position : position + 1], cache=cache.layers[0]) for position in range(length)
    ]
    same(torch.cat(steps, dim=1), layer(x, causal=True))


@torch.no_grad()
def test_a_cache_follows_its_rows() -> None:
    layer = with_biases(SelfAttention(H * K, num_heads=H))
    x, last = random(B, S, H * K), random(4, 1, H * K)
    rows = torch.tensor([2, 0, 0, 1])
    cache = KeyValueCache(1)
    layer(x, cache=cache.layers[0])
    cache.reorder(rows)
    found = layer(last, cache=cache.layers[0])
    same(found, layer(torch.cat([x[rows], last], dim=1), causal=True)[:, -1:])


def test_projected_keys_stand_for_the_sequence() -> None:
    layer = with_biases(CrossAttention(H * K, num_heads=H))
    x, key = random(B, T, H * K), random(B, S, H * K)
    keep = KEEP[:, None, None]
    same(layer(x, layer.project(key), keep), layer(x, key, keep))


# Dropout


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.9])
def test_dropout_share_scale_and_expectation(p: float) -> None:
    x = torch.full((1000, 1003), 2.0)  # a count that is no multiple of eight
    y = cheap_dropout(x, p)
    assert y.shape == x.shape
    dropped = float((y == 0).float().mean())
    assert dropped == pytest.approx(p, abs=0.004)
    kept = y[y != 0].unique()
    assert len(kept) == 1
    exact = round(p * 256) / 256
    assert float(kept) == pytest.approx(2 / (1 - exact))
    assert float(y.double().mean()) == pytest.approx(2, rel=0.01 / (1 - p))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_dropout_treats_every_byte_of_a_word_alike(p: float) -> None:
    dropped = (cheap_dropout(torch.ones(100_000, 8), p) == 0).double()
    # 5 standard deviations of a share, and what rounding p to 1/256 may do
    tolerance = 5 * math.sqrt(p * (1 - p) / 100_000) + 1 / 512
    assert (dropped.mean(0) - p).abs().max() < tolerance
    correlations = torch.corrcoef(dropped.T) - torch.eye(8, dtype=torch.float64)
    assert correlations.abs().max() < 0.03


def test_a_tiny_probability_still_drops() -> None:
    assert (cheap_dropout(torch.ones(100_000), 1e-3) == 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_keeps_the_type(dtype: torch.dtype) -> None:
    assert cheap_dropout(torch.ones(10, dtype=dtype), 0.5).dtype == dtype


def test_dropout_of_nothing_is_the_identity() -> None:
    x = random(10, 10)
    assert cheap_dropout(x, 0.0) is x
    layer = Dropout(0.5)
    assert not torch.equal(layer(x), x)
    assert torch.equal(layer.eval()(x), x)


def test_the_gradient_goes_through_the_same_mask() -> None:
    x = torch.rand(100, 100, dtype=torch.float64).add_(1).requires_grad_()
    y = cheap_dropout(x, 0.4)
    y.sum().backward()
    same(x.grad, (y / x).detach())


def test_the_same_seed_drops_the_same() -> None:
    def draw() -> Tensor:
        torch.manual_seed(3)
        return cheap_dropout(torch.ones(1000), 0.5)

    assert torch.equal(draw(), draw())


def test_dropped_weights_have_no_gradient() -> None:
    """The derivative of attention with dropout is the slope, where the same weights are dropped."""
    inputs = [random(2, 2, length, 3).requires_grad_() for length in (3, 4, 4)]
    mask = torch.tensor([[True, True, True, True], [True, True, False, False]])[:, None, None]

    def dropping(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        torch.manual_seed(2)
        return attend(query, key, value, mask, dropout=0.4, explicit=True)

    assert not torch.equal(dropping(*inputs), attend(*inputs, mask, explicit=True))
    assert torch.autograd.gradcheck(dropping, inputs)
