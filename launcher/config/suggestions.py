"""What the user may have meant by a key that does not exist: names of other tools, then similar names."""

from __future__ import annotations

import difflib
import json
import re
import shlex
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.config.deepspeed_file import read_deepspeed_file
from launcher.config.lightning_cli_strategy import find_zero_strategy
from launcher.config.schema import RunConfig
from launcher.config.synonyms import ADVICE, DEEPSPEED, GROUPS, SAME_ARGUMENT, SYNONYMS, VALUES
from launcher.core.errors import ConfigError, Problem
from launcher.core.secrets import redact
from strategies.registry import list_strategy_names

# Similarity of names that are compared, of names whose parts differ, and of a misspelt part.
_CUTOFF, _SAME, _SAME_PART = 0.75, 0.9, 0.7
_MOST_TRIED = 8
_SHORTEST_START = 4
_MOST_SUGGESTIONS = 2
_LONGEST_VALUE = 60
_WANDB_MODES = ("auto", "online", "offline", "disabled")


@dataclass(frozen=True, slots=True)
class ClassFindings:
    """What the classes that a config names accept.

    Attributes:
        problems: with the classes and their arguments.
        flags: the dotted path of each argument, and whether it accepts `true`.
    """

    problems: tuple[Problem, ...] = ()
    flags: Mapping[str, bool] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CommandKeys:
    """What a command accepts in addition to the settings of the config.

    Attributes:
        options: its own options, such as `--nproc-per-node`.
        synonyms: names of other tools for them, with what to give instead: an option, or a sentence.
        inspect: imports the classes that a config names and checks them; called only if something is wrong already.
        typed: the paths that were given on the command line.
        flags: the arguments of the user's classes that were given there without a value.
        arguments: the paths of the arguments of the user's classes.
    """

    options: tuple[str, ...] = ()
    synonyms: Mapping[str, str] = field(default_factory=dict)
    inspect: Callable[[RunConfig], ClassFindings] | None = None
    typed: frozenset[str] = frozenset()
    flags: frozenset[str] = frozenset()
    arguments: tuple[str, ...] = ()


NO_COMMAND = CommandKeys()


def describe_unknown_key(path: str, value: Any, keys: Collection[str], command: CommandKeys = NO_COMMAND) -> str:
    """The message about an unknown key, with the settings to give instead."""
    name = path.rpartition(".")[2].replace("-", "_").lower()
    typed = path in command.typed
    is_argument = any(each.endswith(f".{name}") for each in command.arguments)
    if name in ADVICE["settings"] and name not in command.synonyms and not is_argument:
        return f"unknown key; {ADVICE['settings'][name]}"
    advice = command.synonyms.get(name, "") if typed else ""
    # A sentence in place of an option.
    if " " in advice and not advice.startswith("-"):
        return f"unknown key; {advice}"
    options = command.options if typed else ()
    found = _find((path, name, value), [*keys, *command.arguments], options, [advice] if advice else [])
    if found:
        shown = (_format(each, redact({path: value})[path], typed=typed) for each in found[:_MOST_SUGGESTIONS])
        return f"unknown key; did you mean {' or '.join(shown)}?"
    if any(name in group for group in SAME_ARGUMENT):
        if command.arguments:
            return f"unknown key; no class takes it; they take {', '.join(command.arguments[:8])}"
        return "unknown key; give an argument of a class below the class, as in --model.init_args.lr 0.1"
    return "unknown key; `launcher fit --help` lists all keys"


def describe_group(path: str, value: Any, command: CommandKeys = NO_COMMAND) -> str:
    """The message about a value in place of a group of settings."""
    text = f"given {redact(value)!r}; expected a mapping of settings"
    if path == "fsdp" and (value is True or isinstance(value, str)):
        return f"{text}; did you mean {_format(_find_fsdp(value), None, typed=path in command.typed)}?"
    if path not in GROUPS or not isinstance(value, str):
        return text
    setting = "wandb.mode=" + value if path == "wandb" and value in _WANDB_MODES else GROUPS[path]
    return f"{text}; did you mean {_format(setting, value, typed=path in command.typed)}?"


def describe_unknown_option(option: str, value: str | None, command: CommandKeys) -> str:
    """The message about an argument with one dash, or none."""
    advice = command.synonyms.get(option.lstrip("-"), "") if option.startswith("-") else ""
    if advice.startswith("--"):
        return f"unknown option; did you mean {_format(advice, value, typed=True)}?"
    return f"unknown option; {advice}" if advice else "not an option; give settings as --key value or --key=value"


