"""The strategy to continue with after one runs out of memory: one that needs less and that the config allows.

It is chosen when the plan is made, so that a run restarts only if there is a plan for the restart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from launcher.agreement.facts import Agreement
from launcher.checkpoint.precision import CheckpointPrecision
from launcher.config.schema import RunConfig
from launcher.core.errors import PlanError
from launcher.planning.checkpointing import CheckpointedChoice, ComparisonInputs
from launcher.planning.plan import make_plan
from strategies.assessment import choose_next
from strategies.comparison import Comparison, next_after
from strategies.deepspeed_config import as_block
from strategies.machine import MachineModel
from strategies.registry import find_strategy

# Settings of DeepSpeed that fix the variant of ZeRO.
ONLY_DEEPSPEED = "deepspeed_config was given, which only DeepSpeed reads; remove it"
_RAN_OUT = "ran out of memory in this run"
_FIXING = ("stage", "offload_optimizer", "offload_param")


def with_next(found: Comparison, name: str, machine: MachineModel, why_not: Callable[[str], str | None]) -> Comparison:
    """The comparison with the candidate after `name`, or with the reason why the config does not allow it.

    `why_not` gives the reason why there is no plan with a strategy; None if there is one.
    """
    following = next_after(name, found.assessments, machine)
    obstacle = None if following is None else why_not(following)
    if obstacle == ONLY_DEEPSPEED:
        # The user's config is for DeepSpeed: what it allows of its variants comes first.
        own = [a for a in found.assessments if a.name == name or find_strategy(a.name).needs_deepspeed]
        following = next_after(name, own, machine) or following
        obstacle = None if following is None else why_not(following)
    if obstacle is not None:
        able = [a for a in found.assessments if a.name == name or why_not(a.name) is None]
        obstacle = f"`strategy: {following}` needs less, but {obstacle}"
        following = next_after(name, able, machine)
    return dataclasses.replace(found, next=following, next_obstacle=obstacle if following is None else None)


def skip_candidates(
    choice: CheckpointedChoice, failed: Sequence[str], why_not: Callable[[str], str | None], *, may_checkpoint: bool
) -> CheckpointedChoice:
    """The choice without the candidates that ran out of memory: the pick is the fastest that needs less.

    Only if none needs less, candidates with activation checkpointing follow, of which the same may be one.

    Raises:
        PlanError: none needs less, or the config does not allow it.
    """
    found, machine = choice.found, choice.found.machine
    least = min((a for a in found.assessments if a.name in failed), key=lambda a: a.memory.total)
    why = f"needs less than {least.name}, which ran out of memory in this run"
    after = with_next(found.with_reasons(dict.fromkeys(failed, _RAN_OUT)), least.name, machine, why_not)
    if after.next is not None:
        return dataclasses.replace(choice, found=dataclasses.replace(after, pick=after.next, why=why))
    again = choice.inputs.checkpointed() if may_checkpoint else None
    instead = None if again is None else again.compare()
    name = None if instead is None else pick_below(instead, least.memory.total, why_not)
    if again is None or instead is None or name is None:
        problem = after.next_obstacle or (
            "nothing that fits needs less; use a smaller micro batch (the data's batch_size) or more memory"
        )
        raise PlanError(
            f"{' and '.join(failed)} ran out of memory in this run: {problem}, or try again with `on_oom: stop`"
        )
    reason = f"nothing else needs less than {least.name}; {choice.inputs.describe_saving(again, name)}"
    return CheckpointedChoice(again, dataclasses.replace(instead, pick=name, why=why), (reason,))


def with_checkpointed_next(
    found: Comparison, name: str, checkpointed: ComparisonInputs | None, why_not: Callable[[str], str | None]
) -> Comparison:
    """The comparison with a next candidate that has activation checkpointing, if it has none without."""
    own = found.of(name)
    if found.next is not None or checkpointed is None or own is None:
        return found
    after = pick_below(checkpointed.compare(), own.memory.total, why_not)
    return found if after is None else dataclasses.replace(found, next=after, next_checkpointed=True)


def pick_below(found: Comparison, size: int, why_not: Callable[[str], str | None]) -> str | None:
    """The fastest candidate that needs less than `size` bytes and that the config allows; None if there is none."""
    able = [a for a in found.assessments if a.can_train and a.memory.total < size and why_not(a.name) is None]
    fastest = choose_next(able, found.machine)
    return None if fastest is None else fastest.name


def why_not_planned(
    config: RunConfig, agreement: Agreement, checkpoint: CheckpointPrecision | None, name: str
) -> str | None:
    """Why there is no plan with another strategy, and what to change; None if there is one."""
    try:
        make_plan(dataclasses.replace(config, strategy=name), agreement, checkpoint)
    except PlanError as error:
        problems = [line.strip() for line in str(error).splitlines()[1:]]
        if config.deepspeed_config is not None and not find_strategy(name).needs_deepspeed:
            return ONLY_DEEPSPEED
        fixed = _describe_fixed(config.deepspeed_config)
        if fixed and any(problem.startswith("deepspeed_config.zero_optimization:") for problem in problems):
            return f"deepspeed_config fixes {fixed}; set that to 'auto' there"
        return "; ".join(problems)
    return None


def _describe_fixed(deepspeed: Any) -> str:
    """Stage and offload in the user's DeepSpeed config, for a message; empty if they are left to the plan."""
    zero = as_block(as_block(deepspeed).get("zero_optimization"))
    given = {key: zero[key] for key in _FIXING if zero.get(key, "auto") != "auto"}
    return ", ".join(f"zero_optimization.{key}: {value}" for key, value in given.items())
