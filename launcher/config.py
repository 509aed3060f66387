"""`RunConfig`: what the user asked for, as a frozen record, and the check of every field at once."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from launcher.errors import ConfigError, Problem
from strategies import precision as precision_names
from strategies.choice import NAMES as STRATEGY_NAMES


def _at_least(minimum: float, default: Any) -> Any:
    """A field whose number, where one is given, is at least `minimum`."""
    return field(default=default, metadata={"minimum": minimum})


@dataclass(frozen=True)
class TrainerOptions:
    """Lightning's Trainer arguments, with Lightning's names, meanings and defaults.

    What the launcher decides itself (accelerator, strategy, devices, num_nodes, precision) stands at the top level;
    LightningCLI's place for it under `trainer` is read too.
    """

    max_epochs: int | None = _at_least(-1, None)
    min_epochs: int | None = _at_least(0, None)
    max_steps: int = _at_least(-1, -1)
    min_steps: int | None = _at_least(0, None)
    max_time: str | dict[str, int] | None = None
    fast_dev_run: int | bool = _at_least(0, False)
    limit_train_batches: int | float | None = _at_least(0, None)
    limit_val_batches: int | float | None = _at_least(0, None)
    limit_test_batches: int | float | None = _at_least(0, None)
    limit_predict_batches: int | float | None = _at_least(0, None)
    overfit_batches: int | float = _at_least(0, 0.0)
    val_check_interval: int | float | str | None = _at_least(0, None)
    check_val_every_n_epoch: int | None = _at_least(1, 1)
    num_sanity_val_steps: int | None = _at_least(-1, None)
    log_every_n_steps: int | None = _at_least(0, None)
    enable_checkpointing: bool | None = None
    enable_progress_bar: bool | None = None
    enable_model_summary: bool | None = None
    accumulate_grad_batches: int = _at_least(1, 1)
    gradient_clip_val: int | float | None = _at_least(0, None)
    gradient_clip_algorithm: Literal["norm", "value"] | None = None
    deterministic: bool | Literal["warn"] | None = None
    benchmark: bool | None = None
    inference_mode: bool = True
    use_distributed_sampler: bool = True
    profiler: str | None = None
    detect_anomaly: bool = False
    barebones: bool = False
    sync_batchnorm: bool = False
    reload_dataloaders_every_n_epochs: int = _at_least(0, 0)
    enable_autolog_hparams: bool = True
    callbacks: list[dict[str, Any]] | dict[str, Any] | None = None
    logger: list[dict[str, Any]] | dict[str, Any] | None = None


@dataclass(frozen=True)
class CheckpointOptions:
    """When checkpoints are written. The last one always is: it is what a run resumes from."""

    every_n_epochs: int | None = _at_least(1, None)
    every_n_steps: int | None = _at_least(1, None)
    save_top_k: int = _at_least(-1, 1)
    monitor: str | None = None
    mode: Literal["min", "max"] = "min"


@dataclass(frozen=True)
class WandbOptions:
    """Where Weights & Biases gets the metrics. `auto`: online if a key is at hand, offline otherwise."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str = "launcher"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    init_timeout: float = _at_least(1, 20.0)


