"""One candidate's memory and time on the given ranks, and the reasons why it was or was not chosen. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from strategies.machine import MachineModel
from strategies.memory import MemoryEstimate, estimate_memory
from strategies.model_states import ZeroSettings
from strategies.precision import Precision
from strategies.step_time import StepTime
from strategies.step_trace import ModelProfile, at_batch_size
from strategies.units import format_bytes, format_duration
from strategies.zero import ZERO_3

# A later candidate must be estimated this much faster than a simpler one: smaller differences are below the error.
MARGIN = 0.1
_MOST_RANKS = 1 << 17


@dataclass(frozen=True, slots=True)
class Assessment:
    """One candidate on these ranks.

    Attributes:
        name: Lightning's spelling.
        micro_batch_size: the largest micro batch that fits, or the smallest one if none fits.
        accumulate: micro batches per optimizer step.
        eligible: whether these ranks can run it at all.
        fits: whether its memory is within the limit.
        reason: why it was or was not chosen.
    """

    name: str
    memory: MemoryEstimate
    step: StepTime
    micro_batch_size: int
    accumulate: int
    eligible: bool
    fits: bool
    reason: str


def explain_pick(pick: Assessment, able: Sequence[Assessment], machine: MachineModel) -> str:
    """The reason for the pick among the candidates that these ranks can run and that fit."""
    needs = f"needs {format_bytes(pick.memory.total)} of {format_bytes(machine.memory_bytes)}"
    if len(able) == 1:
        return f"{needs}; nothing else fits"
    if machine.device_kind == "cpu":
        return f"{needs}; the simplest that fits: on a CPU ZeRO is for debugging"
    rivals = [a for a in able if a is not pick]
    nearest = min(rivals, key=lambda a: a.step.seconds)
    if nearest.step.seconds < pick.step.seconds:
        return (
            f"{needs}; {nearest.name} is estimated less than {MARGIN:.0%} faster, less than the error of the estimate; "
            "the simpler one is chosen"
        )
    own, other = format_duration(pick.step.seconds), format_duration(nearest.step.seconds)
    return f"{needs}; estimated {own} a step, {nearest.name} {other}"


def find_shortage(memory: MemoryEstimate, machine: MachineModel, limit: int) -> str | None:
    """The memory that is too small, and by how much; None if all suffice. Memory of unknown size is not checked."""
    if memory.total > limit:
        above = format_bytes(memory.total - limit)
        return f"{format_bytes(memory.total)}, {above} above the limit of {format_bytes(limit)}"
    if machine.host_memory_bytes is not None and memory.host > machine.host_memory_bytes:
        excess = format_bytes(memory.host - machine.host_memory_bytes)
        return f"{format_bytes(memory.host)} of host memory a rank, {excess} too much"
    if machine.nvme_bytes is not None and memory.nvme > machine.nvme_bytes:
        return f"{format_bytes(memory.nvme)} on NVMe a rank, where there is room for {format_bytes(machine.nvme_bytes)}"
    return None


def with_reason(assessed: Assessment, pick: Assessment | None, machine: MachineModel, limit: int) -> Assessment:
    """The assessment with a reason, unless it has one."""
    if assessed.reason:
        return assessed
    if pick is not None and assessed.name == pick.name:
        reason = "taken"
    elif not assessed.fits:
        reason = f"does not fit: {find_shortage(assessed.memory, machine, limit)}"
    else:
        reason = f"fits; estimated {format_duration(assessed.step.seconds)} a step"
        if pick is not None and assessed.step.seconds >= pick.step.seconds:
            reason += f", not faster than {pick.name}"
    return replace(assessed, reason=reason)


def describe_alternatives(
    assessed: Sequence[Assessment],
    profile: ModelProfile,
    machine: MachineModel,
    precision: Precision,
    limit: int,
    settings: ZeroSettings,
) -> str:
    """A text with the excess over the limit, and the changes that would make the model fit."""
    able = [a for a in assessed if a.eligible]
    least = min(able or assessed, key=lambda a: a.memory.total)
    parts = least.memory
    text = (
        f"no strategy fits: {least.name} needs least, {format_bytes(parts.total)} with a micro batch of "
        f"{least.micro_batch_size}, {format_bytes(parts.total - limit)} more than the limit of {format_bytes(limit)}"
    )
    on_device = parts.total > limit
    if not on_device:
        text = f"no strategy fits: {least.name} needs least of the device, but {find_shortage(parts, machine, limit)}"
    ideas: list[str] = []
    ranks = max(machine.world_size, 1)
    while ranks < _MOST_RANKS and precision is not Precision.FP64_TRUE and machine.device_kind == "cuda":
        ranks *= 2
        trace = at_batch_size(*profile.sharded, 1)
        needed = estimate_memory(profile.model, trace, ZERO_3, ranks, precision, settings=settings)
        if needed.total <= limit:
            ideas.append(f"{ranks} ranks with {ZERO_3.name} and a micro batch of 1 ({format_bytes(needed.total)})")
            break
    if parts.activations > parts.total // 2:
        ideas.append("activation checkpointing in the module, or shorter samples: activations are the largest part")
    if not on_device:
        ideas.append("nodes with more memory, or more room on NVMe")
    else:
        ideas.append(f"a device of {format_bytes(int(parts.total * machine.memory_bytes / max(limit, 1)))}")
    return f"{text}; what would do: {'; '.join(ideas)}"
