"""A user's DeepSpeed config: read from its file and checked for unknown keys. The file is never written."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.config.schema import RunConfig
from launcher.core.errors import ConfigError, Problem
from strategies.deepspeed_keys import find_broken_keys

FIELD = "deepspeed_config"


def with_deepspeed_file(config: RunConfig) -> RunConfig:
    """The same config with the content of the file in `deepspeed_config`, if it is a path.

    The run keeps the content: later changes of the file do not affect it.

    Raises:
        ConfigError: no such file, invalid JSON (with the line), or unknown keys.
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
        ConfigError: no such file, unreadable, invalid (with the line), no mapping, or a key given twice.
    """
    where = f"{FIELD} ({path})"

    def to_mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        repeated = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        if repeated:
            raise ConfigError([Problem(where, f"key {repeated[0]!r} is given twice; remove one of them")])
        return dict(pairs)

    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=to_mapping)
    except FileNotFoundError:
        problem = "no such file; give a DeepSpeed JSON file, or its settings as a mapping"
        raise ConfigError([Problem(where, problem)]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([Problem(where, f"cannot be read: {error}; give a text file that you may read")]) from error
    except json.JSONDecodeError as error:
        where = f"{FIELD} ({path}, line {error.lineno}, column {error.colno})"
        raise ConfigError([Problem(where, f"invalid JSON: {error.msg}; correct this line")]) from error
    if not isinstance(content, dict):
        raise ConfigError([Problem(where, f"found {type(content).__name__}; expected a mapping of settings")])
    return content


def deepspeed_problems(settings: Any) -> list[Problem]:
    """Every unknown key of a mapping of DeepSpeed settings, and every value of the wrong type."""
    if not isinstance(settings, Mapping):
        return []
    return [Problem(f"{FIELD}.{path}", message) for path, message in find_broken_keys(settings)]
