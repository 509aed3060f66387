"""The plan of a run that starts. It compares memory only if that may be short."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from launcher.agreement.facts import Agreement
from launcher.checkpoint.precision import CheckpointPrecision
from launcher.config.schema import RunConfig
from launcher.core.errors import PlanError
from launcher.hardware.devices import host_memory
from launcher.planning.fsdp_limits import find_block_problem, reads_blocks
from launcher.planning.memory import machine_of, plan_with_memory, planned_precision
from launcher.planning.plan import Plan, make_plan
from launcher.planning.spinner import find_terminal, show_activity
from launcher.runs.oom_record import MemoryRecord
from launcher.user_code.classes import UserClasses, known_classes
from launcher.user_code.objects import UserObjects
from strategies.registry import find_strategy
from strategies.step_trace import ModelProfile, Unprofiled

if TYPE_CHECKING:
    import lightning.pytorch as pl

_DEFAULTS = RunConfig()
# Share of a CPU's memory: if the model states need less, the run starts without a trace.
_SHARE_WITHOUT_TRACE = 0.1


def check_model(
    model: pl.LightningModule, plan: Plan, notice: Callable[[str], None], config: RunConfig = _DEFAULTS
) -> None:
    """Check that the planned strategy can train the model; `notice` receives settings and hooks without effect.

    Raises:
        PlanError: it cannot.
    """
    strategy = find_strategy(plan.strategy.name)
    problem = strategy.model_problem(model) or find_block_problem(model, config, plan.strategy.name)
    if problem is not None:
        raise PlanError(problem)
    for text in strategy.model_notices(model):
        notice(text)


def plan_for_fit(
    config: RunConfig,
    agreement: Agreement,
    checkpoint: CheckpointPrecision | None,
    *,
    given: UserObjects | None = None,
    record: MemoryRecord = MemoryRecord(),  # noqa: B008 -- frozen
) -> Plan:
    """The plan that `fit` trains with.

    On a CPU the step is traced only if the model's states need much of the memory: a trace runs the user's
    `training_step` once, and a debugging run should start at once. With `on_oom: next` it is always traced, as the next
    strategy depends on it.

    Args:
        config: the user's.
        agreement: facts of the ranks.
        checkpoint: precision of the checkpoint to resume from.
        given: objects from code, which are trained instead of those that the config names.
        record: the strategies that ran out of memory in the resumed run; only used with `on_oom: next`.
    """
    plan = make_plan(config, agreement, checkpoint)
    check_blocks(config, plan, given=given)
    with show_activity(find_terminal()):
        profile = _profile_if_needed(config, agreement, plan, given)
    if profile is None:
        return plan
    plan = plan_with_memory(
        config,
        agreement,
        profile,
        checkpoint,
        host_memory_bytes=host_memory(),
        record=record if config.on_oom == "next" else None,
    )
    return plan if record.problem is None else dataclasses.replace(plan, notices=(*plan.notices, record.problem))


def check_blocks(
    config: RunConfig, plan: Plan, *, given: UserObjects | None = None, classes: UserClasses | None = None
) -> None:
    """Check the settings of FSDP2 against the model, which is created without memory; if that fails, `fit` checks.

    Raises:
        PlanError: they do not fit the model.
    """
    if not reads_blocks(config):
        return
    if given is None:
        from launcher.planning.profile import make_without_memory

        model = make_without_memory(config, classes or known_classes(config), plan.batch.micro_batch_size)
    else:
        model = given.model
    problem = None if model is None else find_block_problem(model, config, config.strategy)
    if problem is not None:
        raise PlanError(problem)


def _profile_if_needed(
    config: RunConfig, agreement: Agreement, plan: Plan, given: UserObjects | None
) -> ModelProfile | Unprofiled | None:
    """The module's profile; None if memory cannot be short."""
    classes = known_classes(config) if given is None else None
    if plan.device_kind != "cuda" and config.on_oom != "next":
        size = _parameter_bytes(config, classes, given, plan)
        # Weight, gradient and two states of Adam.
        room = machine_of(agreement, planned_precision(plan)).memory_bytes
        if size is None or 4 * size < _SHARE_WITHOUT_TRACE * room:
            return None
    return profile_for(config, classes, plan, given)


def profile_for(
    config: RunConfig, classes: UserClasses | None, plan: Plan, given: UserObjects | None = None
) -> ModelProfile | Unprofiled:
    """The module's profile in the plan's precision and micro batch; `classes` are None with objects."""
    precision, kind = planned_precision(plan), plan.device_kind
    if given is not None:
        from launcher.planning.object_profile import profile_objects

        return profile_objects(config, given, precision, world_size=plan.world_size, device_kind=kind)
    from launcher.planning.profile import profile_model

    classes = classes or known_classes(config)
    micro = plan.batch.micro_batch_size
    return profile_model(config, classes, precision, micro, world_size=plan.world_size, device_kind=kind)


def _parameter_bytes(
    config: RunConfig, classes: UserClasses | None, given: UserObjects | None, plan: Plan
) -> int | None:
    from launcher.planning.profile import parameter_bytes, sum_of_bytes

    if given is not None:
        return sum_of_bytes(given.model)
    return parameter_bytes(config, classes or known_classes(config), plan.batch.micro_batch_size)
