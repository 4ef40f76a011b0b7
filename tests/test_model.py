"""The Transformer: what may influence what, decoding step by step, sizes and tables."""

import copy
import dataclasses
import itertools

import pytest
import torch
from torch import Tensor, nn

from mt.compose import CONFIGS, compose
from mt.config import Activation, ModelConfig, Tie
from mt.model import Transformer, sinusoids

V = 23
LENGTHS = [6, 2, 4]  # of the sources
B, S, T = len(LENGTHS), max(LENGTHS), 5
SETTINGS = ModelConfig(
    name="test", dim=16, ffn_dim=24, num_heads=4, encoder_layers=2, decoder_layers=2, dropout=0.0
)


def build(**changes: object) -> Transformer:
    """A model in float64 and eval mode, with biases and gains that do something."""
    torch.manual_seed(1)
    model = Transformer(dataclasses.replace(SETTINGS, **changes), vocab_size=V).double().eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter)
    return model


@pytest.fixture(scope="module")
def model() -> Transformer:
    return build()


@pytest.fixture(scope="module")
def source() -> Tensor:
    torch.manual_seed(2)
    mask = torch.arange(S) < torch.tensor(LENGTHS)[:, None]
    return torch.randint(3, V, (B, S)).masked_fill(~mask, 0)


@pytest.fixture(scope="module")
def target() -> Tensor:
    torch.manual_seed(3)
    return torch.cat([torch.ones(B, 1, dtype=torch.long), torch.randint(3, V, (B, T - 1))], dim=1)


def same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


# What may influence what


def test_padding_changes_nothing(model: Transformer, source: Tensor, target: Tensor) -> None:
    together = model(source, target, source != 0)
    ratios = model.log_length_ratio(model.encode(source, source != 0), source != 0)
    for row, length in enumerate(LENGTHS):
        alone = source[row : row + 1, :length]
        same(model(alone, target[row : row + 1], alone != 0)[0], together[row])
        same(model.log_length_ratio(model.encode(alone, alone != 0), alone != 0)[0], ratios[row])


def test_no_look_into_the_future(model: Transformer, source: Tensor, target: Tensor) -> None:
    changed = target.clone()
    changed[:, 3] = (changed[:, 3] + 1) % V
    before, after = (model(source, ids, source != 0) for ids in (target, changed))
    same(before[:, :3], after[:, :3])
    assert not torch.isclose(before[:, 3:], after[:, 3:]).all(-1).any()


def test_every_source_piece_counts(model: Transformer, source: Tensor, target: Tensor) -> None:
    before = model(source, target, source != 0)
    for position in range(S):
        changed = source.clone()
        changed[:, position] = (changed[:, position] + 1) % V
        after = model(changed, target, source != 0)
        for row, length in enumerate(LENGTHS):
            assert torch.allclose(before[row], after[row]) == (position >= length)


def test_order_matters_on_both_sides(model: Transformer, source: Tensor, target: Tensor) -> None:
    one, mask = source[:1], source[:1] != 0
    before = model(one, target[:1], mask)[0, -1]
    assert not torch.allclose(before, model(one.flip(1), target[:1], mask)[0, -1])
    swapped = target[:1, [0, 2, 1, 3, 4]]
    assert not torch.allclose(before, model(one, swapped, mask)[0, -1])


def test_attention_heat_maps_are_distributions(
    model: Transformer, source: Tensor, target: Tensor
) -> None:
    weights = model.cross_weights(source, target, source != 0)
    assert weights.shape == (B, T, S)
    same(weights.sum(-1), torch.ones(B, T, dtype=torch.float64))
    assert (weights.transpose(1, 2)[source == 0] == 0).all()
    # They come from the last layer as the real forward pass uses it.
    memory = model.encode(source, source != 0)
    seen: list[Tensor] = []
    last = model.decoder[-1].cross_attention
    hook = last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.decode(target, memory, source != 0)
    hook.remove()
    same(weights, last.weights(seen[0], memory, (source != 0)[:, None, None]).mean(1))


# Decoding


@pytest.mark.parametrize("activation", list(Activation))
def test_step_by_step_is_all_at_once(
    source: Tensor, target: Tensor, activation: Activation
) -> None:
    model = build(activation=activation, decoder_layers=3)
    long = torch.cat([target, target.flip(1).repeat(1, 3)], dim=1)  # the caches grow
    expected = model(source, long, source != 0)
    state = model.start(model.encode(source, source != 0), source != 0)
    for position in range(long.size(1)):
        tokens = long[:, position : position + 1]
        same(state.step(tokens, torch.zeros_like(tokens))[:, 0], expected[:, position])


