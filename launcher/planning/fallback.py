"""What a run can go on with after a strategy that runs out of memory: what needs less, and what the config allows.

Decided when the plan is made, not when memory has run out: a restart that no plan meets helps nobody.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from launcher.agreement.facts import Agreement
from launcher.checkpoint.precision import CheckpointPrecision
from launcher.config.schema import RunConfig
from launcher.core.errors import PlanError
from launcher.planning.plan import make_plan
from strategies.comparison import Comparison, next_after
from strategies.step_time import MachineModel

# What of a user's DeepSpeed config says which variant of ZeRO it is meant for.
_FIXING = ("stage", "offload_optimizer", "offload_param")


def with_next(found: Comparison, name: str, machine: MachineModel, why_not: Callable[[str], str | None]) -> Comparison:
    """The comparison with what comes after `name`, or with what keeps the config from it.

    Args:
        found: all candidates.
        name: the strategy that will train.
        machine: the ranks.
        why_not: what stands in the way of a strategy of that name; None if nothing does.
    """
    following = next_after(name, found.assessments, machine)
    obstacle = None if following is None else why_not(following)
    if obstacle is not None:
        able = [a for a in found.assessments if a.name == name or why_not(a.name) is None]
        obstacle = f"`strategy: {following}` needs less, but {obstacle}"
        following = next_after(name, able, machine)
    return dataclasses.replace(found, next=following, next_obstacle=obstacle if following is None else None)


def passed_over(
    found: Comparison, ran_out: Sequence[str], machine: MachineModel, why_not: Callable[[str], str | None]
) -> Comparison:
    """The comparison without what ran out of memory in this run: the fastest that needs less than all of it.

    Args:
        found: all candidates.
        ran_out: names of the strategies, at least one.
        machine: the ranks.
        why_not: see `with_next`.

    Raises:
        PlanError: nothing does, or the config does not let it.
    """
    least = min((a for a in found.assessments if a.name in ran_out), key=lambda a: a.memory.total).name
    after = with_next(found, least, machine, why_not)
    if after.next is None:
        why = after.next_obstacle or (
            "nothing that fits needs less; take a smaller micro batch (the data's batch_size) or more memory"
        )
        raise PlanError(
            f"{' and '.join(ran_out)} ran out of memory in this run: {why}, or try again with `on_oom: stop`"
        )
    why = f"needs less than {least}, which ran out of memory in this run"
    return with_next(dataclasses.replace(after, pick=after.next, why=why), after.next, machine, why_not)


def why_not_planned(
    config: RunConfig, agreement: Agreement, checkpoint: CheckpointPrecision | None, name: str
) -> str | None:
    """What stands in the way of a plan with another strategy, and what to change; None if nothing does."""
    try:
        make_plan(dataclasses.replace(config, strategy=name), agreement, checkpoint)
    except PlanError as error:
        problems = [line.strip() for line in str(error).splitlines()[1:]]
        fixed = _fixed(config.deepspeed_config)
        if fixed and any(problem.startswith("deepspeed_config.zero_optimization:") for problem in problems):
            return f"deepspeed_config fixes {fixed}; set that to 'auto' there"
        return "; ".join(problems)
    return None


def _fixed(deepspeed: Any) -> str:
    """What a user's DeepSpeed config says of stage and offload; empty if it leaves them to the plan."""
    zero = deepspeed.get("zero_optimization") if isinstance(deepspeed, Mapping) else None
    given = {key: zero[key] for key in _FIXING if zero.get(key, "auto") != "auto"} if isinstance(zero, Mapping) else {}
    return ", ".join(f"zero_optimization.{key}: {value}" for key, value in given.items())
