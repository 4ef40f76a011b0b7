"""Attention: who may look at whom, and how much.

Shapes: B sentences, H heads, T query positions, S key positions, K head size, D = H * K.
Masks are boolean, True = may attend.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FEW_ROWS = 16  # below, one kernel is faster than its parts one by one
ROOM = 7  # further positions that a grown cache has room for: little to copy, and rarely grown


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    dropout: float = 0.0,
    explicit: bool | None = None,
) -> Tensor:
    """Scaled dot-product attention, softmax(Q Kᵀ / √K) V (Vaswani et al. 2017, eq. 1).

    Args:
        query: [B, H, T, K].
        key, value: [B, H, S, K].
        mask: boolean, broadcastable to [B, H, T, S]; True = may attend. Each query needs at least
            one True.
        causal: position t may attend to the positions up to t only (T = S). Excludes ``mask``.
        dropout: probability of dropping an attention weight.
        explicit: the formula's own products instead of PyTorch's fused kernel. This is the default
            for bf16 on the CPU, where the fused kernel is about four times slower.

    Returns: [B, H, T, K].
    """
    assert not (causal and mask is not None)
    if explicit is None:
        explicit = query.device.type == "cpu" and query.dtype == torch.bfloat16
    if explicit and torch.compiler.is_compiling():
        weights = attention_weights(query, key, mask, causal=causal)
        return (cheap_dropout(weights, dropout) @ value.to(weights.dtype)).to(query.dtype)
    if explicit:
        return _Explicit.apply(query, key, value, mask, causal, dropout)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, dropout_p=dropout
    )


BF16_HEAD = 64  # the size from which on a head's products are faster in bf16 than in fp32


class _Explicit(torch.autograd.Function):
    """The formula and its derivative, each tensor converted and laid out once.

    Products and softmax are in fp32 where heads are small: at such sizes that is as fast as bf16,
    of which a kernel has to be compiled for each shape. Memory of results and gradients is laid
    out [B, T, H, K], so that merging heads copies nothing.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        causal: bool,
        dropout: float,
    ) -> Tensor:
        dtype = query.dtype
        if query.size(-1) < BF16_HEAD:
            dtype = torch.promote_types(dtype, torch.float32)
        ctx.scale = 1 / math.sqrt(query.size(-1))
        q, k, v = (_contiguous(x, dtype).flatten(0, 1) for x in (query, key, value))
        scores = torch.bmm(q, k.transpose(1, 2)).mul_(ctx.scale)  # [B * H, T, S]
        if causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if mask is not None:
            scores.view(*query.shape[:2], *scores.shape[1:]).masked_fill_(~mask, -torch.inf)
        weights = scores.softmax(-1)
        kept = dropout_mask(weights, dropout) if dropout else None
        ctx.save_for_backward(q, k, v, weights, kept)
        used = weights if kept is None else weights * kept
        return _merged(torch.bmm(used, v).unflatten(0, query.shape[:2]), query.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights, kept = ctx.saved_tensors
        grad_out = _contiguous(grad, q.dtype).flatten(0, 1)
        used = weights if kept is None else weights * kept
        grad_value = torch.bmm(used.transpose(1, 2), grad_out)
        grad_weights = torch.bmm(grad_out, v.transpose(1, 2))
        if kept is not None:
            grad_weights.mul_(kept)
        # d softmax: w * (g - sum of g * w)
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        grad_scores.mul_(ctx.scale)
        grad_query = torch.bmm(grad_scores, k)
        grad_key = torch.bmm(grad_scores.transpose(1, 2), q)
        batch = grad.shape[:2]
        grads = (g.unflatten(0, batch) for g in (grad_query, grad_key, grad_value))
        return (*(_merged(g, grad.dtype) for g in grads), None, None, None)


def _contiguous(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [B, H, T, K] in another type, laid out in this order."""
    return torch.empty(x.shape, dtype=dtype, device=x.device).copy_(x)


def _merged(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [B, H, T, K] in another type, laid out [B, T, H, K]."""
    batch, heads, length, dim = x.shape
    memory = torch.empty((batch, length, heads, dim), dtype=dtype, device=x.device)
    return memory.transpose(1, 2).copy_(x)


def attention_weights(
    query: Tensor, key: Tensor, mask: Tensor | None = None, *, causal: bool = False
) -> Tensor:
    """The weights softmax(Q Kᵀ / √K), [B, H, T, S], in fp32 at least; arguments as in
    :func:`attend`."""
    if query.dtype in (torch.bfloat16, torch.float16):
        query, key = query.float(), key.float()
    scores = (query * (1 / math.sqrt(query.size(-1)))) @ key.transpose(-2, -1)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1)


def cheap_dropout(x: Tensor, p: float) -> Tensor:
    """Dropout; on the CPU its mask is cut from random bytes, five times faster than Bernoulli."""
    if p == 0.0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    return x * dropout_mask(x, p)


def dropout_mask(x: Tensor, p: float) -> Tensor:
    """What to multiply x by, on the CPU: 0 with probability p, else the same for all.

    A byte resolves the probability in steps of 1/256; the kept values are scaled by the exact
    inverse of the probability used, so that the expectation is x.
    """
    threshold = max(1, round(p * 256))
    # From -2^63 on, else the highest bit of every eighth byte would always be 0.
    words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
    keep = words.view(torch.uint8)[: x.numel()].view(x.shape) >= threshold
    return keep.to(x.dtype).mul_(256 / (256 - threshold))


class Dropout(nn.Module):
    """:func:`cheap_dropout` while training, nothing otherwise."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return cheap_dropout(x, self.p) if self.training else x

    def extra_repr(self) -> str:
        return f"p={self.p}"


class KeyValueCache:
    """The keys and values of the positions decoded so far, of all self-attention layers.

    They lie in one block with room for some positions more, where new ones are written in place.
    """

    def __init__(self, num_layers: int) -> None:
        self.layers = [LayerCache(self, layer) for layer in range(num_layers)]
        self.block: Tensor | None = None  # [layers, 2, B, H, positions there is room for, K]

    def append(
        self, layer: int, position: int, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Add the newest positions [B, H, T, K] of a layer; returns all of them so far."""
        end = position + key.size(2)
        if self.block is None:
            self.block = key.new_empty((len(self.layers), 2, *key.shape[:2], 0, key.size(3)))
        if (missing := end - self.block.size(4)) > 0:
            self.block = F.pad(self.block, (0, 0, 0, missing + ROOM))
        keys, values = self.block[layer, 0, :, :, :end], self.block[layer, 1, :, :, :end]
        keys[:, :, position:] = key
        values[:, :, position:] = value
        return keys, values

    def reorder(self, rows: Tensor) -> None:
        """Keep the given rows of the batch, in that order; any may be repeated or left out."""
        if self.block is not None:
            num_blocks, batch = self.block.shape[:2].numel(), self.block.size(2)
            firsts = torch.arange(0, num_blocks * batch, batch, device=rows.device)
            chosen = self.block.flatten(0, 2).index_select(0, (firsts[:, None] + rows).flatten())
            self.block = chosen.unflatten(0, (*self.block.shape[:2], len(rows)))


class LayerCache:
    """A layer's part of a :class:`KeyValueCache`."""

    def __init__(self, cache: KeyValueCache, layer: int) -> None:
        self.cache, self.layer, self.length = cache, layer, 0

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add the newest positions [B, H, T, K]; returns all of them so far."""
        start, self.length = self.length, self.length + key.size(2)
        return self.cache.append(self.layer, start, key, value)


def attend_few(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """:func:`attend` for the few queries a row that decoding has, without a gradient.

    On the CPU the formula written out is up to three times faster there than the fused kernel,
    unless there are few rows, too. Keys and values should be contiguous.
    """
    if query.device.type != "cpu" or query.size(0) < FEW_ROWS:
        return attend(query, key, value, mask)
    weights = attention_weights(query, key, mask)
    return (weights @ value.to(weights.dtype)).to(query.dtype)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, T, D] -> [B, H, T, K]"""
    batch, length, dim = x.shape
    return x.view(batch, length, num_heads, dim // num_heads).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, H, T, K] -> [B, T, D]"""
    return x.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Multi-head self-attention: query, key and value are linear maps of one sequence."""

    def __init__(self, dim: int, *, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        assert dim % num_heads == 0
        self.num_heads = num_heads
        self.dropout = dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        return (
            split_heads(query, self.num_heads),
            split_heads(key, self.num_heads),
            split_heads(value, self.num_heads),
        )

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        causal: bool = False,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """x [B, T, D] -> [B, T, D].

        mask: boolean, broadcastable to [B, H, T, S]; True = may attend. With a cache, x holds the
        newest positions only, and they attend to everything in the cache.
        """
        query, key, value = self._project(x)
        if cache is not None:
            assert not causal
            return self.out(merge_heads(attend_few(query, *cache.append(key, value), mask)))
        dropout = self.dropout if self.training else 0.0
        return self.out(
            merge_heads(attend(query, key, value, mask, causal=causal, dropout=dropout))
        )

    def weights(self, x: Tensor, mask: Tensor | None = None, *, causal: bool = False) -> Tensor:
        """The attention weights [B, H, T, T]; arguments as in forward."""
        query, key, _ = self._project(x)
        return attention_weights(query, key, mask, causal=causal)


class CrossAttention(nn.Module):
    """Multi-head cross-attention: queries from one sequence, keys and values from another."""

    def __init__(self, dim: int, *, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        assert dim % num_heads == 0
        self.num_heads = num_heads
        self.dropout = dropout
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)

    def project(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, S, K] of the other sequence [B, S, D]; while decoding, they are
        computed once and kept."""
        keys, values = self.key_value(key).chunk(2, dim=-1)
        return split_heads(keys, self.num_heads), split_heads(values, self.num_heads)

    def forward(
        self,
        x: Tensor,
        key: Tensor | tuple[Tensor, Tensor],
        mask: Tensor | None = None,
    ) -> Tensor:
        """x [B, T, D] attends to key [B, S, D] (or to what :meth:`project` made of it).

        mask: boolean, broadcastable to [B, H, T, S]; True = may attend. Returns [B, T, D].
        """
        query = split_heads(self.query(x), self.num_heads)
        if isinstance(key, tuple):
            return self.out(merge_heads(attend_few(query, *key, mask)))
        keys, values = self.project(key)
        dropout = self.dropout if self.training else 0.0
        return self.out(merge_heads(attend(query, keys, values, mask, dropout=dropout)))

    def weights(self, x: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
        """The attention weights [B, H, T, S]; arguments as in forward."""
        keys, _ = self.project(key)
        return attention_weights(split_heads(self.query(x), self.num_heads), keys, mask)


class WeightedAttention(nn.Module):
    """One learned linear score an element; softmax over the sequence turns scores into weights."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        # No bias: it would add the same to every score, which softmax ignores.
        self.score = nn.Linear(dim, 1, bias=False)

    def _query(self, x: Tensor) -> Tensor:
        # attend() divides by √D; a score has no such factor.
        return (self.score.weight * math.sqrt(x.size(-1))).to(x.dtype).expand(x.size(0), 1, 1, -1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The elements of x [B, S, D], each multiplied by its weight, summed: [B, D].

        mask: boolean [B, S]; True = counts, False = padding.
        """
        elements = x.unsqueeze(1)  # one head, [B, 1, S, D]
        keep = None if mask is None else mask[:, None, None]
        return attend(self._query(x), elements, elements, keep)[:, 0, 0]

    def weights(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The weights [B, S]; arguments as in forward."""
        keep = None if mask is None else mask[:, None, None]
        return attention_weights(self._query(x), x.unsqueeze(1), keep)[:, 0, 0]
