"""What the scripts share: checked command lines, and errors that need no traceback.

Hydra stops at the first bad override and names no near one. So every override is first held
against the schema, and all that is wrong comes out in one message.
"""

import dataclasses
import difflib
import logging
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf

from mt.compose import CONFIGS, GROUPS, SCHEMAS, ConfigError, compose
from mt.config import accepts, enum_of, expected, setting_types

EXPERIMENT = "experiment"  # the one group without a schema of its own: it may change anything


class Verdict(NamedTuple):
    """What is wrong with an override, and the one to go on with; either may be absent."""

    problem: str | None
    usable: str | None = None


def check_command_line(*, primary: str) -> None:
    """Check the program's arguments; end it with exit code 2 where anything is wrong."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # a bug then shows its whole traceback
    arguments = get_args_parser().parse_args(sys.argv[1:])
    foreign = arguments.config_path or arguments.config_name or arguments.config_dir
    if foreign or arguments.experimental_rerun or arguments.shell_completion:
        return  # configs that are not ours: Hydra says what is wrong with them
    with user_errors():
        if arguments.multirun and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ConfigError(["--multirun goes with one process; start a command for each run"])
        check_overrides(arguments.overrides, primary=primary, sweep=arguments.multirun)


def check_overrides(overrides: Sequence[str], *, primary: str, sweep: bool = False) -> None:
    """Raise ConfigError with all that is wrong with the overrides and the config they make.

    A mistyped name is read as the one that was probably meant, so that the checks across
    settings can run, and their problems are listed together with the typing errors. In a sweep
    an override may hold several values, and each job is checked when its turn comes.
    """
    verdicts = [_judge(text, primary=primary, sweep=sweep) for text in overrides]
    problems = [verdict.problem for verdict in verdicts if verdict.problem is not None]
    if not sweep:
        usable = [verdict.usable for verdict in verdicts if verdict.usable is not None]
        try:
            compose(usable, primary=primary)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)


@contextmanager
def user_errors() -> Iterator[None]:
    """End the program with ``error: ...`` and exit code 2 on a ValueError, a user's mistake.

    Any other exception keeps its traceback; ``hydra.verbose=true`` shows that of a ValueError.
    """
    try:
        yield
    except ConfigError as error:  # several processes find the same: the first one tells
        if os.environ.get("RANK", "0") != "0":
            time.sleep(1)  # whoever ends first ends the others
            raise SystemExit(2) from None
        _leave(f"error: {error}", code=2)
    except ValueError as error:
        logging.getLogger(__name__).debug("where it happened", exc_info=True)
        _leave(f"error: {error}", code=2)
    except KeyboardInterrupt:
        _leave("interrupted", code=130)


def _leave(message: str, *, code: int) -> NoReturn:
    print(message, file=sys.stderr)
    raise SystemExit(code) from None


def _judge(text: str, *, primary: str, sweep: bool) -> Verdict:
    name, equals, value = text.partition("=")
    key = name.lstrip("+~")
    if not re.fullmatch(r"[\w.@/$-]+", key):
        return Verdict(f"{text}: this is not of the form name=value")
    types, names = setting_types(SCHEMAS[primary]), _names(primary)
    if not equals and not name.startswith("~"):
        return Verdict(f"{text}: write it as name=value{_did_you_mean(key, names)}")
    if not key.startswith(("hydra.", "hydra/")) and key not in names:
        return _judge_unknown(text, key=key, value=value, primary=primary, sweep=sweep)
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException:
        quoted = re.sub(r"(['\\])", r"\\\1", value)
        return Verdict(f"{text}: cannot be read; put the value in quotes: \"{name}='{quoted}'\"")
    if override.is_sweep_override() and not sweep:
        return Verdict(f"{text}: several values need --multirun, text with a comma needs quotes")
    if override.is_hydra_override():
        return Verdict(None, text)
    if key in types:
        return _judge_value(override, text=text, kind=types[key], schema=SCHEMAS[primary])
    return _judge_choice(override, text=text)


def _judge_unknown(text: str, *, key: str, value: str, primary: str, sweep: bool) -> Verdict:
    types, names = setting_types(SCHEMAS[primary]), _names(primary)
    if parts := [part for part in types if part.startswith(f"{key}.")]:
        return Verdict(f"{text}: set its parts one by one: {', '.join(parts)}")
    if others := [other for other in SCHEMAS if key in _names(other)]:
        return Verdict(f"{text}: is a setting of {others[0]}, not of {primary}")
    hint, near = _did_you_mean(key, names), _near(key, names)
    if not near and (siblings := [n for n in types if n.split(".")[0] == key.split(".")[0]]):
        hint = f"; there are {', '.join(siblings)}"
    meant = _judge(f"{near[0]}={value}", primary=primary, sweep=sweep) if len(near) == 1 else None
    return Verdict(f"{text}: unknown setting{hint}", meant.usable if meant else None)


def _judge_choice(override: Override, *, text: str) -> Verdict:
    group = override.key_or_group
    folder = CONFIGS / group
    choices = sorted(
        path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")
    )
    for value in [] if override.is_delete() else _values(override):
        if value not in choices:
            hint, known = _did_you_mean(str(value), choices), ", ".join(choices) or "none"
            return Verdict(f"{text}: no such {group}{hint}; there are: {known}")
    if override.is_add():
        return Verdict(f"{text}: leave out the +, the group exists", text.lstrip("+"))
    return Verdict(None, text)


def _judge_value(override: Override, *, text: str, kind: Any, schema: type) -> Verdict:
    if override.is_delete():
        return Verdict(f"{text}: a setting cannot be removed, only changed")
    for value in _values(override):
        if not accepts(OmegaConf.structured(schema), override.key_or_group, value):
            choices = [member.name for member in enum_of(kind) or ()]
            return Verdict(f"{text}: expected {expected(kind)}{_did_you_mean(str(value), choices)}")
    if override.is_add():
        return Verdict(f"{text}: leave out the +, the setting exists", text.lstrip("+"))
    return Verdict(None, text)


def _values(override: Override) -> list[Any]:
    """The value of an override, or all the values of a sweep that can be listed."""
    if not override.is_sweep_override():
        return [override.value()]
    if not override.is_discrete_sweep() or not hasattr(override.value(), "list"):
        return []
    return [getattr(value, "text", value) for value in override.sweep_iterator()]


def _groups(primary: str) -> list[str]:
    parts = dataclasses.fields(SCHEMAS[primary])
    own = [part.name for part in parts if GROUPS.get(part.name) is part.type]
    return [*own, EXPERIMENT] if primary == "train" else own


def _names(primary: str) -> list[str]:
    return [*setting_types(SCHEMAS[primary]), *_groups(primary)]


def _near(word: str, names: Iterable[str]) -> list[str]:
    """The names that ``word`` may stand for: the right name in another group, or similar ones."""
    word = word.lower().replace("-", "_")
    ends = {name: name.rsplit(".", 1)[-1] for name in names if "." in name or "." not in word}
    group, _, end = word.rpartition(".")
    if same := [name for name in ends if ends[name] == end]:
        return same
    inside = [name for name in ends if group and name == f"{group}.{ends[name]}"]
    if not inside and (close := difflib.get_close_matches(word, ends, n=1, cutoff=0.7)):
        return close
    for candidates in (inside, list(ends)):
        close = difflib.get_close_matches(end, [ends[name] for name in candidates], n=1, cutoff=0.7)
        if close:
            return [name for name in candidates if ends[name] in close]
    return []


def _did_you_mean(word: str, names: Iterable[str]) -> str:
    near = _near(word, names)
    return f"; did you mean {' or '.join(near)}?" if near else ""
