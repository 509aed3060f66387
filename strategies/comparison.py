"""Every strategy's memory, traffic and time on the ranks at hand, and the fastest that fits. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from strategies.assessment import MARGIN, Assessment, alternatives_for, reason_for, shortage, with_reason
from strategies.batch import BatchSplit
from strategies.candidates import CANDIDATES, Candidate
from strategies.deepspeed_config import NOT_BY_ELEMENT
from strategies.memory import MemoryEstimate, Method, estimate_memory, state_types
from strategies.model_states import ZeroSettings
from strategies.precision import Precision
from strategies.step_time import MachineModel, step_time
from strategies.step_trace import ModelProfile, at_batch_size


@dataclass(frozen=True, slots=True)
class Comparison:
    """All candidates, and which was taken.

    Attributes:
        assessments: in the order of `CANDIDATES`.
        pick: the name of the fastest that fits; None if none does.
        why: the reason for it, or by how much nothing fits and what would do.
        next: the candidate to go on with if the pick runs out of memory; None if there is none.
        limit_bytes: bytes that a rank may use.
        memory_bytes: bytes that its device has.
        method: how activations were found.
        notes: what the user should know of the numbers.
        machine: the ranks that they were estimated for.
        next_obstacle: what keeps the config from the candidate that would be next, and what to change; None if nothing.
    """

    assessments: tuple[Assessment, ...]
    pick: str | None
    why: str
    next: str | None
    limit_bytes: int
    memory_bytes: int
    method: str
    notes: tuple[str, ...]
    machine: MachineModel
    next_obstacle: str | None = None

    def of(self, name: str) -> Assessment | None:
        """The assessment of that name."""
        return next((a for a in self.assessments if a.name == name), None)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values; totals are added for readers."""
        values = cast("dict[str, Any]", _plain(asdict(self)))
        for entry, assessed in zip(values["assessments"], self.assessments, strict=True):
            entry["memory"]["total"] = assessed.memory.total
            entry["step"]["seconds"] = assessed.step.seconds
        return values


def compare_strategies(
    profile: ModelProfile,
    machine: MachineModel,
    precision: Precision,
    splits: Sequence[BatchSplit],
    *,
    memory_share: float = 0.92,
    settings: ZeroSettings = ZeroSettings(),  # noqa: B008 -- frozen
    obstacles: Mapping[str, str] = {},
) -> Comparison:
    """Assess every candidate and pick the fastest that fits.

    Args:
        profile: of the user's module.
        machine: the ranks.
        precision: what was agreed on.
        splits: ways to share the global batch, the largest micro batch first; at least one.
        memory_share: share of the device's memory that a rank may use, in (0, 1].
        settings: DeepSpeed's buckets.
        obstacles: name of a candidate to why these ranks cannot run it, beyond what is seen here.
    """
    limit = int(machine.memory_bytes * memory_share)
    first = [
        _assess(
            candidate,
            profile,
            machine,
            precision,
            splits,
            limit,
            settings,
            _obstacle(candidate, profile, machine, precision) or obstacles.get(candidate.name),
        )
        for candidate in CANDIDATES
    ]
    able = [a for a in first if a.eligible and a.fits]
    pick = _fastest(able, machine)
    assessed = tuple(with_reason(a, pick, machine, limit) for a in first)
    if pick is None:
        why = alternatives_for(first, profile, machine, precision, limit, settings)
    else:
        why = reason_for(pick, able, machine)
    return Comparison(
        assessed,
        None if pick is None else pick.name,
        why,
        None if pick is None else next_after(pick.name, assessed, machine),
        limit,
        machine.memory_bytes,
        profile.method,
        profile.notes,
        machine,
    )


def next_after(name: str, assessed: Sequence[Assessment], machine: MachineModel) -> str | None:
    """What to go on with where a candidate has run out of memory: the fastest of those that need less on the device.

    Args:
        name: the candidate's; one that was not assessed has nothing after it.
        assessed: all of them.
        machine: the ranks.
    """
    own = next((a for a in assessed if a.name == name), None)
    smaller = [a for a in assessed if own and a.eligible and a.fits and a.memory.total < own.memory.total]
    after = _fastest(smaller, machine)
    return None if after is None else after.name


def _assess(
    candidate: Candidate,
    profile: ModelProfile,
    machine: MachineModel,
    precision: Precision,
    splits: Sequence[BatchSplit],
    limit: int,
    settings: ZeroSettings,
    obstacle: str | None,
) -> Assessment:
    ranks = 1 if candidate.name == "single_device" else machine.world_size
    traces = profile.sharded if candidate.stage else profile.plain
    found: tuple[BatchSplit, MemoryEstimate] | None = None
    fits = False
    for split in splits:
        trace = at_batch_size(*traces, split.micro_batch_size or traces[1].batch_size)
        memory = estimate_memory(
            profile.model,
            trace,
            candidate,
            ranks,
            precision,
            settings=settings,
            accumulate=split.accumulate,
            method=cast("Method", profile.method),
            whole_process=machine.device_kind == "cpu",
        )
        found = split, memory
        fits = shortage(memory, machine, limit) is None
        if fits:
            break
    if found is None:
        raise ValueError("compare_strategies needs at least one way to share the batch, none was given")
    split, memory = found
    micro = split.micro_batch_size or traces[1].batch_size
    step = step_time(
        profile.model,
        at_batch_size(*traces, micro),
        candidate,
        machine,
        parameter_bytes=state_types(candidate, precision).parameter_bytes,
        accumulate=split.accumulate,
        settings=settings,
    )
    return Assessment(candidate.name, memory, step, micro, split.accumulate, obstacle is None, fits, obstacle or "")


def _obstacle(candidate: Candidate, profile: ModelProfile, machine: MachineModel, precision: Precision) -> str | None:
    """Why these ranks cannot run a candidate, whatever its memory."""
    if candidate.name == "single_device":
        return f"there are {machine.world_size} ranks" if machine.world_size > 1 else None
    if machine.device_kind == "mps":
        return "Apple's GPU has no process group backend"
    if candidate.stage == 0:
        return "with one rank it only adds the cost of its buckets" if machine.world_size == 1 else None
    if precision is Precision.FP64_TRUE:
        return "DeepSpeed does not train in 64-true"
    if profile.zero_obstacle is not None:
        return profile.zero_obstacle
    optimizer = profile.model.optimizer.name
    if optimizer in NOT_BY_ELEMENT:
        return f"ZeRO does not take {optimizer}, which {NOT_BY_ELEMENT[optimizer]}"
    if candidate.offload and machine.device_kind == "cpu":
        return "a CPU's memory is the host's: there is nowhere to offload to"
    if candidate.offload is None and machine.world_size == 1:
        return "one rank has nobody to share states with"
    return None


def _fastest(able: Sequence[Assessment], machine: MachineModel) -> Assessment | None:
    """The fastest; a later one only if it is faster by the margin. On a CPU the first, where ZeRO is for debugging."""
    if not able:
        return None
    best = able[0]
    if machine.device_kind == "cpu":
        return best
    for other in able[1:]:
        if other.step.seconds < best.step.seconds * (1 - MARGIN):
            best = other
    return best


def _plain(value: Any) -> Any:
    """Tuples as lists, as JSON has them."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in cast("dict[str, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in cast("list[Any]", value)]
    return value
