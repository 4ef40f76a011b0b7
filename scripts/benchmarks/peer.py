"""The peer: a Transformer of the same size in Hugging Face transformers, trained by its Trainer.

Only this file needs the optional packages (``pip install -e .[bench]``).
"""

import logging
import tempfile
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    MarianConfig,
    MarianMTModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
)

from benchmarks.machine import STEPS_AHEAD, synchronize
from benchmarks.train import Turn
from mt.batching import Sequences, pad
from mt.config import Activation, Config, ModelConfig, Precision
from mt.corpus import Corpus
from mt.runtime import DTYPES, Runtime
from mt.tokenizer import BOS, EOS, PAD

NAME = f"transformers {transformers.__version__}"
PRECISIONS = (Precision.fp32, Precision.bf16)
ATTENTIONS = ("eager", "sdpa")
TRIAL = 4.0  # seconds of training for each of their combinations
WARM_UP = 2  # steps before the clock starts, each time
IGNORED = -100  # a label that does not count

logging.getLogger("transformers").setLevel(logging.ERROR)


def marian(config: ModelConfig, *, vocab_size: int, attention: str) -> MarianMTModel:
    """A MarianMTModel of the same shape, with random weights.

    Raises: ValueError for an activation that it does not have.
    """
    if config.activation is not Activation.relu:
        raise ValueError("the peer has no gated activation; compare with model.activation=relu")
    return MarianMTModel(
        MarianConfig(
            vocab_size=vocab_size,
            d_model=config.dim,
            encoder_layers=config.encoder_layers,
            decoder_layers=config.decoder_layers,
            encoder_attention_heads=config.num_heads,
            decoder_attention_heads=config.num_heads,
            encoder_ffn_dim=config.ffn_dim,
            decoder_ffn_dim=config.ffn_dim,
            activation_function="relu",
            dropout=config.dropout,
            attention_dropout=config.attention_dropout,
            activation_dropout=config.ffn_dropout,
            scale_embedding=True,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
            decoder_start_token_id=BOS,
            forced_eos_token_id=EOS,
            attn_implementation=attention,
        )
    )


class Pairs:
    """The training pairs that ours are, as a dataset."""

    def __init__(self, config: Config, corpus: Corpus) -> None:
        self.source, self.target = (
            Sequences(corpus.train.data.column(name).chunks)
            for name in ("source_ids", "target_ids")
        )
        limit = config.train.max_length - 1  # EOS
        lengths = zip(self.source.lengths, self.target.lengths, strict=True)
        self.indices = [i for i, pair in enumerate(lengths) if max(pair) <= limit]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        place = self.indices[index]
        return {"input_ids": [*self.source[place], EOS], "labels": [*self.target[place], EOS]}


