"""The arguments of `TrainingCoordinator` as a config: the same keys and defaults, under the names of Python."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypedDict, TypeVar

from launcher.config.schema import CheckpointOptions, FsdpOptions, RunConfig, TrainerOptions, WandbOptions, WatchOptions
from launcher.config.validation import build_record, find_problems
from launcher.core.errors import CallError, Problem
from launcher.core.python_terms import ARGUMENT_NAMES, to_python_problem

Group = TypeVar("Group", CheckpointOptions, FsdpOptions, WandbOptions, WatchOptions)


class CoordinatorSettings(TypedDict, total=False):
    """Settings of `TrainingCoordinator` with the name, the meaning and the default of the config's key."""

    global_batch_size: int | None
    deepspeed_config: str | dict[str, Any] | None
    precision_fallback: bool
    memory_share: float
    on_oom: Literal["stop", "next"]
    ddp: dict[str, Any] | None
    fsdp: FsdpOptions | Mapping[str, Any]
    activation_checkpointing: bool | Literal["auto"]
    static_graph: bool | Literal["auto"]
    resume_trust: bool
    agreement_timeout: float
    process_group_timeout: float
    keep_last_step: bool | Literal["auto"]
    checkpoint: CheckpointOptions | Mapping[str, Any]
    watch: WatchOptions | Mapping[str, Any]


# The key of each argument with another name.
_KEYS = {name: key for key, name in ARGUMENT_NAMES.items()}
_GROUPS: Mapping[str, type[Any]] = {"checkpoint": CheckpointOptions, "fsdp": FsdpOptions, "wandb": WandbOptions,
                                     "watch": WatchOptions}  # fmt: skip
# Lightning's classes, and the name to give instead of an object.
_STRATEGY_CLASSES = {"DDPStrategy": "ddp", "FSDPStrategy": "fsdp2", "ModelParallelStrategy": "fsdp2",
                     "DeepSpeedStrategy": "deepspeed_stage_2", "SingleDeviceStrategy": "single_device"}  # fmt: skip
_FLAGS = ("use_gpu", "notebook_processes")
# The arguments of the constructor that are values, not objects of Lightning's classes or further settings.
CONSTRUCTOR_VALUES = ("output_dir", "strategy", "precision", "gradient_clip_val", "devices", "num_nodes", "wandb",
                      "on_precision_change", *_FLAGS)  # fmt: skip
# Keys that are no argument, and what to do instead.
NO_ARGUMENT = {
    "model": "give the object to train",
    "data": "give the object to train",
    "optimizer": "create it in the model's configure_optimizers",
    "lr_scheduler": "create it in the model's configure_optimizers",
    "trainer": "give Lightning's options to train, each as an argument",
    "slurm": "only `launcher submit` uses it; in a batch script, start the script with srun",
}
# Arguments of Lightning's Trainer that hold objects: what to do with another kind of value.
_OBJECTS = {
    "callbacks": "give Lightning's callbacks, as objects",
    "logger": "give Lightning's loggers, as objects",
    "plugins": "give plugins to TrainingCoordinator, as objects",
}
_OF_CONSTRUCTOR = ("devices", "num_nodes", "precision", "strategy", "output_dir", "loggers", "wandb",
                   "on_precision_change", *CoordinatorSettings.__annotations__)  # fmt: skip
# Arguments of a Trainer, of its `fit` or of the config that `train` does not accept: what to do instead.
_ELSEWHERE = {
    **NO_ARGUMENT,
    **{name: f"give it to TrainingCoordinator, as {name}" for name in _OF_CONSTRUCTOR},
    "runs_dir": "give output_dir to TrainingCoordinator",
    "accelerator": "give use_gpu to TrainingCoordinator: False trains on the CPU",
    "default_root_dir": "give output_dir to TrainingCoordinator: each training has a folder there",
    "ckpt_path": "give it as resume_from_checkpoint",
    "resume": "give it as resume_from_checkpoint",
}
_OF_TRAIN = ("name", "seed", "use_amp", "resume_from_checkpoint", *(f.name for f in dataclasses.fields(TrainerOptions)))


