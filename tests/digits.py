"""A task that a small model learns in seconds: digits, written backwards."""

import random
from pathlib import Path

from mt.config import (
    Config,
    DataConfig,
    DecodeConfig,
    Device,
    FinalEval,
    ModelConfig,
    OptimConfig,
    Origin,
    Precision,
    TokenizerConfig,
    TrainConfig,
)


def write_digits(folder: Path) -> None:
    """Files train, valid and test, each with .src and .tgt."""
    generator = random.Random(1)
    for split, number in (("train", 4000), ("valid", 100), ("test", 100)):
        lines = [
            " ".join(generator.choices("0123456789", k=generator.randint(4, 10)))
            for _ in range(number)
        ]
        for side, texts in (("src", lines), ("tgt", [line[::-1] for line in lines])):
            (folder / f"{split}.{side}").write_text("\n".join(texts) + "\n", encoding="utf-8")


def digits_config(folder: Path) -> Config:
    """A short training on the CPU of a model too small to learn; for what training does."""
    return Config(
        data=DataConfig(
            name="digits",
            origin=Origin.files,
            source_lang="src",
            target_lang="tgt",
            **{split: str(folder / split) for split in ("train", "valid", "test")},
        ),
        tokenizer=TokenizerConfig(vocab_size=300),
        model=ModelConfig(
            name="test", dim=16, ffn_dim=32, num_heads=2, encoder_layers=1, decoder_layers=1
        ),
        optim=OptimConfig(warmup_steps=3),
        train=TrainConfig(
            max_steps=12,
            batch_tokens=256,
            max_length=32,
            device=Device.cpu,
            precision=Precision.fp32,
            num_threads=1,
            validate_every=5,
            valid_sentences=3,
            save_every=5,
            log_every=1,
            final_eval=FinalEval.none,
        ),
        decode=DecodeConfig(beam_size=2, max_length=20),
    )


def learning_config(folder: Path) -> Config:
    """A training that learns to write digits backwards, in half a minute on a CPU."""
    config = digits_config(folder)
    config.model = ModelConfig(
        name="small",
        dim=64,
        ffn_dim=128,
        num_heads=4,
        encoder_layers=2,
        decoder_layers=2,
        dropout=0.0,
    )
    config.optim = OptimConfig(lr=3e-3, warmup_steps=50)
    config.train.max_steps = 500
    config.train.batch_tokens = 512
    config.train.validate_every = config.train.save_every = 250
    config.train.valid_sentences = 50
    config.train.log_every = 20
    config.train.final_eval = FinalEval.test
    config.decode = DecodeConfig(max_length=30)
    return config
