"""Every setting of the app: its name, type, default and meaning.

The YAML files in ``configs/`` state only differences from the defaults below; ``compose.py`` puts
them together. The rest of the app receives plain dataclasses.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_type_hints

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError


class Origin(Enum):
    """Where parallel text comes from."""

    bible = "bible"
    hub = "hub"
    files = "files"


class Algorithm(Enum):
    """How SentencePiece chooses its pieces."""

    unigram = "unigram"
    bpe = "bpe"


class Activation(Enum):
    """The nonlinearity of the feed-forward blocks."""

    relu = "relu"
    swiglu = "swiglu"


class Tie(Enum):
    """Which embedding tables share one matrix."""

    all = "all"  # source, target and output
    decoder = "decoder"  # target and output


class Optimizer(Enum):
    """The rule that turns gradients into updates."""

    adamw = "adamw"
    muon = "muon"  # Muon for the matrices of the blocks, AdamW for the rest


class Schedule(Enum):
    """The learning rate after the warm-up."""

    inverse_sqrt = "inverse_sqrt"
    cosine = "cosine"
    linear = "linear"


class Device(Enum):
    """Where tensors live; ``auto`` takes the best there is."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


class Precision(Enum):
    """The number format of matrix products; weights and optimizer state stay fp32."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Metric(Enum):
    """What decides which checkpoint is the best, and when to stop early."""

    chrf = "chrf"
    bleu = "bleu"
    loss = "loss"


class Resume(Enum):
    """What to do when a run of the same name exists."""

    auto = "auto"  # continue it; say so when it is finished; refuse when its settings differ
    never = "never"  # start another one, named with -2, -3, ...


class Split(Enum):
    """A held-out part of the corpus."""

    valid = "valid"
    test = "test"


class FinalEval(Enum):
    """Which split a finished training is scored on."""

    valid = "valid"
    test = "test"
    none = "none"


AUTO = "auto"  # of a setting that is otherwise a number


@dataclass(kw_only=True, slots=True)
class CleanConfig:
    """The cleaning rules, in the order in which they apply. Each can be switched off."""

    nfc: bool = True  # Unicode normalization form C
    control: bool = True  # control characters become spaces; white space is collapsed
    empty: bool = True  # drop pairs with an empty side
    max_chars: int | None = 1000  # drop pairs with a longer side, in characters; null: keep
    max_length_ratio: float | None = 4.0  # drop pairs whose character counts differ by more
    identical: bool = True  # drop pairs whose source equals the target
    duplicates: bool = True  # drop exact repetitions of a training pair
    leaks: bool = True  # drop training pairs that share a side with a held-out pair


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """A parallel corpus and its cleaning."""

    name: str = MISSING  # short name, part of the run's name
    origin: Origin = MISSING  # which of the readers below applies
    source_lang: str = "en"
    target_lang: str = "de"
    max_pairs: int | None = None  # read at most this many training pairs
    num_valid: int = 1000  # pairs cut off the training text where no validation set is given
    num_test: int = 1000  # pairs cut off the training text where no test set is given
    clean: CleanConfig = field(default_factory=CleanConfig)

    # origin=bible
    source_version: str | None = None  # which version, where a language has several
    target_version: str | None = None

    # origin=hub
    repository: str | None = None  # "owner/name" on the Hub, or a local folder of that layout
    revision: str | None = None  # a commit of the repository; null: the newest
    configuration: str | None = None  # {source} and {target} stand for the languages
    source_column: str | None = None  # null: column "translation", keyed by language
    target_column: str | None = None
    train_split: str = "train"
    valid_split: str | None = None  # null: cut off the training text
    test_split: str | None = None

    # origin=files
    train: str | None = None  # a prefix (train -> train.en, train.de), or one file
    valid: str | None = None
    test: str | None = None


@dataclass(kw_only=True, slots=True)
class TokenizerConfig:
    """SentencePiece, one joint vocabulary for both languages."""

    algorithm: Algorithm = Algorithm.unigram
    vocab_size: int = 4000
    character_coverage: float = 1.0  # share of characters with a piece; the rest become bytes
    max_sentences: int = 200_000  # train on a sample of this many sentences of a larger text


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Encoder-decoder Transformer, pre-norm."""

    name: str = MISSING  # short name, part of the run's name
    dim: int = 128
    ffn_dim: int = 512
    num_heads: int = 4
    encoder_layers: int = 3
    decoder_layers: int = 3
    activation: Activation = Activation.relu
    dropout: float = 0.1  # after embeddings and every block
    attention_dropout: float = 0.0  # on attention weights
    ffn_dropout: float = 0.0  # after the nonlinearity
    tie: Tie = Tie.all
    length_head: bool = True  # predict the target length; bounds each sentence's search


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """Optimizer and learning rate."""

    algorithm: Optimizer = Optimizer.adamw
    lr: float = 3e-3  # peak learning rate (AdamW's)
    muon_lr: float = 5e-3  # peak learning rate of Muon's matrices
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-9
    weight_decay: float = 0.0  # on matrices only
    schedule: Schedule = Schedule.linear
    warmup_steps: int = 400  # at most a quarter of all steps
    final_lr_ratio: float = 0.0  # of the peak, at the last step (cosine, linear)
    clip_norm: float | None = 1.0  # largest gradient norm; null: no clipping


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """How long, on what, and what is kept."""

    # budget: the first one reached ends the training; none given: 5,000 steps
    max_steps: int | None = None
    max_epochs: float | None = None
    max_minutes: float | None = None  # turned into a step count before the first step

    seed: int = 1
    # pieces a batch, on the longer of both sides, padding included; auto: as many as fit a GPU's
    # memory (on a CPU 1024, since small batches learn more in the same time)
    batch_tokens: int | str = 1024
    accumulate: int = 1  # batches an optimizer step
    max_length: int = 256  # longer training sentences (in pieces) are left out and counted
    label_smoothing: float = 0.1
    length_loss: float = 0.1  # weight of the length head's loss
    ema_decay: float | None = None  # keep an exponential average of the weights, and use it

    device: Device = Device.auto
    precision: Precision = Precision.auto
    num_threads: int | None = None  # CPU threads; null: one a physical core
    compile: bool | None = None  # torch.compile the model and its losses; null: on CUDA

    validate_every: int = 500  # steps
    valid_sentences: int = 200  # how many are translated then; the loss takes the whole split
    metric: Metric = Metric.chrf  # decides the best checkpoint
    patience: int | None = None  # stop after so many validations without a better one
    save_every: int = 500  # steps
    keep: int = 3  # numbered checkpoints kept, besides the best
    average: int = 0  # average the last so many checkpoints at the end (0: don't)
    log_every: int = 20  # steps
    max_skipped: int = 5  # stop after so many non-finite steps in a row

    runs_dir: str = "runs"
    run_name: str | None = None  # null: made from corpus, pair, model and the settings' hash
    resume: Resume = Resume.auto
    final_eval: FinalEval = FinalEval.test


