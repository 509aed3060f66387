"""What would make a model fit if no strategy does. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from strategies.assessment import Assessment, find_shortage
from strategies.base import StrategyEntry
from strategies.machine import MachineModel
from strategies.memory import estimate_memory
from strategies.options import ComparisonOptions
from strategies.precision import Precision
from strategies.registry import list_candidates
from strategies.step_trace import ModelProfile, at_batch_size
from strategies.units import format_bytes

_MOST_RANKS = 1 << 17
_IN_MODULE = "activation checkpointing in the module"


def describe_alternatives(
    assessed: Sequence[Assessment],
    profile: ModelProfile,
    machine: MachineModel,
    precision: Precision,
    options: ComparisonOptions,
) -> str:
    """A text with the excess over the limit, and the changes that would make the model fit."""
    limit, is_checkpointed = options.limit(machine), options.sharding.checkpoint_activations
    able = [a for a in assessed if a.eligible]
    least = min(able or assessed, key=lambda a: a.memory.total)
    parts = least.memory
    start = "no strategy fits" + (", even with activation checkpointing" if is_checkpointed else "")
    text = (
        f"{start}: {least.name} needs least, {format_bytes(parts.total)} with a micro batch of "
        f"{least.micro_batch_size}, {format_bytes(parts.total - limit)} more than the limit of {format_bytes(limit)}"
    )
    on_device = parts.total > limit
    if not on_device:
        text = f"{start}: {least.name} needs least of the device, but {find_shortage(parts, machine, limit)}"
    ideas = [] if (ranks := _find_ranks(profile, machine, precision, options)) is None else [ranks]
    if parts.activations > parts.total // 2:
        shorter = "shorter samples: activations are the largest part"
        # Without blocks there is nothing that the launcher can compute again by itself.
        own = (
            "`activation_checkpointing: true`"
            if options.offers_checkpointing and len(profile.model.blocks) > 1
            else "activation checkpointing in the module"
        )
        ideas.append(shorter if is_checkpointed else f"{own}, or {shorter}")
    if not on_device:
        ideas.append("nodes with more memory, or more room on NVMe")
    else:
        ideas.append(f"a device of {format_bytes(int(parts.total * machine.memory_bytes / max(limit, 1)))}")
    return f"{text}; what would do: {'; '.join(ideas)}"


def _find_ranks(
    profile: ModelProfile, machine: MachineModel, precision: Precision, options: ComparisonOptions
) -> str | None:
    """The smallest power of two times as many GPUs on which a strategy that shards the states fits."""
    if machine.device_kind != "cuda":
        return None
    ranks = max(machine.world_size, 1)
    while ranks < _MOST_RANKS:
        ranks *= 2
        more = replace(machine, world_size=ranks, ranks_per_node=min(ranks, max(machine.ranks_per_node, 1)))
        for entry in list_candidates():
            if (
                not entry.is_sharded
                or entry.offload is not None
                or find_obstacle(entry, profile, more, precision, options)
            ):
                continue
            trace = at_batch_size(*entry.traces(profile), 1)
            needed = estimate_memory(
                profile.model,
                trace,
                entry,
                ranks,
                precision,
                settings=options.settings,
                sharding=options.sharding_on(more),
            )
            if needed.total <= options.limit(machine):
                return f"{ranks} ranks with {entry.name} and a micro batch of 1 ({format_bytes(needed.total)})"
    return None


def find_obstacle(
    candidate: StrategyEntry,
    profile: ModelProfile,
    machine: MachineModel,
    precision: Precision,
    options: ComparisonOptions,
) -> str | None:
    """Why these ranks cannot run a candidate, regardless of its memory."""
    if machine.device_kind == "mps" and candidate.needs_process_group:
        return "Apple's GPU has no process group backend"
    return (
        candidate.obstacle(profile, machine, precision)
        or candidate.layout_problem(machine, options.sharding)
        or options.obstacles.get(candidate.name)
    )
