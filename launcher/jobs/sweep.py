"""A sweep: one run for each set of settings of a grid or a list. Pure, except that it reads the list's file."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launcher.config.command_line import is_text, path_of
from launcher.config.config_file import read_plain_file
from launcher.config.loading import build_config, normalize_values
from launcher.config.merge import merge_values, set_path
from launcher.config.schema import RunConfig, config_fields
from launcher.config.validation import find_problems
from launcher.core.errors import ConfigError, Problem, SubmitError
from launcher.core.nested import flatten
from launcher.core.secrets import redact
from launcher.core.yaml_loader import Loader

Overrides = Mapping[str, Any]
# Settings that all members of a sweep share, with the reason.
_SHARED = {
    "name": "the members are named after the sweep: --name NAME gives NAME-0, NAME-1, ...",
    "runs_dir": "all members are in one folder of runs",
    "devices": "all members of a job array have the same number of ranks",
    "num_nodes": "all members of a job array have the same number of nodes",
    "accelerator": "all members of a job array use the same kind of device",
    "slurm": "all members of a job array have the same request",
}
_FLAG = "--sweep"
_GROUPS = {path.rpartition(".")[0] for path, _ in config_fields()} | {
    f"{key}{inner}" for key in ("model", "data") for inner in ("", ".init_args")
}


@dataclass(frozen=True)
class Member:
    """One run of a sweep: its index in the job array, its config, and the settings in which the members differ."""

    index: int
    config: RunConfig
    overrides: Overrides

    @property
    def name(self) -> str:
        """Name of the run."""
        return str(self.config.name)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, without the config, which is in the member's run directory."""
        return {"index": self.index, "name": self.name, "overrides": redact(dict(self.overrides))}


