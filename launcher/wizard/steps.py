"""The questions of the set-up wizard, step by step: each takes the answers so far and returns them with its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Literal

import yaml
from rich.console import Console
from rich.table import Table

from launcher.config.presets import preset_names, preset_summary
from launcher.config.schema import RunConfig
from launcher.core.errors import LauncherError, Problem
from launcher.core.yaml_loader import Loader
from launcher.wizard.answers import WizardConfig
from launcher.wizard.machine import MachineFacts
from launcher.wizard.prompter import Choice, Prompter
from slurm.partitions import Partition
from strategies.choice import NAMES as STRATEGY_NAMES
from strategies.precision import Precision
from strategies.units import format_bytes

_STRATEGIES = {
    "auto": "auto: the launcher chooses, and says why",
    "single_device": "single_device: one rank, one device",
    "ddp": "ddp: each rank has the whole model",
    "ddp_find_unused_parameters_true": "ddp_find_unused_parameters_true: for steps that use a part of the parameters",
}


class WizardSession:
    """Where questions are asked and answered: the prompter, the screen, and what is known of the machine.

    Args:
        prompter: asks.
        console: shows what is no question.
        look: finds out about the machine; called once, when it is first needed.
    """

    def __init__(self, prompter: Prompter, console: Console, look: Callable[[], MachineFacts]) -> None:
        self.prompter = prompter
        self.console = console
        self._look_around = look
        self._machine: MachineFacts | None = None

    def look(self) -> MachineFacts:
        """The machine; looked at when this is first called."""
        if self._machine is None:
            self.say("looking at this machine ...", style="dim")
            self._machine = self._look_around()
        return self._machine

    def say(self, text: str, style: str | None = None) -> None:
        """Show a line; square brackets in it mean nothing."""
        self.console.print(text, style=style, markup=False, highlight=False)

    def tell(self, problems: tuple[Problem, ...] | list[Problem], style: str = "red") -> None:
        """Show what is wrong."""
        for problem in problems:
            self.say(f"  {problem.path}: {problem.message}", style=style)


def ask_model_and_data(config: WizardConfig, desk: WizardSession) -> WizardConfig:
    """Import paths, checked at once, with the number of parameters; batch and length of the training."""
    desk.say("Import paths are looked up from this directory, as in my_pkg.MyModule.", style="dim")
    config = _ask_class(config, desk, "model", "Model: the LightningModule (empty: the built-in demo)")
    if config.model is None:
        return config.with_answers(data=None, data_args=None)
    config = _ask_class(config, desk, "data", "Data: the LightningDataModule (empty: the model has loaders of its own)")
    message = "Samples per optimizer step on all ranks together (empty: the data's batch size on each)"
    config = _ask_value(config, desk, "global_batch_size", message)
    return _ask_value(config, desk, "max_epochs", "Passes over the data, in epochs (-1: no limit)")


def ask_hardware(config: WizardConfig, desk: WizardSession) -> WizardConfig:
    """A preset to begin with, the partition, ranks on a node, nodes."""
    machine = desk.look()
    device = machine.hardware.device
    desk.say(
        f"{machine.host}: {machine.hardware.local_device_count} x {device.name} ({device.kind}), "
        f"{format_bytes(device.memory_bytes)}, computes {', '.join(device.native_dtypes)} natively"
    )
    for remark in machine.remarks:
        desk.say(remark, style="yellow")
    none = Choice(None, "no preset: answer by answer")
    presets = [Choice(name, f"{name}: {preset_summary(name)}") for name in preset_names()]
    preset = desk.prompter.select("Begin with a preset?", [none, *presets], config.preset)
    config = config.with_preset(preset) if preset else config.without_preset()
    partition = _ask_partition(config, desk, machine.partitions) if machine.partitions else None
    config = config.with_answers(partition=partition.name if partition else None)
    gpus = partition.gpus_per_node if partition else None
    limits = {
        "devices": (gpus or None, f"GPUs on a node of partition {config.partition}"),
        "num_nodes": (partition.nodes if partition else None, f"nodes in partition {config.partition}"),
    }
    for name, message in (
        ("devices", "Ranks on each node (auto: all GPUs, or one process on a CPU)"),
        ("num_nodes", "Nodes (auto: what torchrun or SLURM say)"),
    ):
        most, what = limits[name]
        config = _ask_value(config, desk, name, message, default="auto", most=most, what=what)
    return config


def ask_precision_and_strategy(config: WizardConfig, desk: WizardSession) -> WizardConfig:
    """Mixed precision and the strategy, with the plan before and after."""
    show_plan(config, desk)
    while True:
        config = _ask_precision(config, desk)
        strategies = [Choice(name, _STRATEGIES.get(name, name)) for name in STRATEGY_NAMES]
        strategy = desk.prompter.select("Strategy", strategies, config.strategy or "auto")
        config = _answered(config, "strategy", strategy, default="auto")
        if show_plan(config, desk) or not desk.prompter.confirm("There is no such plan here. Answer anew?"):
            return config


def ask_logging(config: WizardConfig, desk: WizardSession) -> WizardConfig:
    """Weights & Biases: where to, under which project; the run's name."""
    now = "online: a key is at hand" if desk.look().wandb_online else "offline: no key is at hand"
    modes = [
        Choice("auto", f"auto: online where a key is at hand, offline otherwise (here {now})"),
        Choice("online", "online"),
        Choice("offline", "offline: kept in the run's folder, `wandb sync` sends it later"),
        Choice("disabled", "disabled"),
    ]
    mode = desk.prompter.select("Weights & Biases", modes, config.wandb_mode or "auto")
    config = _answered(config, "wandb_mode", mode, default="auto")
    if config.wandb_mode != "disabled":
        config = _ask_value(config, desk, "wandb_project", "W&B project", default="launcher", as_text=True)
    return _ask_value(config, desk, "name", "Name of the run (empty: made from the date)", as_text=True)


