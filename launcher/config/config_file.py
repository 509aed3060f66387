"""Read a config file: YAML or JSON, with files for parts of it as LightningCLI has them."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

import yaml

from launcher.config.merge import CLASS_FIELDS, CLASS_LISTS
from launcher.core.errors import ConfigError, Problem
from launcher.core.yaml_loader import Loader

SUFFIXES = (".yaml", ".yml", ".json")
# Parts of the config for which LightningCLI accepts a file.
_PARTS = (*CLASS_FIELDS, "trainer", *(f"trainer.{key}" for key in CLASS_LISTS))


def read_config_file(path: Path) -> dict[str, Any]:
    """The plain values of one YAML or JSON file.

    Raises:
        ConfigError: no such file, unreadable, invalid (with the line), without settings, or no mapping.
    """
    values = _read_settings(path)
    if not isinstance(values, dict):
        raise ConfigError([Problem(str(path), f"found {type(values).__name__}; expected a mapping of settings")])
    return {str(key): read_part(each, path.parent, key) for key, each in values.items()}


def read_part(given: Any, folder: Path, part: str) -> Any:
    """The content of the file for a file name, as in `model: model.yaml`; other values and parts unchanged."""
    if part not in _PARTS:
        return given
    if isinstance(given, str) and given.endswith(SUFFIXES):
        file = folder / given
        given, folder = _read_settings(file), file.parent
    if part == "trainer" and isinstance(given, dict):
        return {key: read_part(each, folder, f"trainer.{key}") for key, each in given.items()}
    return given


def _read_settings(path: Path) -> Any:
    """The content of a file that must not be empty: it would mean the demo, or no model."""
    values = read_plain_file(path)
    if values is None or values == {}:
        raise ConfigError([Problem(str(path), "the file has no settings; write some, or do not give this file")])
    return values


def read_plain_file(path: Path) -> Any:
    """The content of a YAML or JSON file.

    Raises:
        ConfigError: no such file, unreadable, or invalid (with the line).
    """
    if path.suffix == ".py":
        raise ConfigError([Problem(str(path), "is a Python file; give a YAML or JSON file")])
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        close = difflib.get_close_matches(path.name, _config_names(path.parent), n=1)
        advice = f"did you mean {path.parent / close[0]}?" if close else "`launcher fit --print-config` prints one"
        problem = f"no such file; {advice}"
        raise ConfigError([Problem(str(path), problem)]) from None
    except IsADirectoryError:
        raise ConfigError([Problem(str(path), f"is a folder; give a file in it{_list_files(path)}")]) from None
    except (OSError, UnicodeDecodeError) as error:
        problem = f"cannot be read: {error}; give a text file that you may read"
        raise ConfigError([Problem(str(path), problem)]) from error
    try:
        return json.loads(text) if path.suffix == ".json" else yaml.load(text, Loader)  # noqa: S506 -- a SafeLoader
    except json.JSONDecodeError as error:
        problem = f"invalid JSON: {error.msg}; correct this line"
        raise ConfigError([Problem(f"{path}, line {error.lineno}", problem)]) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}, line {mark.line + 1}, column {mark.column + 1}" if mark else str(path)
        problem = f"invalid YAML: {error.problem or error.context}; correct this line"
        raise ConfigError([Problem(where, problem)]) from error
    except (yaml.YAMLError, ValueError) as error:
        # ValueError: a well-formed date or number that does not exist.
        raise ConfigError([Problem(str(path), f"invalid YAML: {error}; correct this value")]) from error


def _list_files(folder: Path) -> str:
    names = _config_names(folder)[:3]
    return f", such as {', '.join(str(folder / name) for name in names)}" if names else ""


def _config_names(folder: Path) -> list[str]:
    try:
        return sorted(file.name for file in folder.iterdir() if file.name.endswith(SUFFIXES))
    except OSError:
        return []
