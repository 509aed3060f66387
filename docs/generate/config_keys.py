"""The reference of the config, from the records that hold it."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from docs.generate.markdown import code, table
from launcher.config.schema import RunConfig, config_fields
from launcher.monitoring.health import Limits
from slurm.job import list_job_options

_ENTRY = re.compile(r"^([\w, ]+): (.*)$")


def reference() -> str:
    """The keys of the top level, then a section for each group."""
    groups: dict[str, list[tuple[str, str]]] = {"": []}
    for path, key_type, default, text in rows():
        group = path.rpartition(".")[0]
        meaning = f"{text}<br>{key_type}; default {code(default)}"
        groups.setdefault(group, []).append((code(path), meaning))
    parts: list[str] = []
    for group, found in groups.items():
        if group:
            parts.append(f"## `{group}`\n\n{_group_text(group)}\n")
        parts.append(table(["key", "meaning, type and default"], found))
    return "\n".join(parts)


def rows() -> Iterator[tuple[str, str, str, str]]:
    """Path, type, default and meaning of every key."""
    texts = _texts()
    defaults = RunConfig().to_dict()
    for path, info in config_fields():
        value: Any = defaults
        for part in path.split("."):
            value = value[part]
        smallest = "" if info.minimum is None else f" At least {info.minimum:g}."
        yield path, _type_text(info.hint), json.dumps(value), texts.get(path, "") + smallest


def _texts() -> dict[str, str]:
    texts = described(RunConfig)
    for field in dataclasses.fields(RunConfig):
        kind = typing.get_type_hints(RunConfig)[field.name]
        if dataclasses.is_dataclass(kind):
            texts.update({f"{field.name}.{name}": text for name, text in described(typing.cast(type, kind)).items()})
    texts.update({f"watch.{name}": text for name, text in described(Limits).items()})
    texts.update({f"slurm.{name.replace('-', '_')}": _sentence(text) for name, text in list_job_options().items()})
    texts.update({f"trainer.{name}": text for name, text in _lightning_texts().items()})
    return texts


def described(kind: type) -> dict[str, str]:
    """Attribute to its meaning, from the section `Attributes` of a docstring."""
    _, _, section = (inspect.getdoc(kind) or "").partition("Attributes:\n")
    return {name.strip(): _sentence(text) for names, text in _entries(section) for name in names.split(",")}


def _lightning_texts() -> dict[str, str]:
    """The first sentence of Lightning's own documentation of each Trainer argument."""
    from lightning.pytorch import Trainer

    _, _, section = (inspect.getdoc(Trainer.__init__) or "").partition("Args:\n")
    found: dict[str, str] = {}
    for name, text in _entries(section):
        plain = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text.replace("``", "`"))
        found[name] = _sentence(re.split(r"(?<=\.) (?=[A-Z])", plain.partition(" Default:")[0])[0])
    return found


def _entries(section: str) -> Iterator[tuple[str, str]]:
    """Name and text of each entry of a docstring's section; the section ends where the indentation does."""
    own = itertools.takewhile(lambda line: not line.strip() or line.startswith(" "), section.splitlines())
    name, text = "", ""
    for line in textwrap.dedent("\n".join(own)).splitlines():
        found = _ENTRY.match(line)
        if found:
            if name:
                yield name, text
            name, text = found[1], found[2]
        elif line.strip():
            text += f" {line.strip()}"
    if name:
        yield name, text


def _sentence(text: str) -> str:
    text = text.strip().rstrip(".;")
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _type_text(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(code(json.dumps(value)) for value in typing.get_args(hint))
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return " or ".join(map(_type_text, typing.get_args(hint)))
    if hint is type(None):
        return code("null")
    origin = typing.get_origin(hint)
    if origin is not None and issubclass(origin, Mapping):
        return "mapping"
    if origin is list:
        return f"list of {_type_text(typing.get_args(hint)[0])}"
    return {"str": "text", "int": "integer", "float": "number", "bool": "true or false"}.get(
        hint.__name__, hint.__name__
    )


def _group_text(group: str) -> str:
    kind = typing.get_type_hints(RunConfig)[group]
    text, _, _ = (inspect.getdoc(kind) or "").partition("\n\nAttributes:")
    return text
