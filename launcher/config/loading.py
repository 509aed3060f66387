"""Load a config from files (also LightningCLI's), dotted overrides and variables; without a source, the demo's."""

from __future__ import annotations

import ast
import copy
import dataclasses
import functools
import importlib.resources
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from launcher.config.cli_script import find_cli_script
from launcher.config.command_line import describe_lost_values, find_class_flags, read_overrides, split_arguments
from launcher.config.config_file import read_config_file
from launcher.config.deepspeed_file import with_deepspeed_file
from launcher.config.lightning_cli import translate_lightning_cli
from launcher.config.lightning_cli_strategy import describe_translation
from launcher.config.merge import CLASS_FIELDS, CLASS_LISTS, merge_values, with_class_specs, with_complete_lists
from launcher.config.schema import RunConfig
from launcher.config.suggestions import NO_COMMAND, ClassFindings, CommandKeys
from launcher.config.trainer_variables import read_variables
from launcher.config.validation import find_problems, parse_config
from launcher.core.errors import ConfigError, Problem
from launcher.core.secrets import resolve_references


def load_config(
    files: Iterable[str | Path] = (), overrides: Sequence[str] = (), command: CommandKeys = NO_COMMAND
) -> RunConfig:
    """Read, merge and check a config.

    Args:
        files: YAML or JSON files; a later one overrides an earlier one, key by key.
        overrides: command line arguments such as `--trainer.max_epochs 3` or `--model.init_args.lr=1e-4`.
        command: what the command accepts in addition, for the advice in messages.

    Raises:
        ConfigError: every problem of every source at once.
    """
    command = with_typed(command, overrides)
    return build_config(read_sources(files, overrides, command), command)


def with_typed(command: CommandKeys, overrides: Sequence[str]) -> CommandKeys:
    """The command's keys with those that were given on the command line."""
    typed = frozenset(each.path for each in split_arguments(overrides) if each.path)
    return dataclasses.replace(command, typed=typed, flags=frozenset(find_class_flags(overrides)))


def read_sources(
    files: Iterable[str | Path] = (), overrides: Sequence[str] = (), command: CommandKeys = NO_COMMAND
) -> dict[str, Any]:
    """Read and merge: normalized plain values, whose fields are not checked yet; `PL_TRAINER_*` come first.

    Raises:
        ConfigError: a source cannot be read or contradicts itself; lists the problems of the fields too.
    """
    values: dict[str, Any] = {}
    problems: list[Problem] = []
    typed, wrong = read_overrides(overrides, command)
    readers = [functools.partial(read_variables, os.environ),
               *(functools.partial(read_config_file, Path(file)) for file in files), lambda: typed]  # fmt: skip
    strategy: Any = None
    for read in readers:
        try:
            raw = read()
            strategy = _complete_strategy(raw, strategy)
            source, contradictions = normalize_values(raw)
        except ConfigError as error:
            problems += error.problems
        else:
            problems += [*contradictions, *describe_lost_values(values, source, command)]
            merge_values(values, source)
    problems += wrong
    if problems:
        raise ConfigError([*problems, *_explain(values, _inspect(values, command), command)])
    return values


def find_notices(files: Iterable[str | Path], overrides: Sequence[str], command: CommandKeys) -> list[str]:
    """Notices about valid settings of LightningCLI that have another effect here."""
    given: Any = None
    for values in [*(read_config_file(Path(file)) for file in files), read_overrides(overrides, command)[0]]:
        place = values["fit"] if isinstance(values.get("fit"), Mapping) else values
        trainer = place.get("trainer")
        own = trainer.get("strategy") if isinstance(trainer, Mapping) else None
        given = place.get("strategy") or own or given
    return describe_translation(given)


def find_devices_source(files: Iterable[str | Path], overrides: Sequence[str]) -> str:
    """Where `devices` was given last: '--devices', or the key and the file."""
    for argument in reversed(overrides):
        if argument.partition("=")[0] in ("--devices", "--trainer.devices"):
            return argument.partition("=")[0]
    for file in reversed([*files]):
        values = read_config_file(Path(file))
        values = values["fit"] if isinstance(values.get("fit"), Mapping) else values
        trainer = values.get("trainer")
        if isinstance(trainer, Mapping) and trainer.get("devices") not in (None, "auto"):
            return f"trainer.devices in {file}"
        if "devices" in values:
            return f"devices in {file}"
    return "devices"


def _complete_strategy(source: dict[str, Any], earlier: Any) -> Any:
    """Add the class of an earlier source to strategy arguments without a class; returns the last strategy."""
    trainer = source.get("trainer")
    if not isinstance(trainer, dict):
        return earlier
    given = trainer.get("strategy")
    if isinstance(given, dict) and "class_path" not in given and isinstance(earlier, dict):
        given = trainer["strategy"] = merge_values(copy.deepcopy(earlier), given)
    return earlier if given is None else given


def load_values(values: Mapping[str, Any]) -> RunConfig:
    """Check plain values as if read from one config file.

    Raises:
        ConfigError: every problem at once.
    """
    normal, problems = normalize_values(copy.deepcopy(dict(values)))
    if problems:
        raise ConfigError([*problems, *all_problems(normal)])
    return build_config(normal)


