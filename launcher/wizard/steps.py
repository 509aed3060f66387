"""The steps of the set-up wizard. Each takes the answers so far, and returns them with its own."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from launcher.config.presets import preset_names, preset_summary
from launcher.core.errors import LauncherError
from launcher.wizard.answers import WizardConfig
from launcher.wizard.notes import find_split_problems
from launcher.wizard.prompter import Choice
from launcher.wizard.questions import ValueQuestion, ask_class, ask_value, with_answer
from launcher.wizard.session import WizardSession
from slurm.partitions import Partition
from strategies.precision import Precision
from strategies.registry import AUTO, list_strategies
from strategies.units import format_bytes


def ask_model_and_data(config: WizardConfig, session: WizardSession) -> WizardConfig:
    """Import paths, which are checked at once, then batch size and length of the training."""
    session.show("Give import paths as in my_pkg.MyModule; this directory is searched too.", style="dim")
    config = ask_class(config, session, "model", "Model: the LightningModule (empty: the built-in demo)")
    if config.model is None:
        return config.with_answers(data=None, data_args=None)
    config = ask_class(config, session, "data", "Data: the LightningDataModule (empty: the model has its own loaders)")
    config = _ask_batch(config, session)
    # Lightning's own default.
    is_limited = config.max_steps not in (None, -1) or config.settings.get("trainer.max_time") is not None
    message = f"Passes over the data, in epochs (-1: no limit; empty: {'no limit' if is_limited else 1000})"
    return ask_value(config, session, ValueQuestion("max_epochs", message))


def ask_hardware(config: WizardConfig, session: WizardSession) -> WizardConfig:
    """Preset, partition, ranks on each node, nodes."""
    machine = session.machine
    device = machine.hardware.device
    devices = f"{machine.hardware.local_device_count} x {device.name} ({device.kind})"
    native = ", ".join(device.native_dtypes)
    session.show(f"{machine.host}: {devices}, {format_bytes(device.memory_bytes)}, native {native}")
    for remark in machine.remarks:
        session.show(remark, style="yellow")
    none = Choice(None, "no preset")
    presets = [Choice(name, f"{name}: {preset_summary(name)}") for name in preset_names()]
    preset = session.prompter.select("Begin with a preset?", [none, *presets], config.preset)
    config = config.with_preset(preset) if preset else config.without_preset()
    partition = _ask_partition(config, session, machine.partitions) if machine.partitions else None
    config = config.with_answers(partition=partition.name if partition else None)
    return _ask_ranks(config, session)


def ask_precision_and_strategy(config: WizardConfig, session: WizardSession) -> WizardConfig:
    """Mixed precision and strategy; shows the plan before and after."""
    while not show_plan(config, session) and find_split_problems(vars(config)):
        question = "Batch and ranks do not fit. What do you change?"
        config = _change_split(config, session, question) or config
    while True:
        config = _ask_precision(config, session)
        strategies = [Choice(entry.name, f"{entry.name}: {entry.summary}") for entry in list_strategies()]
        strategies.insert(0, Choice(AUTO, "auto: the launcher chooses, and gives its reasons"))
        strategy = session.prompter.select("Strategy", strategies, config.strategy or AUTO)
        config = with_answer(config, "strategy", strategy, default="auto")
        if show_plan(config, session):
            return config
        others = [
            Choice("again", "precision and strategy"),
            Choice(False, "nothing: the config is for another machine"),
        ]
        question = "No plan here. What do you change?"
        changed = _change_split(config, session, question, others)
        if changed is None:
            return config
        config = changed


def _change_split(
    config: WizardConfig, session: WizardSession, question: str, others: Sequence[Choice] = ()
) -> WizardConfig | None:
    """Ask for the ranks or the batch size again; the same config for another choice, None for no change."""
    choices = [Choice("ranks", "ranks and nodes"), Choice("batch", "samples per optimizer step"), *others]
    default = "ranks" if find_split_problems(vars(config)) else "again"
    answer = session.prompter.select(question, choices, default)
    if answer == "ranks":
        return _ask_ranks(config, session)
    if answer == "batch":
        return _ask_batch(config, session)
    return config if answer else None


def _ask_ranks(config: WizardConfig, session: WizardSession) -> WizardConfig:
    """Ranks on each node, and nodes."""
    partition = next((p for p in session.machine.partitions if p.name == config.partition), None)
    gpus = partition.gpus_per_node if partition else None
    ranks = ValueQuestion("devices", "Ranks on each node (empty: all GPUs, or one process on a CPU)", "auto",
                          most=gpus or None, limit=f"GPUs on a node of partition {config.partition}")  # fmt: skip
    nodes = ValueQuestion("num_nodes", "Nodes (empty: as torchrun or SLURM start them)", "auto",
                          most=partition.nodes if partition else None,
                          limit=f"nodes in partition {config.partition}")  # fmt: skip
    return ask_value(ask_value(config, session, ranks), session, nodes)


def _ask_batch(config: WizardConfig, session: WizardSession) -> WizardConfig:
    message = "Samples per optimizer step, over all ranks (empty: the batch size of the data on each rank)"
    return ask_value(config, session, ValueQuestion("global_batch_size", message))


def ask_logging(config: WizardConfig, session: WizardSession) -> WizardConfig:
    """Mode and project of Weights & Biases, and the name of the run."""
    now = "online: a key is set" if session.machine.wandb_online else "offline: no key is set"
    modes = [
        Choice("auto", f"auto: online with a key, offline without one (here {now})"),
        Choice("online", "online"),
        Choice("offline", "offline: kept in the run directory; `wandb sync` uploads it later"),
        Choice("disabled", "disabled"),
    ]
    mode = session.prompter.select("Weights & Biases", modes, config.wandb_mode or "auto")
    config = with_answer(config, "wandb_mode", mode, default="auto")
    if config.wandb_mode != "disabled":
        config = ask_value(
            config, session, ValueQuestion("wandb_project", "W&B project (empty: launcher)", "launcher", is_text=True)
        )
    message = "Name of the run (empty: from date and config)"
    return ask_value(config, session, ValueQuestion("name", message, is_text=True))


def show_plan(config: WizardConfig, session: WizardSession) -> bool:
    """Print the plan of `fit` on this machine, or why there is none; returns whether there is one."""
    # Here: they import Lightning.
    from launcher.planning.dry_run import plan_here
    from launcher.planning.table import print_plan

    try:
        plan = plan_here(config.to_run_config(), session.machine.host).plan
    except LauncherError as error:
        session.plan_notices = ()
        session.show(f"no plan for this machine: {error}", style="yellow")
        return False
    session.plan_notices = plan.notices
    print_plan(plan, session.console)
    return True


def _ask_precision(config: WizardConfig, session: WizardSession) -> WizardConfig:
    named = config.precision not in (None, AUTO)
    current = config.use_mixed_precision if config.use_mixed_precision is not None else "name" if named else AUTO
    choices = [
        # Without a request: no notice on a machine that cannot.
        Choice(AUTO, f"auto: the best that all ranks support (here {session.machine.best_precision})"),
        Choice(True, "yes, if the hardware supports it; a notice if it does not"),
        Choice(False, "no: 32-bit"),
        Choice("name", "a precision by name, which every rank must support"),
    ]
    session.show("Mixed precision is faster and needs less memory.", style="dim")
    answer = session.prompter.select("Train in mixed precision?", choices, current)
    if answer == AUTO:
        return config.with_answers(use_mixed_precision=None, precision=None)
    if answer != "name":
        return config.with_answers(use_mixed_precision=answer, precision=None)
    names = [Choice(p.value, p.value) for p in Precision]
    default = str(config.precision) if named else None
    precision = session.prompter.select("Precision", names, default)
    return config.with_answers(precision=precision, use_mixed_precision=None)


def _ask_partition(config: WizardConfig, session: WizardSession, partitions: tuple[Partition, ...]) -> Partition | None:
    table = Table("partition", "nodes", "GPUs", "CPUs", "limit", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for p in partitions:
        gpus = f"{p.gpus_per_node} {p.gpu_type or ''}".strip()
        state = "" if p.is_up else " (down)"
        table.add_row(p.name + state, str(p.nodes), gpus, str(p.cpus_per_node), p.time_limit)
    session.console.print(table)
    choices = [*(Choice(p, p.name) for p in partitions), Choice(None, "none: without SLURM")]
    current = next((p for p in partitions if p.name == config.partition), partitions[0])
    return session.prompter.select("SLURM partition", choices, current)