@pytest.mark.parametrize(
    "moves",  # steps: places of the sentences that are kept, parents of their hypotheses
    [
        [
            ([0, 1, 2], [[0], [0], [0]]),
            ([0, 1, 2], [[0, 0], [0, 0], [0, 0]]),  # two hypotheses a sentence
            ([0, 1, 2], [[1, 0], [1, 1], [0, 1]]),  # swapped, one doubled, as they were
            ([0, 2], [[0, 0], [1, 0]]),  # the second sentence leaves
            ([0, 1], [[1, 0, 1], [0, 1, 1]]),  # three hypotheses a sentence
            ([1], [[1]]),  # the first leaves, and one hypothesis
            ([0], [[0]]),
        ],
        [
            ([0, 1, 2], [[0], [0], [0]]),
            ([1], [[0, 0, 0]]),  # as many rows as before, but all of one sentence
            ([0], [[2, 0, 1]]),
        ],
        [
            ([0, 1, 2], [[0], [0], [0]]),
            ([0, 2], [[0], [0]]),
            ([1], [[0]]),
        ],
    ],
)
def test_hypotheses_are_copied_reordered_and_dropped(
    model: Transformer, source: Tensor, moves: list[tuple[list[int], list[list[int]]]]
) -> None:
    """Whatever happens to the hypotheses, each gets the logits of its own sentence and prefix."""
    mask = source != 0
    state = model.start(model.encode(source, mask), mask)
    sentences = list(range(B))
    prefixes: list[list[list[int]]] = [[[]]] * B  # of each sentence, of each of its hypotheses
    generator = torch.Generator().manual_seed(4)
    for kept, parents in moves:
        if len(kept) < len(sentences):
            state.keep(torch.tensor(kept))
        sentences = [sentences[place] for place in kept]
        tokens = torch.randint(3, V, (len(kept), len(parents[0])), generator=generator)
        prefixes = [
            [[*prefixes[place][parent], int(token)] for parent, token in zip(row, new, strict=True)]
            for place, row, new in zip(kept, parents, tokens, strict=True)
        ]
        logits = state.step(tokens, torch.tensor(parents))
        for row, (sentence, hypotheses) in enumerate(zip(sentences, prefixes, strict=True)):
            one = slice(sentence, sentence + 1)
            for place, pieces in enumerate(hypotheses):
                expected = model(source[one], torch.tensor([pieces]), mask[one])[0, -1]
                same(logits[row, place], expected)


# Parts


def test_the_position_table_grows(model: Transformer) -> None:
    length = 1100
    ids = torch.arange(length)[None] % 20 + 3
    kept = model.target_embedding.positions
    assert kept.size(0) < length
    fresh = copy.deepcopy(model)
    long = fresh.target_embedding(ids)
    assert long.shape == (1, length, SETTINGS.dim)
    assert fresh.target_embedding.positions.dtype == kept.dtype
    same(long[:, :1000], model.target_embedding(ids[:, :1000]))
    same(copy.deepcopy(model).target_embedding(ids[:, -1:], start=length - 1), long[:, -1:])


def test_positions_are_told_apart_and_of_one_length() -> None:
    table = sinusoids(1500, 16)
    torch.testing.assert_close(table.norm(dim=1), torch.full((1500,), 8**0.5))
    distances = torch.cdist(table, table, compute_mode="donot_use_mm_for_euclid_dist")
    assert distances.fill_diagonal_(1).min() > 1e-3
    # A fixed distance is a fixed rotation: its inner product is the same everywhere.
    products = (table[:-7] * table[7:]).sum(1)
    torch.testing.assert_close(products, products[:1].expand_as(products), rtol=1e-3, atol=1e-3)


def test_tied_tables_are_one_matrix() -> None:
    model = build(tie=Tie.all)
    table = model.source_embedding.table.weight
    assert table is model.target_embedding.table.weight
    assert table is model.output_table
    assert table is model.output.weight

    model = build(tie=Tie.decoder)
    assert model.source_embedding.table.weight is not model.target_embedding.table.weight
    assert model.target_embedding.table.weight is model.output_table
    assert model.target_embedding.table.weight is model.output.weight
    extra = sum(p.numel() for p in model.parameters()) - sum(
        p.numel() for p in build(tie=Tie.all).parameters()
    )
    assert extra == V * SETTINGS.dim


