"""From YAML files and overrides to one checked config; with ``scripts/`` all that knows Hydra."""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mt.config import (
    AUTO,
    Config,
    Device,
    EvalConfig,
    EvaluateConfig,
    Metric,
    Origin,
    Precision,
    setting_values,
)

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
SCHEMAS: dict[str, type] = {"train": Config, "evaluate": EvaluateConfig}  # by file in configs/

# The folders of configs/ whose files fill one part of a config each.
GROUPS: dict[str, Any] = {item.name: item.type for item in dataclasses.fields(Config)}
GROUPS["eval"] = EvalConfig

for _primary, _schema in SCHEMAS.items():
    ConfigStore.instance().store(name=f"{_primary}_schema", node=_schema)
for _group, _part in GROUPS.items():
    ConfigStore.instance().store(group=_group, name="schema", node=_part)


class ConfigError(ValueError):
    """All that is wrong with a configuration, in ``problems``."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        head = f"{len(problems)} problems in the configuration:"
        super().__init__(problems[0] if len(problems) == 1 else "\n  - ".join([head, *problems]))


def compose(overrides: Sequence[str], *, primary: str = "train") -> Any:
    """The config (Config or EvaluateConfig) that ``configs/<primary>.yaml`` and overrides make.

    Raises ConfigError.
    """
    try:
        with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return to_config(hydra.compose(primary, overrides=list(overrides)))
    except HydraException as error:
        raise ConfigError([_summary(error)]) from error


def to_config(node: DictConfig | ListConfig) -> Any:
    """What Hydra composed, as plain dataclasses (Config or EvaluateConfig), checked.

    Raises ConfigError, which lists every problem.
    """
    try:
        missing = sorted(OmegaConf.missing_keys(node))
        config: Any = OmegaConf.to_object(node) if not missing else None
    except OmegaConfBaseException as error:
        raise ConfigError([_summary(error)]) from error
    if problems := [f"{name}: has no value" for name in missing] or check(config):
        raise ConfigError(problems)
    return config


def _summary(error: BaseException) -> str:
    """The first lines of a Hydra or OmegaConf error and of its cause, on one line."""
    chain = [error] if error.__cause__ is None else [error, error.__cause__]
    lines = [line.strip() for part in chain for line in str(part).splitlines()]
    return "; ".join(dict.fromkeys(line for line in lines if line and "_type" not in line))


# Every number of the schema stands in exactly one of these rows; null is always allowed here.
RANGES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    (
        "at least 1",
        lambda value: value >= 1,
        "data.clean.max_chars data.clean.max_length_ratio data.max_pairs data.num_valid "
        "data.num_test tokenizer.max_sentences model.dim model.ffn_dim model.num_heads "
        "model.encoder_layers model.decoder_layers train.max_steps train.batch_tokens "
        "train.accumulate train.max_length train.num_threads train.validate_every train.patience "
        "train.save_every train.keep train.log_every train.max_skipped decode.beam_size "
        "decode.max_length decode.batch_tokens eval.num_threads",
    ),
    ("at least 300, of which 260 are bytes", lambda value: value >= 300, "tokenizer.vocab_size"),
    (
        "greater than 0",
        lambda value: value > 0,
        "train.max_epochs train.max_minutes optim.lr optim.muon_lr optim.eps optim.clip_norm",
    ),
    (
        "at least 0",
        lambda value: value >= 0,
        "optim.weight_decay optim.warmup_steps train.seed train.length_loss train.valid_sentences "
        "train.average decode.length_penalty",
    ),
    (
        "at least 0 and below 1",
        lambda value: 0 <= value < 1,
        "model.dropout model.attention_dropout model.ffn_dropout optim.beta1 optim.beta2 "
        "train.label_smoothing",
    ),
    ("between 0 and 1", lambda value: 0 <= value <= 1, "optim.final_lr_ratio"),
    ("above 0 and at most 1", lambda value: 0 < value <= 1, "tokenizer.character_coverage"),
    ("above 0 and below 1", lambda value: 0 < value < 1, "train.ema_decay"),
)


def check(config: Config | EvaluateConfig) -> list[str]:
    """Everything that is wrong with a config beyond names and types; empty when it is sound."""
    values = setting_values(config)
    problems = [
        f"{name}={values[name]}: must be {words}"
        for words, holds, names in RANGES
        for name in names.split()
        if isinstance(values.get(name), int | float)
        and not (math.isfinite(values[name]) and holds(values[name]))
    ]
    problems += [
        f"{name}: text with ${{ in it would be read as a reference; choose another name"
        for name, value in values.items()
        if isinstance(value, str) and "${" in value
    ]
    rules = _train_rules(config) if isinstance(config, Config) else _eval_rules(config.eval)
    return problems + [message for message, broken in rules.items() if broken]


def _train_rules(config: Config) -> dict[str, bool]:
    data, model, train = config.data, config.model, config.train
    rules = {
        f"data.{side}_lang={language}: must be a language code such as en "
        '(in a YAML file, write "no" with quotes)': not re.fullmatch(r"[\w-]+", language)
        or language in ("True", "False")
        for side, language in (("source", data.source_lang), ("target", data.target_lang))
    }
    names = {"data.name": data.name, "model.name": model.name, "train.run_name": train.run_name}
    rules |= {
        f"{name}={value}: must be a plain file name of letters, digits and . _ -": True
        for name, value in names.items()
        if value is not None and not re.fullmatch(r"\w[\w.-]*", value)
    }
    return rules | {
        "train.run_name=last: this name always points to the newest run": train.run_name == "last",
        f"data.source_lang and data.target_lang are both {data.source_lang}": (
            data.source_lang == data.target_lang and data.origin is not Origin.bible
        ),
        "data.repository: a Hub corpus needs its repository (owner/name)": (
            data.origin is Origin.hub and data.repository is None
        ),
        "data.train: a corpus of files needs the path of its training text, "
        "such as data.train=my/train for my/train.en and my/train.de": (
            data.origin is Origin.files and data.train is None
        ),
        "data.source_column and data.target_column: give both or neither": (
            (data.source_column is None) != (data.target_column is None)
        ),
        f"model.dim={model.dim}: must be even": model.dim % 2 == 1,
        f"model.dim={model.dim}: must be divisible by model.num_heads={model.num_heads}": (
            model.num_heads > 0 and model.dim % model.num_heads != 0
        ),
        f"train.average={train.average}: only train.keep={train.keep} checkpoints are kept": (
            train.average > train.keep
        ),
        f"train.batch_tokens={train.batch_tokens}: must be a whole number, or auto": (
            isinstance(train.batch_tokens, str) and train.batch_tokens != AUTO
        ),
        f"train.metric={train.metric.value}: needs train.valid_sentences above 0 "
        "(or train.metric=loss)": (train.metric is not Metric.loss and train.valid_sentences == 0),
        **_precision_rule("train", train.device, train.precision),
    }


def _eval_rules(config: EvalConfig) -> dict[str, bool]:
    return {
        "eval.source and eval.reference: give both or neither": (
            (config.source is None) != (config.reference is None)
        ),
        **_precision_rule("eval", config.device, config.precision),
    }


def _precision_rule(group: str, device: Device, precision: Precision) -> dict[str, bool]:
    return {
        f"{group}.precision=fp16: needs a GPU; on a CPU use auto, fp32 or bf16": (
            device is Device.cpu and precision is Precision.fp16
        )
    }
