"""`WizardConfig`: the answers of the set-up wizard, a frozen record that is read from and written to a config file."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from launcher.config.comments import commented_yaml
from launcher.config.loading import all_problems, load_values, normalize_values, read_sources
from launcher.config.presets import preset_values
from launcher.config.schema import RunConfig, config_fields
from launcher.core.atomic_write import write_file
from launcher.core.errors import ConfigError, Problem
from launcher.core.nested import flatten
from launcher.wizard.notes import find_notes, find_split_problems

if TYPE_CHECKING:
    from launcher.hardware.devices import Hardware

# Name of an answer to its key in the config.
_PATHS = {
    "model": "model.class_path",
    "model_args": "model.init_args",
    "data": "data.class_path",
    "data_args": "data.init_args",
    "global_batch_size": "global_batch_size",
    "max_epochs": "trainer.max_epochs",
    "max_steps": "trainer.max_steps",
    "accelerator": "accelerator",
    "devices": "devices",
    "num_nodes": "num_nodes",
    "strategy": "strategy",
    "precision": "precision",
    "use_mixed_precision": "use_amp",
    "wandb_mode": "wandb.mode",
    "wandb_project": "wandb.project",
    "name": "name",
    "partition": "slurm.partition",
}
_FIRST_LINE = "# Written by `launcher init`."
# A truncated YAML file is often valid YAML; the last line shows that it is complete.
_LAST_LINE = "# End of the config."


class ValidationResult(NamedTuple):
    """Errors and warnings about the answers."""

    errors: tuple[Problem, ...]
    warnings: tuple[Problem, ...]

    @property
    def valid(self) -> bool:
        """Whether `fit` accepts the config; it may have warnings."""
        return not self.errors


@dataclass(frozen=True)
class WizardConfig:
    """The answers of the set-up wizard; None if a question was not answered.

    Attributes:
        model: import path of the LightningModule; None for the built-in demo.
        data: import path of the LightningDataModule.
        model_args, data_args: arguments of their constructors.
        global_batch_size: samples per optimizer step.
        max_steps: optimizer steps at most; -1 for no limit.
        accelerator: 'auto', 'cpu', 'gpu', 'cuda' or 'mps'.
        devices: ranks on each node, or 'auto'.
        num_nodes: number of nodes, or 'auto'.
        strategy: 'auto' or a strategy's name.
        precision: 'auto' or any spelling of a precision.
        use_mixed_precision: True requests it, False disables it.
        wandb_mode: 'auto', 'online', 'offline' or 'disabled'.
        partition: SLURM partition, for `launcher submit`.
        settings: all other settings by dotted path; the wizard does not change them.
        preset: the preset that filled in unanswered questions.
        preset_filled: names of the answers and settings that come from the preset.
    """

    model: str | None = None
    model_args: Mapping[str, Any] | None = None
    data: str | None = None
    data_args: Mapping[str, Any] | None = None
    global_batch_size: int | None = None
    max_epochs: int | None = None
    max_steps: int | None = None
    accelerator: str | None = None
    devices: int | str | None = None
    num_nodes: int | str | None = None
    strategy: str | None = None
    precision: str | int | None = None
    use_mixed_precision: bool | None = None
    wandb_mode: str | None = None
    wandb_project: str | None = None
    name: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    partition: str | None = field(default=None, kw_only=True)
    preset: str | None = field(default=None, compare=False, kw_only=True)
    preset_filled: frozenset[str] = field(default=frozenset(), compare=False, kw_only=True)

    def with_answers(self, **answers: Any) -> WizardConfig:
        """A copy with other answers, which no preset overrides."""
        given = {name for name, value in answers.items() if value is not None}
        dropped = dict.fromkeys(_overridden(given) & self.preset_filled)
        filled = self.preset_filled.difference(answers, dropped)
        return dataclasses.replace(self, **(dropped | answers), preset_filled=filled)

    def with_preset(self, name: str) -> WizardConfig:
        """A copy with another preset, which fills in unanswered questions and replaces an earlier preset.

        Raises:
            ConfigError: there is no such preset.
        """
        given, preset = self.without_preset(), WizardConfig._of_normal(preset_values(name))
        answered = {key for key in _PATHS if getattr(given, key) is not None}
        filled = {key for key in _PATHS if getattr(preset, key) is not None} - answered - _overridden(answered)
        return dataclasses.replace(
            given,
            **{key: getattr(preset, key) for key in filled},
            settings={**preset.settings, **given.settings},
            preset=name,
            preset_filled=frozenset(filled | (preset.settings.keys() - given.settings.keys())),
        )

    def without_preset(self) -> WizardConfig:
        """A copy with only the answers of the user."""
        answers = {key: None for key in _PATHS if key in self.preset_filled}
        settings = {path: value for path, value in self.settings.items() if path not in self.preset_filled}
        return dataclasses.replace(self, **answers, settings=settings, preset=None, preset_filled=frozenset())

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> WizardConfig:
        """From the plain values of a config; all of them count as answers of the user.

        Raises:
            ConfigError: lists every unknown key, wrong type and value out of range.
        """
        normal, problems = normalize_values(copy.deepcopy(dict(values)))
        problems += all_problems(normal)
        if problems:
            raise ConfigError(problems)
        return cls._of_normal(normal)

    @classmethod
    def _of_normal(cls, values: Mapping[str, Any]) -> WizardConfig:
        """From normalized, valid values."""
        flat = _flatten(values)
        answers = {name: flat.pop(path, None) for name, path in _PATHS.items()}
        return cls(**answers, settings=flat)

    def values(self) -> dict[str, Any]:
        """The config as nested plain values, without unanswered questions."""
        answers = {path: getattr(self, name) for name, path in _PATHS.items() if getattr(self, name) is not None}
        nested: dict[str, Any] = {}
        settings = {path: value for path, value in _flatten(self.settings).items() if path not in answers}
        for path, value in (answers | settings).items():
            *groups, last = path.split(".")
            place = nested
            for group in groups:
                place = place.setdefault(group, {})
            place[last] = copy.deepcopy(value)
        return nested

    def validate(self, hardware: Hardware | None = None) -> ValidationResult:
        """Check the answers, without importing the user's classes.

        Args:
            hardware: of the run; if not given, that of this machine, where an answer depends on it.

        Returns:
            Errors contain the answer, the given value and what is valid. Requests that this hardware cannot meet are
            warnings: a config may be written on a laptop for a cluster.
        """
        errors = tuple(self.errors())
        return ValidationResult(errors, () if errors else find_notes(vars(self), hardware))

    @staticmethod
    def find_key(name: str) -> str:
        """The key in the config file of an answer; other names are keys already."""
        return _PATHS.get(name, name)

    def errors(self) -> list[Problem]:
        """Problems of the answers, each with the name of its answer."""
        names = {path: name for name, path in _PATHS.items()}
        problems = [Problem(names.get(p.path, p.path), p.message) for p in all_problems(self.values())]
        return problems or find_split_problems(vars(self))

    def to_run_config(self) -> RunConfig:
        """The config as `launcher fit --config` reads it, with the demo if no model is set.

        Raises:
            ConfigError: lists every problem.
        """
        return load_values(self.values())

    def to_yaml(self, comments: tuple[str, ...] = ()) -> str:
        """The text of a commented config file for `--config`; `comments` are further lines at its top."""
        preset = (f"Preset: {self.preset}.",) if self.preset else ()
        header = (_FIRST_LINE.removeprefix("# "), *preset, *comments)
        return commented_yaml(self.values(), header, (_LAST_LINE.removeprefix("# "),))

    def save(self, path: str | Path, comments: tuple[str, ...] = ()) -> None:
        """Write a config file atomically: JSON if the name ends with .json, commented YAML otherwise.

        Raises:
            ConfigError: the answers have errors, or the file cannot be written; an existing file is unchanged.
        """
        path = Path(path)
        errors = all_problems(self.values()) or find_split_problems(vars(self))
        if errors:
            raise ConfigError(errors)
        # A file without settings would be an error.
        values = self.values() or {"model": None}
        text = json.dumps(values, indent=1) + "\n" if path.suffix == ".json" else self.to_yaml(comments)
        try:
            # Replaces the target of a link, not the link.
            write_file(path.resolve(), text)
        except OSError as error:
            message = f"cannot be written: {error.strerror or error}; give another path"
            raise ConfigError([Problem(str(path), message)]) from error

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> WizardConfig:
        """Read any config file; `overrides` are arguments of the command line.

        Raises:
            ConfigError: the file is missing, truncated, or has unknown keys or invalid values.
        """
        path = Path(path)
        lines = _count_lines_if_truncated(path)
        if lines is not None:
            message = f"the file is truncated here: its last line, {_LAST_LINE!r}, is missing"
            raise ConfigError([Problem(f"{path}, line {lines}", message)])
        return cls.from_values(read_sources([path], overrides))


def _count_lines_if_truncated(path: Path) -> int | None:
    """The number of lines of a truncated YAML file that `save` wrote; None if it is complete."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None  # reading the file reports the error
    lines = text.splitlines()
    is_own = not text.strip() or lines[0] == _FIRST_LINE or (len(lines) == 1 and _FIRST_LINE.startswith(lines[0]))
    return max(len(lines), 1) if is_own and path.suffix != ".json" and _LAST_LINE not in lines else None


def _overridden(given: set[str]) -> set[str]:
    """Answers of a preset on precision that any given answer on precision overrides."""
    both = {"precision", "use_mixed_precision"}
    return both - given if both & given else set()


def _flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted path to value; an argument of a class that is a mapping stays one."""
    groups = {path.rpartition(".")[0] for path, _ in config_fields()} | {"model", "data"}
    flat = flatten(values, groups.__contains__)
    return {path: value for path, value in flat.items() if not (path in groups and (value is None or value == {}))}