def test_a_copy_stays_tied() -> None:
    model = copy.deepcopy(build(tie=Tie.all)).to(torch.bfloat16)
    assert model.source_embedding.table.weight is model.output_table
    assert model.source_embedding.table.weight is model.output.weight


@pytest.mark.parametrize(("encoder", "decoder"), [(1, 3), (3, 1)])
def test_depths_are_independent(source: Tensor, target: Tensor, encoder: int, decoder: int) -> None:
    model = build(encoder_layers=encoder, decoder_layers=decoder)
    assert (len(model.encoder), len(model.decoder)) == (encoder, decoder)
    assert model(source, target, source != 0).shape == (B, T, V)


def test_swiglu_is_gated() -> None:
    ffn = build(activation=Activation.swiglu).encoder[0].ffn
    x = torch.randn(2, 3, SETTINGS.dim, dtype=torch.float64)
    hidden = ffn.inner(x)
    gate, value = hidden[..., : SETTINGS.ffn_dim], hidden[..., SETTINGS.ffn_dim :]
    same(ffn(x), ffn.outer(gate * torch.sigmoid(gate) * value))


def test_every_parameter_learns(source: Tensor, target: Tensor) -> None:
    for tie, activation in itertools.product(Tie, Activation):
        model = build(tie=tie, activation=activation).train()
        memory = model.encode(source, source != 0)
        logits = model.logits(model.decode(target, memory, source != 0))
        ratio = model.log_length_ratio(memory, source != 0)
        (logits.logsumexp(-1).sum() + ratio.square().sum()).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


def test_dropout_only_while_training(source: Tensor, target: Tensor) -> None:
    for setting in ("dropout", "attention_dropout", "ffn_dropout"):
        model = build(**{setting: 0.5})
        mask = source != 0
        same(model(source, target, mask), model(source, target, mask))
        model.train()
        assert not torch.allclose(model(source, target, mask), model(source, target, mask)), setting


def test_without_a_length_head(source: Tensor, target: Tensor) -> None:
    model = build(length_head=False)
    assert model.length_head is None
    assert not any("length" in name for name, _ in model.named_parameters())
    assert model(source, target, source != 0).shape == (B, T, V)


def test_bf16_is_close_to_fp32(source: Tensor, target: Tensor) -> None:
    torch.manual_seed(1)
    model = Transformer(SETTINGS, vocab_size=V).eval()
    working = copy.deepcopy(model).to(torch.bfloat16)
    exact = model(source, target, source != 0).softmax(-1)
    rounded = working(source, target, source != 0)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float().softmax(-1), exact, rtol=0.15, atol=0.02)


def test_a_fresh_model_is_calm() -> None:
    """The first predictions are nearly even, and no deeper model begins louder."""
    torch.manual_seed(1)
    ids = torch.randint(3, 1000, (8, 20))
    stds = []
    for depth in (1, 12):
        config = ModelConfig(
            name="test", dim=64, ffn_dim=128, encoder_layers=depth, decoder_layers=depth
        )
        model = Transformer(config, vocab_size=1000).eval()
        with torch.no_grad():
            stds.append(float(model(ids, ids, ids != 0).std()))
    assert all(0.3 < std < 3 for std in stds)
    assert 0.5 < stds[1] / stds[0] < 2


PRESETS = sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml"))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_builds(preset: str) -> None:
    config = compose([f"model={preset}"]).model
    assert config.name == preset
    with torch.device("meta"):
        model = Transformer(config, vocab_size=4000)
    ids = torch.zeros(2, 3, dtype=torch.long, device="meta")
    assert model(ids, ids, ids == 0).shape == (2, 3, 4000)


def test_presets_grow() -> None:
    assert {"tiny", "small", "base", "big"} <= set(PRESETS)
    sizes = []
    for preset in ("tiny", "small", "base", "big"):
        with torch.device("meta"):
            model = Transformer(compose([f"model={preset}"]).model, vocab_size=4000)
        sizes.append(sum(parameter.numel() for parameter in model.parameters()))
    assert sizes == sorted(sizes)
    assert sizes[0] < 3_000_000
    assert sizes[-1] > 100_000_000