def build_config(values: dict[str, Any], command: CommandKeys = NO_COMMAND) -> RunConfig:
    """The config of normalized values; without model and data, the demo's config with these values merged in.

    Raises:
        ConfigError: every problem at once.
    """
    is_demo = not values.get("model") and not values.get("data")
    if is_demo:
        named = {key: value for key, value in values.items() if not (key in CLASS_FIELDS and value is None)}
        values = merge_values(read_preset("demo"), named)
    values, missing = resolve_references(with_complete_lists(values), os.environ)
    problems = [Problem(path, f"its value is a secret, which is not stored, and {name} is not set; set it, or give "
                        f"--{path} again") for path, name in missing.items()]  # fmt: skip
    has_problems = problems or all_problems(values)
    found = _inspect(values, command) if (has_problems or command.flags) and not is_demo else ClassFindings()
    if has_problems or _flag_problems(found, command):
        raise ConfigError([*problems, *_explain(values, found, command)])
    return with_deepspeed_file(parse_config(values))


def _inspect(values: Mapping[str, Any], command: CommandKeys) -> ClassFindings:
    """What the classes of the valid settings accept."""
    wrong = {problem.path for problem in all_problems(values)}
    roots = {path.partition(".")[0] for path in wrong}
    trainer = values.get("trainer")
    lists = {key: trainer[key] for key in (*CLASS_LISTS, "profiler") if key in trainer and f"trainer.{key}" not in wrong
             } if isinstance(trainer, Mapping) else {}  # fmt: skip
    sound = {key: values[key] for key in (*CLASS_FIELDS, "ddp") if values.get(key) and key not in roots}
    if command.inspect is None or not (sound or any(lists.values())):
        return ClassFindings()
    return command.inspect(parse_config({**sound, "trainer": lists}))


def _explain(values: Mapping[str, Any], found: ClassFindings, command: CommandKeys) -> list[Problem]:
    """Every problem of normalized values and of the classes, with advice that knows the classes' arguments."""
    own = all_problems(values, dataclasses.replace(command, arguments=tuple(found.flags)))
    flags = _flag_problems(found, command)
    return [*own, *flags, *(each for each in found.problems if each.path not in {flag.path for flag in flags})]


def _flag_problems(found: ClassFindings, command: CommandKeys) -> list[Problem]:
    """The classes' arguments that are given without a value and do not accept `true`."""
    return [Problem(path, f"given without a value; write --{path} VALUE") for path in sorted(command.flags)
            if found.flags.get(path) is False]  # fmt: skip


def normalize_values(values: dict[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """One source's values in the long form under the launcher's keys, and its contradictions."""
    return translate_lightning_cli(with_class_specs(values))


def all_problems(values: Mapping[str, Any], command: CommandKeys = NO_COMMAND) -> list[Problem]:
    """Every problem of normalized values that can be found without importing a class."""
    return [*find_problems(values, command), *_class_problems(values)]


def read_preset(name: str) -> dict[str, Any]:
    """The plain values of a config that ships with the launcher."""
    text = importlib.resources.files("launcher").joinpath("presets", f"{name}.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


def _class_problems(values: Mapping[str, Any]) -> list[Problem]:
    """Problems of the class specs; nothing is imported."""
    problems: list[Problem] = []
    if values.get("data") and not values.get("model"):
        problems.append(Problem("model", "not given, but data is; add `model: {class_path: my_pkg.MyModule}`"))
    for key in CLASS_FIELDS:
        spec = values.get(key)
        if not isinstance(spec, dict) or not spec:
            continue
        path, arguments = spec.get("class_path"), spec.get("init_args") or {}
        if not isinstance(arguments, Mapping):
            problems.append(Problem(f"{key}.init_args", f"given {arguments!r}; expected a mapping of arguments"))
        elif path is None:
            given = f"given arguments {', '.join(map(str, arguments))} without a class"
            problems.append(Problem(key, f"{given}; {_suggest_class(key)}"))
        elif not _names_class(path, short=key not in ("model", "data")):
            problems.append(Problem(f"{key}.class_path", f"given {path!r}; {_suggest_import_path(path)}"))
    return problems


def _suggest_class(key: str) -> str:
    """The advice for arguments without a class, as in a file of a LightningCLI script that fixes its classes."""
    script = find_cli_script(Path.cwd()) if key in ("model", "data") else None
    if script is None or key not in script.classes:
        return f"add --{key} my_pkg.MyClass, or {key}.class_path in the file"
    return f"{script.path.name} has the class: add --{key} {script.classes[key]}"


def _names_class(path: Any, *, short: bool) -> bool:
    """Whether a value looks like an import path; `short` allows a name without a module, as LightningCLI does."""
    if not isinstance(path, str) or path.endswith(".py"):
        return False
    return re.fullmatch(rf"[^\W\d]\w*(\.[^\W\d]\w*){'*' if short else '+'}", path) is not None


def _suggest_import_path(path: Any) -> str:
    """The advice for a value that is no import path."""
    if not isinstance(path, str) or not path.endswith(".py"):
        return "expected an import path like my_pkg.MyClass"
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
        classes = [node.name for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
        module = ".".join(file.absolute().relative_to(Path.cwd()).with_suffix("").parts)
    except (OSError, ValueError, SyntaxError):
        return "expected an import path like my_pkg.MyClass, not a file"
    return f"this is a file; give a class in it: {' or '.join(f'{module}.{name}' for name in classes or ['MyClass'])}"
