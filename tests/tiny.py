"""A tiny corpus and an untrained model directory, for tests that need something to load."""

import itertools
from pathlib import Path

import torch

from mt.checkpoint import save_checkpoint, unique_weights
from mt.config import Config, DataConfig, ModelConfig, Origin, TokenizerConfig
from mt.model import Transformer
from mt.tokenizer import train_tokenizer

PARTS = [
    [("the man", "der Mann"), ("the dog", "der Hund"), ("a boy", "ein Junge"), ("she", "sie")],
    [("sees", "sieht"), ("finds", "findet"), ("draws", "malt"), ("buys", "kauft")],
    [("a red house", "ein rotes Haus"), ("the old book", "das alte Buch"), ("water", "Wasser")],
]
PAIRS = [
    tuple(" ".join(words) + "." for words in zip(*parts, strict=True))
    for parts in itertools.product(*PARTS)
]
SOURCES = [source for source, _ in PAIRS]
TARGETS = [target for _, target in PAIRS]


def files_config(folder: Path) -> Config:
    """A config whose corpus is ``PAIRS``, written into the folder."""
    for language, texts in (("en", SOURCES), ("de", TARGETS)):
        (folder / f"train.{language}").write_text("\n".join(texts) + "\n", encoding="utf-8")
    config = Config(
        data=DataConfig(
            name="tiny", origin=Origin.files, train=str(folder / "train"), num_valid=5, num_test=6
        ),
        tokenizer=TokenizerConfig(vocab_size=320),
        model=ModelConfig(name="test", dim=16, ffn_dim=32, num_heads=2),
    )
    config.train.max_length = 64
    config.train.max_steps = 1
    config.optim.warmup_steps = 0
    config.decode.max_length = 12
    return config


def save_tiny_model(
    folder: Path, config: Config, *, num_leaked: int, seed: int = 1, fingerprint: str = "unknown"
) -> Path:
    """An untrained model as a model directory; its outputs differ from sentence to sentence."""
    tokenizer = train_tokenizer([*SOURCES, *TARGETS], config.tokenizer, seed=1)
    torch.manual_seed(seed)
    model = Transformer(config.model, vocab_size=len(tokenizer))
    for parameter in model.parameters():
        parameter.data.mul_(2.0)  # untrained weights would only repeat the last piece
    info = {
        "step": 1,
        "num_leaked": {"valid": 0, "test": num_leaked},
        "source_lang": "en",
        "target_lang": "de",
        "corpus": str(folder / "no corpus"),
        "corpus_fingerprint": fingerprint,
    }
    save_checkpoint(
        folder, weights=unique_weights(model), tokenizer=tokenizer, config=config, info=info
    )
    return folder