def _find(
    given: tuple[str, str, Any],
    keys: Sequence[str],
    options: Sequence[str],
    advice: Iterable[str],
    *,
    is_near: bool = False,
) -> list[str]:
    """Settings or options, the most likely one first; `is_near`: without similar names."""
    _, name, value = given
    by_name: dict[str, list[str]] = {}
    for known in keys:
        by_name.setdefault(known.rpartition(".")[2], []).append(known)
    for option in options:
        by_name.setdefault(option.lstrip("-").replace("-", "_"), []).append(option)
    # Keys at the wrong level and misspelt groups are as common as misspelt keys.
    same_name = by_name.get(name, [])
    same_argument = [known for group in SAME_ARGUMENT if name in group for each in group
                     for known in by_name.get(each, ()) if ".init_args." in known]  # fmt: skip
    # What `submit` requests from SLURM is seldom meant elsewhere.
    requested = [known for known in same_name if known.startswith("slurm.")]
    found = [*advice, *(known for known in same_name if known not in requested), *same_argument]
    if not found and name in SYNONYMS:
        found = [_with_strategy(value)] if SYNONYMS[name] == DEEPSPEED else SYNONYMS[name].split(" | ")
    found = found or requested
    if not found and not is_near:
        found = _find_near(given, {*by_name, *SYNONYMS}, keys, options)
    return list(dict.fromkeys(found))


def _find_near(
    given: tuple[str, str, Any], names: Collection[str], keys: Sequence[str], options: Sequence[str]
) -> list[str]:
    """Settings or options with a similar name; one whose parts differ, as `log_every` and `val_every`, is not meant."""
    path, name, value = given
    groups = {known.partition(".")[0] for known in keys if "." in known}
    close = difflib.get_close_matches(path, {*keys, *groups}, n=_MOST_TRIED, cutoff=_CUTOFF)
    if found := [each for each in close if _has_same_parts(path, each)]:
        return found[:1]
    near = difflib.get_close_matches(name, names, n=_MOST_TRIED, cutoff=_CUTOFF)
    for each in near:
        if _has_same_parts(name, each):
            return _find((each, each, value), keys, options, (), is_near=True)
    # As `limit_train` for `limit_train_batches`.
    longer = [known for known in keys if known.rpartition(".")[2].startswith(f"{name}_")]
    return longer if len(longer) == 1 and len(name) >= _SHORTEST_START else []


def _has_same_parts(given: str, known: str) -> bool:
    """Whether each part of a name is, perhaps misspelt, one of another name, or only the separators differ."""
    mine, others = (re.split(r"[._-]", text) for text in (given, known))
    if _is_similar("".join(mine), "".join(others), _SAME):
        return True
    return all(any(_is_similar(part, other, _SAME_PART) for other in others) for part in mine)


def _is_similar(first: str, second: str, least: float) -> bool:
    return difflib.SequenceMatcher(None, first, second).ratio() >= least


def _with_strategy(file: Any) -> str:
    """The settings for a DeepSpeed file: it, and the strategy of its stage and offload."""
    try:
        strategy = find_zero_strategy(read_deepspeed_file(Path(file)), "")
    except (ConfigError, TypeError):
        return DEEPSPEED
    return f"deepspeed_config strategy={strategy}"


def _format(settings: str, value: Any, *, typed: bool) -> str:
    """Settings as they are written on the command line, or in a file."""
    shown: list[str] = []
    for number, setting in enumerate(settings.split(" ")):
        key, equals, fixed = setting.partition("=")
        text = fixed if equals else _text_of(key, value) if number == 0 else ""
        if not typed:
            shown.append(f"{key}: {text}" if equals else key)
            continue
        shown.append(f"{key if key.startswith('-') else f'--{key}'}{f' {shlex.quote(text)}' if text else ''}")
    return " ".join(shown) if typed else ", ".join(shown)


def _find_fsdp(value: Any) -> str:
    """The strategy for a value in place of the group `fsdp`, as HF's `--fsdp 'full_shard auto_wrap offload'`."""
    named = str(value).replace(",", " ").lower().split()
    if "offload" in named:
        return "strategy=fsdp2_offload"
    names = (VALUES["strategy"].get(each, each) for each in named)
    return f"strategy={next((name for name in names if name in list_strategy_names()), 'fsdp2')}"


def _text_of(key: str, value: Any) -> str:
    """A given value as it is typed; empty for one that is too long or nested."""
    if value is None or isinstance(value, dict):
        return ""
    text = value if isinstance(value, str) else json.dumps(value)
    text = VALUES.get(key, {}).get(text, text)
    if key in ("wandb.tags", "fsdp.wrap") and isinstance(value, str):
        text = f"[{text}]"
    # `true` is also the value of an option without one.
    return "" if len(text) > _LONGEST_VALUE or value is True else text