def show_plan(config: WizardConfig, desk: WizardSession) -> bool:
    """Print what `fit` would do on this machine; says why where it would do nothing."""
    # Lightning comes with it.
    from launcher.planning.dry_run import plan_here
    from launcher.planning.table import print_plan

    try:
        plan = plan_here(config.to_run_config(), desk.look().host).plan
    except LauncherError as error:
        desk.say(f"no plan on this machine: {error}", style="yellow")
        return False
    print_plan(plan, desk.console)
    return True


def _ask_precision(config: WizardConfig, desk: WizardSession) -> WizardConfig:
    named = config.precision not in (None, "auto")
    current = config.use_mixed_precision if config.use_mixed_precision is not None else "name" if named else True
    choices = [
        Choice(True, "yes, where the hardware has it"),
        Choice(False, "no: 32-bit"),
        Choice("name", "I name one, and every rank must be able to run it"),
    ]
    answer = desk.prompter.select("Train in mixed precision? It is faster and takes less memory", choices, current)
    if answer != "name":
        return config.with_answers(use_mixed_precision=answer, precision=None)
    names = [Choice("auto", "auto: the best that all ranks share"), *(Choice(p.value, p.value) for p in Precision)]
    precision = desk.prompter.select("Precision", names, str(config.precision or "auto"))
    return config.with_answers(precision=precision, use_mixed_precision=None)


