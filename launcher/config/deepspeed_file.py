"""A user's DeepSpeed config: read from its file, which is never written, and checked for keys that do not exist."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.config.schema import RunConfig
from launcher.core.errors import ConfigError, Problem
from strategies.deepspeed_keys import find_broken_keys

FIELD = "deepspeed_config"


def with_deepspeed_file(config: RunConfig) -> RunConfig:
    """The same config with the content of the file that `deepspeed_config` names, if it names one.

    The run keeps the content, so that a file that changes later does not change the run.

    Raises:
        ConfigError: no such file, broken JSON (with the line), or keys that DeepSpeed does not know.
    """
    if not isinstance(config.deepspeed_config, str):
        return config
    content = read_deepspeed_file(Path(config.deepspeed_config))
    problems = deepspeed_problems(content)
    if problems:
        raise ConfigError(problems)
    return dataclasses.replace(config, deepspeed_config=content)


def read_deepspeed_file(path: Path) -> dict[str, Any]:
    """The settings of a DeepSpeed JSON file.

    Raises:
        ConfigError: no such file, unreadable, broken (with the line), no mapping, or a key given twice.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_each_key_once)
    except FileNotFoundError:
        problem = "no such file; give a DeepSpeed JSON file, or its settings as a mapping"
        raise ConfigError([Problem(f"{FIELD} ({path})", problem)]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            [Problem(f"{FIELD} ({path})", f"cannot be read: {error}; give a text file that you may read")]
        ) from error
    except json.JSONDecodeError as error:
        where = f"{FIELD} ({path}, line {error.lineno}, column {error.colno})"
        raise ConfigError([Problem(where, f"broken JSON: {error.msg}; correct this line")]) from error
    except _TwiceError as error:
        problem = f"key {error.args[0]!r} is given twice; remove one of them"
        raise ConfigError([Problem(f"{FIELD} ({path})", problem)]) from None
    if not isinstance(content, dict):
        problem = f"expected a mapping of settings, found {type(content).__name__}"
        raise ConfigError([Problem(f"{FIELD} ({path})", problem)])
    return content


def deepspeed_problems(settings: Any) -> list[Problem]:
    """Every key of a mapping of settings that DeepSpeed does not know, and every value of the wrong kind."""
    if not isinstance(settings, Mapping):
        return []
    return [Problem(f"{FIELD}.{path}", message) for path, message in find_broken_keys(settings)]


class _TwiceError(Exception):
    """A key of a JSON object that is given twice."""


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _TwiceError(key)
        found[key] = value
    return found