@dataclass(kw_only=True, slots=True)
class DecodeConfig:
    """Search for the best translation."""

    beam_size: int = 5
    length_penalty: float = 1.0  # alpha in score = sum of log p / length^alpha
    max_length: int = 256  # pieces; with a length head, each sentence has a tighter bound
    batch_tokens: int = 4096  # source pieces times beam size searched at once


@dataclass(kw_only=True, slots=True)
class DecodeOverrides:
    """Search options in place of the model's own; null: the model's."""

    beam_size: int | None = None
    length_penalty: float | None = None
    max_length: int | None = None
    batch_tokens: int | None = None

    def over(self, own: DecodeConfig) -> DecodeConfig:
        """The model's own options, but for those given here."""
        given = {
            item.name: value
            for item in dataclasses.fields(self)
            if (value := getattr(self, item.name)) is not None
        }
        return dataclasses.replace(own, **given)


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    """What to score."""

    model: str = "runs/last"  # a run (its best checkpoint) or a model directory
    split: Split = Split.test
    source: str | None = None  # score these files instead of the corpus's split
    reference: str | None = None
    baseline: str | None = None  # a second model, for the paired bootstrap test
    device: Device = Device.auto
    precision: Precision = Precision.fp32  # search compares small differences
    num_threads: int | None = None


@dataclass(kw_only=True, slots=True)
class Config:
    """All of a training run."""

    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)


