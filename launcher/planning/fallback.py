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
from launcher.planning.plan import make_plan
from strategies.comparison import Comparison, next_after
from strategies.deepspeed_config import as_block
from strategies.machine import MachineModel

# Settings of DeepSpeed that fix the variant of ZeRO.
_FIXING = ("stage", "offload_optimizer", "offload_param")


def with_next(found: Comparison, name: str, machine: MachineModel, why_not: Callable[[str], str | None]) -> Comparison:
    """The comparison with the candidate after `name`, or with the reason why the config does not allow it.

    `why_not` gives the reason why there is no plan with a strategy; None if there is one.
    """
    following = next_after(name, found.assessments, machine)
    obstacle = None if following is None else why_not(following)
    if obstacle is not None:
        able = [a for a in found.assessments if a.name == name or why_not(a.name) is None]
        obstacle = f"`strategy: {following}` needs less, but {obstacle}"
        following = next_after(name, able, machine)
    return dataclasses.replace(found, next=following, next_obstacle=obstacle if following is None else None)


def skip_candidates(
    found: Comparison, ran_out: Sequence[str], machine: MachineModel, why_not: Callable[[str], str | None]
) -> Comparison:
    """The comparison without the candidates that ran out of memory: the pick is the fastest that needs less.

    Raises:
        PlanError: none needs less, or the config does not allow it.
    """
    found = found.with_reasons(dict.fromkeys(ran_out, "ran out of memory in this run"))
    least = min((a for a in found.assessments if a.name in ran_out), key=lambda a: a.memory.total).name
    after = with_next(found, least, machine, why_not)
    if after.next is None:
        why = after.next_obstacle or (
            "nothing that fits needs less; use a smaller micro batch (the data's batch_size) or more memory"
        )
        raise PlanError(
            f"{' and '.join(ran_out)} ran out of memory in this run: {why}, or try again with `on_oom: stop`"
        )
    why = f"needs less than {least}, which ran out of memory in this run"
    return with_next(dataclasses.replace(after, pick=after.next, why=why), after.next, machine, why_not)


def why_not_planned(
    config: RunConfig, agreement: Agreement, checkpoint: CheckpointPrecision | None, name: str
) -> str | None:
    """Why there is no plan with another strategy, and what to change; None if there is one."""
    try:
        make_plan(dataclasses.replace(config, strategy=name), agreement, checkpoint)
    except PlanError as error:
        problems = [line.strip() for line in str(error).splitlines()[1:]]
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
