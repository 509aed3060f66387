"""One candidate's memory and time on the given ranks, and the reasons why it was or was not chosen. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from strategies.machine import MachineModel
from strategies.memory import MemoryEstimate
from strategies.registry import find_requested
from strategies.step_time import STEP_FLOOR, StepTime
from strategies.units import format_bytes, format_duration

# A later candidate must be estimated this much faster than a simpler one: smaller differences are below the error.
MARGIN = 0.1
# Candidates that differ by less are equally fast: then the one with more room is chosen, if it needs noticeably less.
TIE = 0.02
_NOTICEABLE = 0.05  # of the device's memory
_MUCH_SLOWER = 1.2  # times the chosen one's time


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
        ranks: how many ranks work on a step.
    """

    name: str
    memory: MemoryEstimate
    step: StepTime
    micro_batch_size: int
    accumulate: int
    eligible: bool
    fits: bool
    reason: str
    ranks: int = 1

    @property
    def samples(self) -> int:
        """Samples of an optimizer step."""
        return self.micro_batch_size * self.accumulate * self.ranks

    @property
    def seconds_per_sample(self) -> float:
        """Estimated seconds for each sample of a step: comparable also if a step has other samples."""
        return self.step.seconds / self.samples

    @property
    def can_train(self) -> bool:
        """Whether these ranks can run it, and it fits."""
        return self.eligible and self.fits


def choose_simplest(able: Sequence[Assessment], machine: MachineModel) -> Assessment | None:
    """The fastest; a later one only if it is faster by the margin.

    On a CPU, of which no times are known, it is the first; only variants of FSDP2, which send different amounts, are
    compared with each other.
    """
    if not able:
        return None
    best = able[0]
    later = [a for a in able[1:] if machine.device_kind != "cpu" or (_is_variant(best) and _is_variant(a))]
    for other in later:
        if other.seconds_per_sample < best.seconds_per_sample * (1 - MARGIN):
            best = other
    return best


def _is_variant(assessed: Assessment) -> bool:
    """Whether it shards without DeepSpeed."""
    entry = find_requested(assessed.name)
    return entry is not None and entry.is_sharded and not entry.needs_deepspeed


def choose_next(able: Sequence[Assessment], machine: MachineModel) -> Assessment | None:
    """The choice among those that need less than one that ran out of memory; on a CPU the first."""
    return choose_fastest(able[:1] if machine.device_kind == "cpu" else able, machine)


def choose_fastest(able: Sequence[Assessment], machine: MachineModel) -> Assessment | None:
    """The simplest of the fastest, or the first that is as fast and needs noticeably less memory of the device."""
    simplest = choose_simplest(able, machine)
    if simplest is None or machine.device_kind == "cpu":
        return simplest
    chosen = simplest
    for other in able:
        most = chosen.memory.total - _NOTICEABLE * machine.memory_bytes
        # Memory that moves to the host or to NVMe is not saved.
        keeps = (other.memory.host, other.memory.nvme) <= (simplest.memory.host, simplest.memory.nvme)
        if is_tie(other, simplest) and other.memory.total <= most and keeps:
            chosen = other
    return chosen


def describe_speed(assessed: Assessment) -> str:
    """'8.63 ms a sample'; at least the share of a sample in the shortest step that Lightning can run."""
    if assessed.step.seconds < STEP_FLOOR:
        return f"less than {format_duration(STEP_FLOOR / assessed.samples)} a sample"
    return f"{format_duration(assessed.seconds_per_sample)} a sample"


def explain_pick(pick: Assessment, assessed: Sequence[Assessment], machine: MachineModel) -> str:
    """The reason for the pick among all candidates."""
    needs = f"needs {format_bytes(pick.memory.total)} of {format_bytes(machine.memory_bytes)}"
    able = [a for a in assessed if a.can_train]
    if len(able) == 1:
        if any(a.eligible for a in assessed if a is not pick):
            return f"{needs}; nothing else fits"
        return needs if machine.world_size == 1 else f"{needs}; no other strategy can run here"
    if machine.device_kind == "cpu" and pick is able[0]:
        return f"{needs}; the simplest that fits: on a CPU times are not compared"
    simplest = choose_simplest(able, machine)
    if simplest is not None and simplest is not pick:
        saved = format_bytes(simplest.memory.total - pick.memory.total)
        return f"{needs}; as fast as {simplest.name} ({_WITHIN}), and needs {saved} less"
    nearest = min((a for a in able if a is not pick), key=lambda a: a.seconds_per_sample)
    if is_tie(nearest, pick):
        return f"{needs}; {nearest.name} is as fast ({_WITHIN}), but {_compare_memory(nearest, pick)}"
    if nearest.seconds_per_sample < pick.seconds_per_sample:
        return (
            f"{needs}; {nearest.name} is estimated less than {MARGIN:.0%} faster, less than the error of the estimate; "
            "the simpler one is chosen"
        )
    return f"{needs}; estimated {describe_speed(pick)}, {nearest.name} {describe_speed(nearest)}"


def _compare_memory(other: Assessment, pick: Assessment) -> str:
    """How the memory of one that is as fast as the pick differs, so that it was not chosen."""
    difference = other.memory.total - pick.memory.total
    moved = other.memory.host + other.memory.nvme - pick.memory.host - pick.memory.nvme
    if difference >= 0:
        return f"needs {format_bytes(difference)} more" if difference else "needs as much memory"
    if moved > 0:
        return f"needs {format_bytes(moved)} outside of the device"
    return f"needs only {format_bytes(-difference)} less"


def is_tie(one: Assessment, other: Assessment) -> bool:
    """Whether two candidates are about equally fast."""
    return abs(one.seconds_per_sample - other.seconds_per_sample) <= TIE * other.seconds_per_sample


_WITHIN = f"within {TIE:.0%}"


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
        reason = "chosen"
    elif not assessed.fits:
        reason = f"does not fit: {find_shortage(assessed.memory, machine, limit)}"
    elif pick is not None and machine.device_kind != "cpu" and is_tie(assessed, pick):
        reason = f"fits; as fast as {pick.name} ({_WITHIN})"
        if assessed.memory.total > pick.memory.total:
            reason += f", but needs {format_bytes(assessed.memory.total - pick.memory.total)} more"
    else:
        reason = f"fits; estimated {describe_speed(assessed)}"
        # Times of CPUs are not compared.
        if pick is not None and machine.device_kind != "cpu":
            ratio = assessed.seconds_per_sample / max(pick.seconds_per_sample, STEP_FLOOR / pick.samples)
            if ratio >= _MUCH_SLOWER:
                reason += f", {ratio:.{0 if ratio > 9 else 1}f} times as long as {pick.name}"
            elif ratio >= 1:
                reason += f", slower than {pick.name}"
    return replace(assessed, reason=reason)