def _ask_partition(config: WizardConfig, desk: WizardSession, partitions: tuple[Partition, ...]) -> Partition | None:
    table = Table("partition", "nodes", "GPUs", "CPUs", "limit", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for p in partitions:
        gpus = f"{p.gpus_per_node} {p.gpu_type or ''}".strip()
        state = "" if p.is_up else " (down)"
        table.add_row(p.name + state, str(p.nodes), gpus, str(p.cpus_per_node), p.time_limit)
    desk.console.print(table)
    choices = [*(Choice(p, p.name) for p in partitions), Choice(None, "none: not on SLURM")]
    current = next((p for p in partitions if p.name == config.partition), partitions[0])
    return desk.prompter.select("SLURM partition", choices, current)


def _ask_class(config: WizardConfig, desk: WizardSession, part: Literal["model", "data"], message: str) -> WizardConfig:
    """An import path, then the arguments, each until it is right."""
    from launcher.user_code.inspection import class_problems, signature_of

    typed = getattr(config, part) or ""
    while True:
        typed = desk.prompter.text(message, typed).strip()
        if not typed:
            return config.with_answers(**{part: None, f"{part}_args": None})
        same = typed == getattr(config, part)
        given = getattr(config, f"{part}_args") if same else None
        config_with = config.with_answers(**{part: typed, f"{part}_args": given})
        errors = _errors_of(part, typed)
        if not errors:
            desk.say(f"importing {typed} ...", style="dim")
            problems = class_problems(_classes_of(config_with), part)
            errors = [p for p in problems if p.path == f"{part}.class_path"]
        if errors:
            desk.tell(errors)
            continue
        desk.say(f"  {signature_of(typed)}", style="dim")
        answered = _ask_arguments(config_with, desk, part)
        if answered is not None:
            return answered


def _ask_arguments(config: WizardConfig, desk: WizardSession, part: Literal["model", "data"]) -> WizardConfig | None:
    """The constructor's arguments; None if the user would rather name another class."""
    from launcher.user_code.inspection import ModelCountError, class_problems, count_parameters

    typed = json.dumps(getattr(config, f"{part}_args"), ensure_ascii=False) if getattr(config, f"{part}_args") else ""
    while True:
        typed = desk.prompter.text("Its arguments, as in lr: 1e-4, width: 8 (empty: the defaults)", typed).strip()
        try:
            arguments = _parse_arguments(typed)
        except ValueError as error:
            desk.say(f"  {error}", style="red")
            continue
        candidate = config.with_answers(**{f"{part}_args": arguments or None})
        problems = class_problems(_classes_of(candidate), part)
        if problems:
            desk.tell(problems)
            continue
        if part == "data":
            return candidate
        try:
            desk.say(f"  {count_parameters(_classes_of(candidate))}", style="green")
        except ModelCountError as error:
            desk.say(f"  {error}", style="yellow")
            if not desk.prompter.confirm("Its parameters cannot be counted. Keep it?", default=False):
                return None
        return candidate


def _parse_arguments(text: str) -> Mapping[str, Any]:
    try:
        values = yaml.load(text if text.startswith("{") else f"{{{text}}}", Loader)  # noqa: S506 -- a SafeLoader
    except (yaml.YAMLError, ValueError):
        values = None
    if not isinstance(values, dict) or not all(isinstance(k, str) and k.isidentifier() for k in values):
        raise ValueError(f"given {text!r}; expected arguments as in lr: 1e-4, width: 8")
    if any(value is None for value in values.values()) and "null" not in text and "~" not in text:
        raise ValueError(f"given {text!r}; expected a value behind each name, as in lr: 1e-4")
    return values


def _ask_value(
    config: WizardConfig,
    desk: WizardSession,
    name: str,
    message: str,
    *,
    default: str = "",
    as_text: bool = False,
    most: int | None = None,
    what: str = "",
) -> WizardConfig:
    """One answer, asked until the config takes it; an empty one is no answer."""
    current = getattr(config, name)
    typed = default if current is None else str(current)
    while True:
        typed = desk.prompter.text(message, typed).strip()
        value: Any = typed or None
        if typed.lstrip("-").isdecimal() and not as_text:
            value = int(typed)
        errors = _errors_of(name, value)
        if most is not None and isinstance(value, int) and value > most:
            errors.append(Problem(name, f"given {value}; expected at most {most}: the {what}"))
        if not errors:
            return _answered(config, name, value, default=default)
        desk.tell(errors)


def _answered(config: WizardConfig, name: str, value: Any, *, default: Any) -> WizardConfig:
    """With one answer; what only confirms the default or the preset's value stays open to another preset."""
    current = getattr(config, name)
    return (
        config if value == current or (current is None and value == default) else config.with_answers(**{name: value})
    )


def _errors_of(name: str, value: Any) -> list[Problem]:
    """What is wrong with one answer by itself."""
    alone = WizardConfig(**{name: value})
    return [problem for problem in alone.errors() if problem.path == name]


def _classes_of(config: WizardConfig) -> RunConfig:
    """Only the classes of the answers, for a look at them."""
    values = config.values()
    return RunConfig(model=values.get("model"), data=values.get("data"))
