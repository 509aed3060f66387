"""`WizardConfig`: the answers of the set-up wizard, as a frozen record that is read from and written as a config."""

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

if TYPE_CHECKING:
    from launcher.hardware.devices import Hardware

# Answers, and where they stand in the config.
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
# Most cuts of a YAML file leave valid YAML: only a last line shows that it is whole.
_LAST_LINE = "# End of the config."


class ValidationResult(NamedTuple):
    """What is wrong with the answers, and what the user should know of them."""

    errors: tuple[Problem, ...]
    warnings: tuple[Problem, ...]

    @property
    def valid(self) -> bool:
        """Whether `fit` takes the config; warnings don't count."""
        return not self.errors


@dataclass(frozen=True)
class WizardConfig:
    """The answers of the set-up wizard; None is a question that was not answered.

    Attributes:
        model: import path of the LightningModule; None trains the built-in demo.
        model_args: arguments of its constructor.
        data: import path of the LightningDataModule.
        data_args: arguments of its constructor.
        global_batch_size: samples per optimizer step.
        max_epochs: passes over the data.
        max_steps: optimizer steps at most; -1 for no limit.
        accelerator: 'auto', 'cpu', 'gpu', 'cuda' or 'mps'.
        devices: ranks on each node, or 'auto'.
        num_nodes: number of nodes, or 'auto'.
        strategy: 'auto' or a strategy's name.
        precision: 'auto' or any spelling of a precision.
        use_mixed_precision: True wishes for it, False turns it off.
        wandb_mode: 'auto', 'online', 'offline' or 'disabled'.
        wandb_project: name of the W&B project.
        name: the run's name.
        partition: SLURM's partition, for `launcher submit`.
        settings: everything else of the config, by dotted path; the wizard keeps it as it is.
        preset: the preset that filled in what was not answered.
        preset_filled: the names of the answers and settings that are that preset's.
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
        """The same with other answers; they stand whatever preset comes before or after."""
        given = {name for name, value in answers.items() if value is not None}
        dropped = dict.fromkeys(_outweighed(given) & self.preset_filled)
        filled = self.preset_filled.difference(answers, dropped)
        return dataclasses.replace(self, **(dropped | answers), preset_filled=filled)

    def with_preset(self, name: str) -> WizardConfig:
        """The same on another preset: it fills in what was not answered, and nothing of an earlier preset is left.

        Raises:
            ConfigError: there is no such preset.
        """
        preset = WizardConfig._of_normal(preset_values(name))
        return self.without_preset()._filled_from(preset, name)

    def without_preset(self) -> WizardConfig:
        """The user's own answers alone."""
        answers = {key: None for key in _PATHS if key in self.preset_filled}
        settings = {path: value for path, value in self.settings.items() if path not in self.preset_filled}
        return dataclasses.replace(self, **answers, settings=settings, preset=None, preset_filled=frozenset())

    def _filled_from(self, preset: WizardConfig, name: str) -> WizardConfig:
        filled = {key for key in _PATHS if getattr(self, key) is None and getattr(preset, key) is not None}
        filled -= _outweighed({key for key in _PATHS if getattr(self, key) is not None})
        return dataclasses.replace(
            self,
            **{key: getattr(preset, key) for key in filled},
            settings={**preset.settings, **self.settings},
            preset=name,
            preset_filled=frozenset(filled | (preset.settings.keys() - self.settings.keys())),
        )

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> WizardConfig:
        """From the plain values of a config, all of them as the user's own choice.

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
        """From normalized values that have no problem."""
        flat = _flatten(values)
        answers = {name: flat.pop(path, None) for name, path in _PATHS.items()}
        return cls(**answers, settings=flat)

    def values(self) -> dict[str, Any]:
        """The config as nested plain values, only what was answered or set."""
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
            hardware: what the run will have; this machine is looked at if it is not given and an answer asks for it.

        Returns:
            Errors name the answer, what was given and what is valid. Warnings are what this hardware makes of the
            wishes: a config may be written on a laptop for a cluster.
        """
        # Lazy: it imports this module.
        from launcher.wizard.notes import find_notes

        errors = tuple(self.errors())
        return ValidationResult(errors, () if errors else find_notes(self, hardware))

    def errors(self) -> list[Problem]:
        """What is wrong with the answers, each under the answer's name."""
        names = {path: name for name, path in _PATHS.items()}
        return [Problem(names.get(p.path, p.path), p.message) for p in all_problems(self.values())]

    def to_run_config(self) -> RunConfig:
        """As `launcher fit --config` would read it, the demo included where no model is set.

        Raises:
            ConfigError: lists every problem.
        """
        return load_values(self.values())

    def to_yaml(self, comments: tuple[str, ...] = ()) -> str:
        """A commented config file that `--config` takes.

        Args:
            comments: further lines at the top.
        """
        preset = (f"Preset: {self.preset}.",) if self.preset else ()
        header = (_FIRST_LINE.removeprefix("# "), *preset, *comments)
        return commented_yaml(self.values(), header, (_LAST_LINE.removeprefix("# "),))

    def save(self, path: str | Path, comments: tuple[str, ...] = ()) -> None:
        """Write a config file, whole or not at all: JSON if the name ends so, commented YAML otherwise.

        Raises:
            ConfigError: the answers have errors, or the file cannot be written; what was there stays.
        """
        path = Path(path)
        errors = all_problems(self.values())
        if errors:
            raise ConfigError(errors)
        text = json.dumps(self.values(), indent=1) + "\n" if path.suffix == ".json" else self.to_yaml(comments)
        try:
            # Through a link: it is the file behind it that is replaced.
            write_file(path.resolve(), text)
        except OSError as error:
            raise ConfigError(
                [Problem(str(path), f"cannot be written: {error.strerror or error}; give another path")]
            ) from error

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> WizardConfig:
        """Read any config file.

        Args:
            path: the file.
            overrides: command line words on top of it.

        Raises:
            ConfigError: no such file, a file that was cut off (with the line), unknown keys and wrong values.
        """
        path = Path(path)
        lines = _lines_if_cut_off(path)
        if lines is not None:
            message = f"the file is cut off here: its last line, {_LAST_LINE!r}, is missing"
            raise ConfigError([Problem(f"{path}, line {lines}", message)])
        return cls.from_values(read_sources([path], overrides))


def _lines_if_cut_off(path: Path) -> int | None:
    """How many lines are left of a YAML file that `save` wrote whole; None if nothing is missing."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None  # told by who reads it
    lines = text.splitlines()
    own = not text.strip() or lines[0] == _FIRST_LINE or (len(lines) == 1 and _FIRST_LINE.startswith(lines[0]))
    return max(len(lines), 1) if own and path.suffix != ".json" and _LAST_LINE not in lines else None


def _outweighed(given: set[str]) -> set[str]:
    """What a preset says on precision gives way to any answer on it."""
    both = {"precision", "use_mixed_precision"}
    return both - given if both & given else set()


def _flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted paths down to the depth that the config knows: an argument that is a mapping stays one."""
    groups = {path.rpartition(".")[0] for path, _ in config_fields()} | {"model", "data"}
    flat = flatten(values, groups.__contains__)
    return {path: value for path, value in flat.items() if not (path in groups and (value is None or value == {}))}
