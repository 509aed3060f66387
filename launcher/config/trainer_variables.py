"""`PL_TRAINER_<NAME>` variables: defaults of the config, as of Lightning's Trainer."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

from launcher.config.lightning_cli import translate_lightning_cli
from launcher.config.merge import with_class_specs
from launcher.config.schema import RunConfig, TrainerOptions
from launcher.config.validation import find_problems
from launcher.core.errors import ConfigError, Problem

PREFIX = "PL_TRAINER_"
# The Trainer's other parameters, which are top-level keys here or not supported.
_OTHERS = ("accelerator", "devices", "num_nodes", "precision", "strategy", "default_root_dir", "model_registry")
NAMES = (*(entry.name for entry in dataclasses.fields(TrainerOptions)), *_OTHERS)


def read_variables(env: Mapping[str, str]) -> dict[str, Any]:
    """The variables as values of a config file; unknown names and empty values are ignored, as in Lightning.

    Raises:
        ConfigError: lists each variable with an invalid value or without support.
    """
    given = {name: _parsed(text) for name in NAMES if (text := env.get(PREFIX + name.upper()))}
    if not given:
        return {}
    values, problems = translate_lightning_cli(with_class_specs({"trainer": given}))
    problems += find_problems(values)
    if problems:
        raise ConfigError([Problem(_variable(problem.path, given), problem.message) for problem in problems])
    return values


def with_variables(
    config: RunConfig, options: Mapping[str, Any], usual: RunConfig, env: Mapping[str, str]
) -> tuple[RunConfig, dict[str, Any]]:
    """Apply the variables in `env` to the settings that a script has left at their defaults, `usual`.

    The script's `options` are those of `config.trainer`; the result is the new config and options.
    """
    values = read_variables(env)
    trainer, wandb = values.pop("trainer", {}), values.pop("wandb", {})
    untouched = {name: value for name, value in values.items() if getattr(config, name) == getattr(usual, name)}
    explicit = {name: value for name, value in options.items() if value != getattr(usual.trainer, name)}
    config = dataclasses.replace(config, wandb=dataclasses.replace(config.wandb, **wandb), **untouched)
    return config, {**options, **trainer, **explicit}


def _parsed(text: str) -> Any:
    """As Lightning parses it."""
    with contextlib.suppress(ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return ast.literal_eval(text)
    return text


def _variable(path: str, given: Mapping[str, Any]) -> str:
    name = path.rpartition(".")[2]
    return ", ".join(PREFIX + each.upper() for each in ([name] if name in given else given))
