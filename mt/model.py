"""The Transformer: an encoder reads the source, a decoder writes the target.

Shapes: B sentences, S source positions, T target positions, D model size, V vocabulary size.
Masks are boolean, True = may attend (True = a real piece, False = padding).
"""

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mt.attention import (
    CrossAttention,
    Dropout,
    KeyValueCache,
    LayerCache,
    SelfAttention,
    WeightedAttention,
)
from mt.config import Activation, ModelConfig, Tie


def sinusoids(length: int, dim: int) -> Tensor:
    """The position table [length, D] (Vaswani et al. 2017, sec. 3.5), sines before cosines."""
    rates = torch.exp(torch.arange(dim // 2) * (-math.log(10_000) / (dim // 2)))
    angles = torch.arange(length)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Embedding(nn.Module):
    """Pieces and their positions as vectors: √D · table[id] + sinusoid[position]."""

    def __init__(self, table: nn.Embedding, *, dropout: float) -> None:
        super().__init__()
        self.table = table
        self.scale = math.sqrt(table.embedding_dim)
        self.dropout = Dropout(dropout)
        # No buffer: a copy of the model in bf16 would round it, too.
        self.positions = sinusoids(1026, table.embedding_dim)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Embedding":
        super()._apply(fn, recurse)
        self.positions = self.positions.to(self.table.weight.device)
        return self

    def forward(self, ids: Tensor, *, start: int = 0) -> Tensor:
        """ids [B, T], the first of them at position ``start`` -> [B, T, D]."""
        end = start + ids.size(1)
        if end > self.positions.size(0):
            self.positions = sinusoids(2 * end, self.table.embedding_dim).to(ids.device)
        pieces = self.table(ids)
        placed = pieces * self.scale + self.positions[start:end]
        return self.dropout(placed.to(pieces.dtype))


class FeedForward(nn.Module):
    """Two linear maps with a nonlinearity between, at every position by itself."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gated = config.activation is Activation.swiglu
        self.inner = nn.Linear(config.dim, config.ffn_dim * (2 if self.gated else 1))
        self.outer = nn.Linear(config.ffn_dim, config.dim)
        self.dropout = Dropout(config.ffn_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]"""
        hidden = self.inner(x)
        if self.gated:  # SwiGLU (Shazeer 2020)
            gate, hidden = hidden.chunk(2, dim=-1)
            hidden = F.silu(gate) * hidden
        else:
            hidden = F.relu(hidden)
        return self.outer(self.dropout(hidden))


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each around a residual, normalized before (pre-norm)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_norm = nn.LayerNorm(config.dim)
        self.self_attention = SelfAttention(
            config.dim, num_heads=config.num_heads, dropout=config.attention_dropout
        )
        self.ffn_norm = nn.LayerNorm(config.dim)
        self.ffn = FeedForward(config)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x [B, S, D], mask [B, 1, 1, S] -> [B, S, D]"""
        x = x + self.dropout(self.self_attention(self.self_norm(x), mask))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention and feed-forward; pre-norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_norm = nn.LayerNorm(config.dim)
        self.self_attention = SelfAttention(
            config.dim, num_heads=config.num_heads, dropout=config.attention_dropout
        )
        self.cross_norm = nn.LayerNorm(config.dim)
        self.cross_attention = CrossAttention(
            config.dim, num_heads=config.num_heads, dropout=config.attention_dropout
        )
        self.ffn_norm = nn.LayerNorm(config.dim)
        self.ffn = FeedForward(config)
        self.dropout = Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | tuple[Tensor, Tensor],
        memory_mask: Tensor | None,
        *,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """x [B, T, D] -> [B, T, D]; memory [B, S, D] or its keys and values; mask [B, 1, 1, S].

        Without a cache x is a whole sentence, whose positions see only what is to their left.
        With one, x is [B * K, 1, D], the newest position of K hypotheses a sentence: in the
        cross-attention they are K positions of their sentence, and its keys need no copies.
        """
        normed = self.self_norm(x)
        x = x + self.dropout(self.self_attention(normed, causal=cache is None, cache=cache))
        num_sentences = len(memory[0]) if isinstance(memory, tuple) else len(memory)
        queries = self.cross_norm(x).view(num_sentences, -1, x.size(-1))
        attended = self.cross_attention(queries, memory, memory_mask)
        x = x + self.dropout(attended.view_as(x))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


class LengthHead(nn.Module):
    """Predicts log(target length / source length) from the encoder's states."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.pool = WeightedAttention(dim)
        self.ratio = nn.Linear(dim, 1)

    def forward(self, memory: Tensor, mask: Tensor) -> Tensor:
        """memory [B, S, D], mask [B, S] -> [B]"""
        return self.ratio(self.pool(memory, mask)).squeeze(1)


class Transformer(nn.Module):
    """Encoder-decoder Transformer (Vaswani et al. 2017), pre-norm with a last LayerNorm."""

    def __init__(self, config: ModelConfig, *, vocab_size: int) -> None:
        super().__init__()
        target_table = nn.Embedding(vocab_size, config.dim)
        source_table = target_table
        if config.tie is Tie.decoder:
            source_table = nn.Embedding(vocab_size, config.dim)
        self.source_embedding = Embedding(source_table, dropout=config.dropout)
        self.target_embedding = Embedding(target_table, dropout=config.dropout)
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.encoder_norm = nn.LayerNorm(config.dim)
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.decoder_norm = nn.LayerNorm(config.dim)
        self.output = nn.Linear(config.dim, vocab_size, bias=False, device="meta")
        self.output.weight = target_table.weight
        self.length_head = LengthHead(config.dim) if config.length_head else None
        self.initialize()

    def initialize(self) -> None:
        """Xavier-uniform maps, embeddings of variance 1/D.

        The last map of each residual branch is scaled down by √(2 · layers), so that the
        residual stream starts out with the same variance whatever the depth (GPT-2's rule).
        """
        for module in self.modules():
            if isinstance(module, nn.Linear) and module is not self.output:
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
        for stack in (self.encoder, self.decoder):
            for layer in stack:
                for module in layer.children():
                    if isinstance(module, SelfAttention | CrossAttention):
                        module.out.weight.data.div_(math.sqrt(2 * len(stack)))
                    elif isinstance(module, FeedForward):
                        module.outer.weight.data.div_(math.sqrt(2 * len(stack)))

    @property
    def decoder_layers(self) -> Sequence[DecoderLayer]:
        """The decoder's layers, first to last."""
        return cast(Sequence[DecoderLayer], self.decoder)

    @property
    def output_table(self) -> Tensor:
        """[V, D]: the target embeddings are the output map, too."""
        return self.target_embedding.table.weight

    def forward(self, source: Tensor, target: Tensor, source_mask: Tensor) -> Tensor:
        """source [B, S], target [B, T] (from BOS on), source_mask [B, S] -> logits [B, T, V]."""
        return self.logits(self.decode(target, self.encode(source, source_mask), source_mask))

    def encode(self, source: Tensor, source_mask: Tensor) -> Tensor:
        """source [B, S], source_mask [B, S] -> memory [B, S, D]"""
        x = self.source_embedding(source)
        mask = source_mask[:, None, None]
        for layer in self.encoder:
            x = layer(x, mask)
        return self.encoder_norm(x)

    def decode(self, target: Tensor, memory: Tensor, source_mask: Tensor) -> Tensor:
        """target [B, T], memory [B, S, D], source_mask [B, S] -> states [B, T, D]"""
        x = self.target_embedding(target)
        mask = source_mask[:, None, None]
        for layer in self.decoder:
            x = layer(x, memory, mask)
        return self.decoder_norm(x)

    def logits(self, states: Tensor) -> Tensor:
        """[..., D] -> [..., V]"""
        return self.output(states)

    def log_length_ratio(self, memory: Tensor, source_mask: Tensor) -> Tensor:
        """The predicted log(target length / source length), in pieces with EOS: [B]."""
        assert self.length_head is not None
        return self.length_head(memory, source_mask)

    def start(self, memory: Tensor, source_mask: Tensor) -> "DecoderState":
        """Begin to write one hypothesis for each row of memory [B, S, D]; mask [B, S]."""
        return DecoderState(self, memory, source_mask)

    def cross_weights(self, source: Tensor, target: Tensor, source_mask: Tensor) -> Tensor:
        """The last layer's cross-attention weights, the mean of its heads: [B, T, S]."""
        memory = self.encode(source, source_mask)
        mask = source_mask[:, None, None]
        x = self.target_embedding(target)
        *others, last = self.decoder_layers
        for layer in others:
            x = layer(x, memory, mask)
        x = x + last.self_attention(last.self_norm(x), causal=True)
        return last.cross_attention.weights(last.cross_norm(x), memory, mask).mean(1)


class DecoderState:
    """Hypotheses written in lockstep, a piece a step, with keys and values kept.

    There are W for each of B sentences. The caches have a row for each, sentence by sentence.
    """

    def __init__(self, model: Transformer, memory: Tensor, source_mask: Tensor) -> None:
        self.model = model
        # [B, 1, 1, S]; None where there is no padding, since a mask costs time
        self.mask = None if bool(source_mask.all()) else source_mask[:, None, None]
        self.memories = [
            tuple(part.contiguous() for part in layer.cross_attention.project(memory))
            for layer in model.decoder_layers
        ]
        self.cache = KeyValueCache(len(model.decoder))
        self.first_rows = torch.arange(len(memory), device=memory.device)  # [B] in the caches
        self.shape = torch.Size((len(memory), 1))  # [B, W]
        self.position = 0

    @torch.no_grad()
    def step(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """Append a piece to hypotheses; logits of the next piece [B, W, V].

        tokens, parents [B, W]: hypothesis w of sentence b is from now on the one that was at
        parents[b, w] of that sentence, followed by tokens[b, w].
        """
        if tokens.shape != self.shape or tokens.size(1) > 1:  # else all stay where they are
            self.cache.reorder((self.first_rows.unsqueeze(1) + parents).flatten())
        if tokens.shape != self.shape:
            self.shape = tokens.shape
            self.first_rows = torch.arange(0, tokens.numel(), tokens.size(1), device=tokens.device)
        x = self.model.target_embedding(tokens.view(-1, 1), start=self.position)
        for layer, memory, cache in zip(
            self.model.decoder, self.memories, self.cache.layers, strict=True
        ):
            x = layer(x, memory, self.mask, cache=cache)
        self.position += 1
        return self.model.logits(self.model.decoder_norm(x)).view(*tokens.shape, -1)

    def keep(self, sentences: Tensor) -> None:
        """Go on with the given sentences only, [B'], in ascending order."""
        self.first_rows = self.first_rows[sentences]
        self.mask = self.mask if self.mask is None else self.mask[sentences]
        self.memories = [(key[sentences], value[sentences]) for key, value in self.memories]