@dataclass(frozen=True)
class RunConfig:
    """One run. `model` and `data` are `class_path` and `init_args`, as LightningCLI users know them.

    Attributes:
        name: the run's name and its directory under `runs_dir`; made from the date and the config if not given.
        runs_dir: folder of all runs.
        seed: seed of every random generator and of the order of the data.
        accelerator: kind of device; `auto` takes a GPU where there is one.
        devices: ranks on each node; `auto` takes all GPUs, or one process on a CPU.
        num_nodes: number of nodes; `auto` takes what torchrun or SLURM say.
        strategy: `auto`, `single_device`, `ddp`, `ddp_find_unused_parameters_true`.
        precision: `auto`, or any spelling of a precision, which is an order that every rank must be able to meet.
        precision_fallback: turn that order into the best precision that all ranks share.
        use_amp: true wishes for mixed precision, false turns it off.
        global_batch_size: samples per optimizer step, whatever the number of ranks.
        static_graph: whether DDP may take the first step's graph for all; `auto` asks the model's `static_graph`.
        resume: `none`, `auto` (this run's last checkpoint, if it has one) or the path of a checkpoint.
        agreement_timeout: seconds that the ranks wait for each other at the start.
        process_group_timeout: seconds after which a collective that waits for a rank fails.
        trainer: Lightning's Trainer arguments.
        checkpoint: when checkpoints are written.
        wandb: Weights & Biases.
        model: the LightningModule.
        data: the LightningDataModule; not needed if the model has loaders of its own.
    """

    name: str | None = None
    runs_dir: str = "runs"
    seed: int = _at_least(0, 42)
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "auto"
    devices: int | Literal["auto"] = _at_least(1, "auto")
    num_nodes: int | Literal["auto"] = _at_least(1, "auto")
    strategy: str = "auto"
    precision: str | int = "auto"
    precision_fallback: bool = False
    use_amp: bool | None = None
    global_batch_size: int | None = _at_least(1, None)
    static_graph: bool | Literal["auto"] = "auto"
    resume: str = "none"
    agreement_timeout: float = _at_least(1, 300.0)
    process_group_timeout: float = _at_least(1, 1800.0)
    trainer: TrainerOptions = field(default_factory=TrainerOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    wandb: WandbOptions = field(default_factory=WandbOptions)
    model: dict[str, Any] | None = None
    data: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain YAML values; `parse_config` takes it back."""
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        """As a config file that `--config` takes."""
        plain = json.loads(json.dumps(self.to_dict(), default=str))
        return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)

    def digest(self) -> str:
        """SHA-256 over every field, as hexadecimal digits: equal on two ranks exactly if their configs are."""
        return hashlib.sha256(repr(_sorted(self.to_dict())).encode()).hexdigest()


def _sorted(value: Any) -> Any:
    """The same for equal values, whatever the order of their keys; lists and tuples are alike, as in YAML."""
    if isinstance(value, Mapping):
        return sorted(((repr(k), _sorted(v)) for k, v in value.items()), key=lambda pair: pair[0])
    return (
        [_sorted(v) for v in value] if isinstance(value, list | tuple) else str(value) if value is not None else value
    )


@dataclass(frozen=True, slots=True)
class FieldInfo:
    """What a config file may say at one dotted path."""

    hint: Any
    minimum: float | None


def config_fields(record: type = RunConfig, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every leaf of the config: its dotted path, type and smallest number."""
    hints = typing.get_type_hints(record)
    for entry in dataclasses.fields(record):
        hint = hints[entry.name]
        if dataclasses.is_dataclass(hint):
            yield from config_fields(typing.cast(type, hint), f"{prefix}{entry.name}.")
        else:
            yield prefix + entry.name, FieldInfo(hint, entry.metadata.get("minimum"))


def parse_config(values: Mapping[str, Any]) -> RunConfig:
    """Make a `RunConfig` of plain values.

    Raises:
        ConfigError: lists every unknown key, wrong type and number out of range.
    """
    problems = find_problems(values)
    if problems:
        raise ConfigError(problems)
    return _build(_parser(), values)


def find_problems(values: Mapping[str, Any]) -> list[Problem]:
    """Every problem of the plain values of a config, in their order; empty if `parse_config` takes them."""
    leaves = dict(config_fields())
    parser = _parser()
    problems: list[Problem] = []
    for path, value in _leaves(values, leaves):
        info = leaves.get(path)
        if info is None:
            problems.append(Problem(path, _unknown_key(path, value, leaves)))
        elif (value is None and not _takes_null(info.hint)) or not _has_type(parser, path, value):
            problems.append(Problem(path, f"given {value!r}; expected {_describe(info.hint)}"))
        elif info.minimum is not None and not _in_range(value, info.minimum):
            finite = not isinstance(value, float) or math.isfinite(value)
            wanted = f"at least {info.minimum:g}" if finite else "a finite number"
            problems.append(Problem(path, f"given {value!r}; expected {wanted}"))
        elif path in _MEANING:
            problems += [Problem(path, message) for message in _MEANING[path](value)]
    return problems


def _name_problems(name: Any) -> Iterator[str]:
    """A name is a folder's, and goes into W&B and job names."""
    if name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        yield f"given {name!r}; expected up to 100 letters, digits, '.', '_' or '-', beginning with a letter or digit"


def _precision_problems(precision: Any) -> Iterator[str]:
    try:
        if precision != precision_names.AUTO:
            precision_names.normalize_precision(precision)
    except precision_names.PrecisionError as error:
        yield f"{error}; or auto"


def _strategy_problems(strategy: Any) -> Iterator[str]:
    if strategy not in STRATEGY_NAMES:
        yield f"given {strategy!r}; expected one of {', '.join(STRATEGY_NAMES)}"


# Fields whose type alone does not say what is valid.
_MEANING: dict[str, Callable[[Any], Iterator[str]]] = {
    "name": _name_problems,
    "precision": _precision_problems,
    "strategy": _strategy_problems,
}


def _leaves(values: Mapping[str, Any], known: Mapping[str, FieldInfo], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted paths and values, down to the depth that the config knows."""
    for key, value in values.items():
        path = f"{prefix}{key}"
        is_group = any(name.startswith(f"{path}.") for name in known)
        if is_group and isinstance(value, Mapping):
            yield from _leaves(value, known, f"{path}.")
        elif not (is_group and value is None):
            yield path, value


def _unknown_key(path: str, value: Any, leaves: Mapping[str, FieldInfo]) -> str:
    if any(name.startswith(f"{path}.") for name in leaves):
        return f"given {value!r}; expected a mapping of settings"
    name = path.rpartition(".")[2]
    by_name: dict[str, list[str]] = {}
    for known in leaves:
        by_name.setdefault(known.rpartition(".")[2], []).append(known)
    # A key at the wrong level is as common as a misspelt one, and so is a misspelt group.
    groups = {known.partition(".")[0] for known in leaves if "." in known}
    close = by_name.get(name, []) + difflib.get_close_matches(path, {*leaves, *groups}, n=1, cutoff=0.75)
    close += [p for n in difflib.get_close_matches(name, by_name, n=1, cutoff=0.75) for p in by_name[n]]
    hint = f"did you mean {close[0]}?" if close else "`launcher fit --help` lists all keys"
    return f"unknown key; {hint}"


def _parser() -> Any:
    import jsonargparse

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(RunConfig, None)
    return parser


def _has_type(parser: Any, path: str, value: Any) -> bool:
    import jsonargparse

    nested: Any = value
    for key in reversed(path.split(".")):
        nested = {key: nested}
    try:
        parser.parse_object(nested)
    except (jsonargparse.ArgumentError, TypeError, ValueError):
        return False
    return True


def _build(parser: Any, values: Mapping[str, Any]) -> RunConfig:
    parsed = parser.instantiate(parser.parse_object(_without_empty_groups(values)))
    return RunConfig(**{entry.name: parsed[entry.name] for entry in dataclasses.fields(RunConfig)})


def _without_empty_groups(values: Mapping[str, Any]) -> dict[str, Any]:
    groups = {path.partition(".")[0] for path, _ in config_fields() if "." in path}
    return {key: value for key, value in values.items() if not (key in groups and value is None)}


def _takes_null(hint: Any) -> bool:
    """Whether null is a value here; left alone, jsonargparse lets it through everywhere."""
    return type(None) in typing.get_args(hint)


def _in_range(value: Any, minimum: float) -> bool:
    """Whether a number is finite and large enough; text and booleans are no numbers."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return not is_number or minimum <= float(value) < math.inf


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null",
          dict: "a mapping", list: "a list"}  # fmt: skip


def _describe(hint: Any) -> str:
    """A type hint in the words of a YAML file."""
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        words = dict.fromkeys(_describe(part) for part in typing.get_args(hint))
        return ", ".join([*words][:-1]) + f" or {[*words][-1]}" if len(words) > 1 else next(iter(words))
    if origin is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    return _WORDS.get(origin or hint, str(hint))