def find_unknown_settings(settings: Mapping[str, Any]) -> list[Problem]:
    """Each further argument of `TrainingCoordinator` that does not exist, with what to do."""
    found: list[Problem] = []
    for name in (name for name in settings if name not in CoordinatorSettings.__annotations__):
        if name in NO_ARGUMENT:
            text = NO_ARGUMENT[name]
        elif name in _OF_TRAIN:
            text = f"give it to train, as {name}"
        else:
            text = _ELSEWHERE.get(name) or to_python_problem(find_problems({name: None})[0]).message
        found.append(Problem(name, text))
    return found


def find_wrong_values(arguments: Mapping[str, Any]) -> list[Problem]:
    """The problems of the values of `TrainingCoordinator`'s arguments, which have the names of Python."""
    defaults = RunConfig().to_dict()
    problems: list[Problem] = []
    values: dict[str, Any] = {}
    for name, value in arguments.items():
        key, group = _KEYS.get(name, name), _GROUPS.get(name)
        if name in _FLAGS:
            if not isinstance(value, bool):
                problems.append(Problem(name, f"given {value!r}; expected True or False"))
        elif name == "strategy" and type(value).__name__ in _STRATEGY_CLASSES:
            given, meant = type(value).__name__, _STRATEGY_CLASSES[type(value).__name__]
            text = f"given a {given}, which the launcher creates itself; give its name, {meant!r}"
            problems.append(Problem(name, text))
        elif group is not None and isinstance(value, group):
            values[key] = dataclasses.asdict(value)
        elif isinstance(value, os.PathLike):
            values[key] = os.fspath(value)
        elif group is not None and value is not None and not isinstance(value, Mapping):
            problems.append(Problem(name, f"given {value!r}; expected {group.__name__}(...) or a dict"))
        elif group is not None and not all(isinstance(each, str) for each in value or ()):
            problems.append(Problem(name, f"given {value!r}; the keys of the dict must be the names of settings"))
        elif key == "gradient_clip_val":
            values["trainer"] = {key: value}
        elif group is not None or type(value) is not type(defaults[key]) or value != defaults[key]:
            # Defaults need no check, and the check of every field takes time.
            values[key] = value
    return problems + [to_python_problem(problem) for problem in find_problems(values)]


def to_group(kind: type[Group], given: Group | Mapping[str, Any] | None) -> Group:
    """A group of settings from a record or a mapping of its settings."""
    return given if isinstance(given, kind) else kind(**dict(given or {}))


def to_tuple(given: Any) -> tuple[Any, ...]:
    """As a tuple: Lightning also accepts one object in place of a list."""
    if given is None:
        return ()
    return tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else (given,)


def with_trainer_options(config: RunConfig, trainer: Mapping[str, Any]) -> RunConfig:
    """The config with these options of Lightning's Trainer.

    Raises:
        CallError: lists every argument that is not valid.
    """
    trainer = dict(trainer)
    if trainer.get("logger", False) is None:
        trainer.pop("logger")  # None is the default in a config file
    elif trainer.get("logger") is False:
        trainer["logger"] = []
        config = dataclasses.replace(config, wandb=dataclasses.replace(config.wandb, mode="disabled"))
    objects = [name for name in _OBJECTS if trainer.get(name) and trainer[name] is not True]
    elsewhere = [name for name in _ELSEWHERE if name in trainer]
    plain = {name: value for name, value in trainer.items() if name not in (*objects, *elsewhere)}
    # Defaults need no check, and the check of every field takes time.
    defaults = RunConfig().to_dict()
    given = {name: value for name, value in config.to_dict().items() if value != defaults[name]}
    values = {**given, "trainer": plain}
    problems = [to_python_problem(problem) for problem in find_problems(values)]
    problems += [Problem(name, _OBJECTS[name]) for name in objects]
    problems += [Problem(name, _ELSEWHERE[name]) for name in elsewhere]
    if problems:
        raise CallError(problems)
    # As in a file, a quoted number is a number.
    return build_record(RunConfig, values)