@dataclass(kw_only=True, slots=True)
class EvaluateConfig:
    """All of an evaluation."""

    eval: EvalConfig = field(default_factory=EvalConfig)
    decode: DecodeOverrides = field(default_factory=DecodeOverrides)


# ---- names, types and values of settings -------------------------------------------------------


def setting_types(schema: type, prefix: str = "") -> dict[str, Any]:
    """Every setting below ``schema`` by its dotted name, with its type."""
    types: dict[str, Any] = {}
    for name, kind in get_type_hints(schema).items():
        if dataclasses.is_dataclass(kind):
            types |= setting_types(kind, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            types[prefix + name] = kind
    return types


def setting_values(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every setting of a config by its dotted name, with its value."""
    values: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            values |= setting_values(value, f"{prefix}{item.name}.")
        else:
            values[prefix + item.name] = value
    return values


def accepts(node: DictConfig, name: str, value: Any) -> bool:
    """Give a setting of ``node`` a value; False where its type does not allow that."""
    try:
        OmegaConf.update(node, name, value)
    except OmegaConfBaseException:
        return False
    return True


def enum_of(kind: Any) -> type[Enum] | None:
    """The choices of a setting's type, where it has such."""
    options = get_args(kind) or (kind,)
    return next((option for option in options if issubclass(option, Enum)), None)


def expected(kind: Any) -> str:
    """The values of a type, in words."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    options = get_args(kind) or (kind,)
    parts = [words[option] for option in options if option in words]
    if (enum := enum_of(kind)) is not None:
        parts.append(f"one of {', '.join(member.name for member in enum)}")
    return " or ".join([*parts, *(["null"] if type(None) in options else [])])


# ---- saving ------------------------------------------------------------------------------------

# Where a run lies and what is shown of it, not what it computes.
INCIDENTAL = frozenset(
    f"train.{name}" for name in ("runs_dir", "run_name", "resume", "final_eval", "log_every")
)


def save_config(config: Config, path: str | Path) -> None:
    """Write a config, all settings in full, as YAML."""
    Path(path).write_text(OmegaConf.to_yaml(OmegaConf.structured(config)), encoding="utf-8")


def load_config(path: str | Path) -> Config:
    """Read a config that ``save_config`` wrote; a setting that is newer than it has its default.

    Raises ValueError, which says all that is wrong with the file.
    """
    try:
        saved = OmegaConf.create(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise ValueError(f"{path}: cannot read this config: {error}") from error
    if not isinstance(saved, DictConfig):
        raise ValueError(f"{path}: is not a saved config")
    types, values = setting_types(Config), _flatten(OmegaConf.to_container(saved))
    node = OmegaConf.structured(Config)
    problems = [f"{name} is unknown" for name in values if name not in types]
    problems += [f"{name} is missing" for name in OmegaConf.missing_keys(node) - values.keys()]
    problems += [
        f"{name}={values[name]}: expected {expected(kind)}"
        for name, kind in types.items()
        if name in values and (_open(values[name]) or not accepts(node, name, values[name]))
    ]
    if problems:
        advice = "it was written by another version of the app, or changed by hand"
        raise ValueError(f"{path}: {advice}: {', '.join(problems)}")
    config = OmegaConf.to_object(node)
    assert isinstance(config, Config)
    return config


def _open(value: Any) -> bool:
    """Whether a value still stands for another one: missing, or a reference to something else."""
    return isinstance(value, str) and (value == MISSING or "${" in value)


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _plain(config: Config) -> dict[str, Any]:
    """The settings that decide what a run computes, by dotted name, as YAML writes them."""
    return {
        name: value.name if isinstance(value, Enum) else value
        for name, value in setting_values(config).items()
        if name not in INCIDENTAL
    }


def _yaml(value: Any) -> str:
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def differences(old: Config, new: Config) -> list[str]:
    """The settings that changed what a run computes, such as ``optim.lr: 0.001 -> 0.002``."""
    before, after = _plain(old), _plain(new)
    return [
        f"{name}: {_yaml(before[name])} -> {_yaml(after[name])}"
        for name in before
        if before[name] != after[name]
    ]


def config_hash(config: Config) -> str:
    """A short name for what a run computes: the same on every machine and in every process."""
    text = json.dumps(_plain(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