class Collator:
    """Pairs of ids into padded tensors, as the model wants them; keeps count."""

    def __init__(self) -> None:
        self.counts: list[tuple[int, int, int]] = []  # a batch: tokens, positions, padding

    def __call__(self, pairs: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        source = pad([pair["input_ids"] for pair in pairs])
        target = pad([pair["labels"] for pair in pairs])
        num_tokens = int((target != PAD).sum())
        num_positions = source.numel() + target.numel()
        num_padding = num_positions - int((source != PAD).sum()) - num_tokens
        self.counts.append((num_tokens, num_positions, num_padding))
        begin = torch.full((len(pairs), 1), BOS)
        return {
            "input_ids": source,
            "attention_mask": (source != PAD).long(),
            "decoder_input_ids": torch.cat([begin, target[:, :-1]], dim=1),
            "labels": target.masked_fill(target == PAD, IGNORED),
        }


class Clock(TrainerCallback):
    """Stops a training after some seconds, which begin after the warm-up steps."""

    def __init__(self, seconds: float, *, device: torch.device) -> None:
        self.seconds = seconds
        self.device = device
        self.start = self.end = 0.0
        self.num_steps = 0  # measured

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the clock; ask for the end when the time is over."""
        if state.global_step < WARM_UP:
            return
        if (state.global_step - WARM_UP) % STEPS_AHEAD == 0:
            synchronize(self.device)
        self.end = time.perf_counter()
        if state.global_step == WARM_UP:
            self.start = self.end
            return
        self.num_steps = state.global_step - WARM_UP
        if self.end - self.start >= self.seconds:
            synchronize(self.device)
            self.end = time.perf_counter()
            control.should_training_stop = True


class PeerTraining:
    """MarianMTModel under Seq2SeqTrainer, on the ids that ours is trained on.

    Length-grouped batches of a fixed number of sentences. Logging, checkpoints, evaluation and
    the look for losses that are NaN are off.
    """

    def __init__(
        self,
        config: Config,
        corpus: Corpus,
        runtime: Runtime,
        *,
        batch_size: int,
        precision: Precision,
        attention: str,
    ) -> None:
        self.config = config
        self.pairs = Pairs(config, corpus)
        self.vocab_size = len(corpus.tokenizer)
        self.device = runtime.device
        self.batch_size = batch_size
        self.precision = precision
        self.attention = attention
        self.trials: dict[str, float] = {}  # tokens a second of all combinations
        self.seed = 0

    @property
    def choice(self) -> str:
        """Precision and attention."""
        return f"{self.precision.value} {self.attention}"

    @classmethod
    def best(
        cls,
        config: Config,
        corpus: Corpus,
        runtime: Runtime,
        *,
        batch_size: int,
        choice: str | None,
    ) -> "PeerTraining":
        """The chosen combination of precision and attention, or the fastest in a short trial."""
        candidates = [
            cls(
                config,
                corpus,
                runtime,
                batch_size=batch_size,
                precision=precision,
                attention=attention,
            )
            for precision in PRECISIONS
            for attention in ATTENTIONS
        ]
        if choice is not None:
            (chosen,) = (candidate for candidate in candidates if candidate.choice == choice)
            return chosen
        trials = {candidate.choice: candidate.run(TRIAL).speed for candidate in candidates}
        best = max(candidates, key=lambda candidate: trials[candidate.choice])
        best.trials = trials
        return best

    def run(self, seconds: float) -> Turn:
        """Train a fresh model for so long, then to the end of the step."""
        self.seed += 1
        torch.manual_seed(self.seed)
        collator = Collator()
        clock = Clock(seconds, device=self.device)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = Seq2SeqTrainer(
                model=marian(
                    self.config.model, vocab_size=self.vocab_size, attention=self.attention
                ),
                args=self._arguments(folder),
                train_dataset=self.pairs,
                data_collator=collator,
                callbacks=[clock],
            )
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.train()
        assert clock.num_steps > 0
        counts = collator.counts[WARM_UP : WARM_UP + clock.num_steps]
        num_tokens, num_positions, num_padding = map(sum, zip(*counts, strict=True))
        return Turn(
            seconds=clock.end - clock.start,
            num_tokens=num_tokens,
            num_positions=num_positions,
            num_padding=num_padding,
        )

    def _arguments(self, folder: str) -> Seq2SeqTrainingArguments:
        optim = self.config.optim
        return Seq2SeqTrainingArguments(
            output_dir=folder,
            max_steps=1_000_000,  # the clock ends it
            per_device_train_batch_size=self.batch_size,
            train_sampling_strategy="group_by_length",
            optim="adamw_torch_fused",
            learning_rate=optim.lr,
            adam_beta1=optim.beta1,
            adam_beta2=optim.beta2,
            adam_epsilon=optim.eps,
            weight_decay=optim.weight_decay,
            max_grad_norm=optim.clip_norm or 0.0,
            warmup_steps=optim.warmup_steps,
            label_smoothing_factor=self.config.train.label_smoothing,
            bf16=self.precision is Precision.bf16,
            use_cpu=self.device.type == "cpu",
            seed=self.seed,
            logging_strategy="no",
            logging_nan_inf_filter=False,
            save_strategy="no",
            eval_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )


class PeerDecoding:
    """MarianMTModel and its generate, on source [B, S] into ``length`` pieces a sentence."""

    def __init__(
        self,
        *,
        config: ModelConfig,
        source: Tensor,
        vocab_size: int,
        device: torch.device,
        beam_size: int,
        length: int,
    ) -> None:
        self.source = source.to(device)
        self.beam_size = beam_size
        self.length = length
        self.models: dict[str, MarianMTModel] = {}  # by precision and attention
        for precision in PRECISIONS:
            for attention in ATTENTIONS:
                torch.manual_seed(1)
                model = marian(config, vocab_size=vocab_size, attention=attention).eval()
                self.models[f"{precision.value} {attention}"] = model.to(
                    device=device, dtype=DTYPES[precision]
                )

    @property
    def choices(self) -> list[str]:
        """The combinations of precision and attention."""
        return list(self.models)

    def run(self, choice: str) -> None:
        """Translate all sentences once."""
        output = self.models[choice].generate(
            input_ids=self.source,
            attention_mask=torch.ones_like(self.source),
            num_beams=self.beam_size,
            do_sample=False,
            use_cache=True,
            early_stopping=self.beam_size > 1,
            min_new_tokens=self.length,
            max_new_tokens=self.length,
        )
        assert output.shape == (len(self.source), 1 + self.length)
        synchronize(self.source.device)