def read_sweep(texts: Sequence[str], given: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The sets of settings of `--sweep`, in the order of the members.

    Args:
        texts: each `KEY=VALUE,VALUE,...`, or the path of a YAML or JSON file with a list of mappings. Several form a
            grid; the last one changes fastest.
        given: dotted paths that the command line sets for all members.

    Raises:
        SubmitError: lists every unknown or repeated key, and every repeated set.
    """
    problems: list[Problem] = []
    axes: list[list[dict[str, Any]]] = []
    for text in texts:
        try:
            axes.append(_grid_axis(text) if "=" in text else _file_axis(Path(text)))
        except ConfigError as error:
            problems += error.problems
    problems += _repeated(axes, given)
    for path, value in dict.fromkeys(
        (p, json.dumps(v, default=str)) for axis in axes for s in axis for p, v in s.items()
    ):
        problems += _field_problems(path, json.loads(value))
    sets = [{path: value for part in parts for path, value in part.items()} for parts in itertools.product(*axes)]
    keys = [json.dumps(each, sort_keys=True, default=str) for each in sets]
    repeated = [describe(each) for number, each in enumerate(sets) if keys[number] in keys[:number]]
    problems += [
        Problem(_FLAG, f"two members are equal; remove one: {text or 'nothing is set'}")
        for text in dict.fromkeys(repeated)
    ]
    if problems:
        raise SubmitError(dict.fromkeys(problems))
    return sets


def make_members(base: Mapping[str, Any], sets: Sequence[Overrides], name: str) -> list[Member]:
    """The members of the sweep `name`, which is also their W&B group unless the config sets another.

    `base` are normalized plain values that all members share; `sets` are those of `read_sweep`.

    Raises:
        ConfigError: lists every problem of every member; a problem of all members is listed once.
    """
    members: list[Member] = []
    wrong: dict[Problem, list[int]] = {}
    for index, overrides in enumerate(sets):
        values = copy.deepcopy(dict(base))
        merge_values(values, nest(overrides))
        try:
            config = build_config({**values, "name": f"{name}-{index}"})
        except ConfigError as error:
            for problem in error.problems:
                wrong.setdefault(problem, []).append(index)
            continue
        wandb = dataclasses.replace(config.wandb, group=config.wandb.group or name)
        members.append(Member(index, dataclasses.replace(config, wandb=wandb), overrides))
    if wrong:
        raise ConfigError(
            problem if len(those) == len(sets) else Problem(f"member {those[0]}: {problem.path}", problem.message)
            for problem, those in wrong.items()
        )
    return members


def describe(overrides: Overrides) -> str:
    """A member's settings in one line, with the shortest unambiguous ends of their paths."""
    ends = {path: _short(path, overrides) for path in overrides}
    return ", ".join(f"{ends[path]}={_to_text(value)}" for path, value in redact(overrides).items())


def nest(overrides: Overrides) -> dict[str, Any]:
    """Dotted paths as nested values."""
    values: dict[str, Any] = {}
    for path, value in overrides.items():
        set_path(values, path.split("."), copy.deepcopy(value))
    return values


def _grid_axis(given: str) -> list[dict[str, Any]]:
    """The sets of `KEY=VALUE,VALUE`: one setting each."""
    key, _, text = given.partition("=")
    key = path_of(key.strip().removeprefix("--"))
    try:
        node = yaml.compose(f"[{text}]", Loader)
    except yaml.YAMLError as error:
        reason = getattr(error, "problem", None) or str(error)
        raise _error(
            given, f"its values are not a YAML list ({reason}); quote values with commas or brackets"
        ) from error
    values = node.value if isinstance(node, yaml.SequenceNode) else []
    if len(values) == 1 and isinstance(values[0], yaml.SequenceNode):
        values = values[0].value
    if not key or not values:
        raise _error(given, "expected KEY=VALUE,VALUE,... or the path of a file with a list of settings")
    hint = {path: info.hint for path, info in config_fields()}.get(key, object)
    return [_expanded({key: _value(node, text=is_text(hint))}, given) for node in values]


def _value(node: yaml.Node, *, text: bool) -> Any:
    if text and isinstance(node, yaml.ScalarNode) and node.value != "null":
        return node.value
    loader = Loader("")
    try:
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _file_axis(path: Path) -> list[dict[str, Any]]:
    """The sets of a file."""
    listed = read_plain_file(path)
    if not isinstance(listed, list) or not listed:
        raise _error(str(path), "expected a list of settings, as in `- {model.lr: 1e-3}` on each line")
    wrong = [
        f"entry {number} is {entry!r}"
        for number, entry in enumerate(listed)
        if not isinstance(entry, dict) or not entry
    ]
    if wrong:
        raise _error(str(path), f"expected a mapping of settings for each member, but {'; '.join(wrong)}")
    return [_expanded({path_of(str(key)): value for key, value in entry.items()}, f"{path}, entry {number}")
            for number, entry in enumerate(listed)]  # fmt: skip


def _expanded(settings: Overrides, where: str) -> dict[str, Any]:
    """The same settings under the launcher's own keys, as deep as the config defines them."""
    values, problems = normalize_values(nest(settings))
    if problems:
        raise SubmitError(Problem(f"{_FLAG} {where}: {p.path}", p.message) for p in problems)
    flat = flatten(values, _GROUPS.__contains__)
    return {path: value for path, value in flat.items() if not (path in _GROUPS and value == {})}


def _repeated(axes: Sequence[Sequence[Overrides]], given: Sequence[str]) -> Iterator[Problem]:
    """Problems of keys that two axes, or an axis and the command line, set."""
    seen: set[str] = set()
    for axis in axes:
        paths = {path for overrides in axis for path in overrides}
        yield from (
            Problem(f"{_FLAG} {path}", "given twice; give all its values at once") for path in sorted(paths & seen)
        )
        yield from (Problem(f"{_FLAG} {path}", f"--{path} is given for all members too; leave out one of them")
                    for path in sorted(paths & set(given)))  # fmt: skip
        seen |= paths


def _field_problems(path: str, value: Any) -> Iterator[Problem]:
    for shared, reason in _SHARED.items():
        if path == shared or path.startswith(f"{shared}."):
            yield Problem(f"{_FLAG} {path}", f"cannot differ: {reason}")
            return
    yield from (Problem(f"{_FLAG} {problem.path}", problem.message) for problem in find_problems(nest({path: value})))


def _error(given: str, message: str) -> SubmitError:
    return SubmitError([Problem(f"{_FLAG} {given}", message)])


def _short(path: str, among: Overrides) -> str:
    keys = path.split(".")
    ends = (".".join(keys[-count:]) for count in range(1, len(keys) + 1))
    return next(end for end in ends if sum(f".{other}".endswith(f".{end}") for other in among) == 1)


def _to_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
