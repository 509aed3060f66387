"""What would make a model fit if no strategy does. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

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
    search = _Search(profile, precision, options)
    names = {a.name for a in able}
    ideas = [*search.find_micro_batch(machine, names, least.micro_batch_size), *search.find_ranks(machine)]
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


@dataclass(frozen=True, slots=True)
class _Search:
    """Looks for a smaller micro batch, or more ranks, with which a strategy without offload fits."""

    profile: ModelProfile
    precision: Precision
    options: ComparisonOptions

    def find_micro_batch(self, machine: MachineModel, names: Collection[str], size: int) -> list[str]:
        """The largest half, quarter and so on of a micro batch with which one of these candidates fits."""
        entries = [entry for entry in list_candidates() if entry.name in names and entry.offload is None]
        while (size := size // 2) >= 1:
            for entry in entries:
                needed = self._needed(entry, machine, size)
                if needed is not None:
                    how = "by the data's batch_size or `global_batch_size`"
                    return [f"a micro batch of {size} with {entry.name} ({format_bytes(needed)}), {how}"]
        return []

    def find_ranks(self, machine: MachineModel) -> list[str]:
        """The smallest power of two times as many GPUs with which a strategy that shards the states fits."""
        ranks = max(machine.world_size, 1)
        while machine.device_kind == "cuda" and ranks < _MOST_RANKS:
            ranks *= 2
            more = replace(machine, world_size=ranks, ranks_per_node=min(ranks, max(machine.ranks_per_node, 1)))
            for entry in list_candidates():
                if not entry.is_sharded or entry.offload is not None:
                    continue
                if find_obstacle(entry, self.profile, more, self.precision, self.options):
                    continue
                needed = self._needed(entry, more, 1)
                if needed is not None:
                    return [f"{ranks} ranks with {entry.name} and a micro batch of 1 ({format_bytes(needed)})"]
        return []

    def _needed(self, entry: StrategyEntry, machine: MachineModel, size: int) -> int | None:
        """The memory with a micro batch of this size; None if it does not fit."""
        found = estimate_memory(
            self.profile.model,
            at_batch_size(*entry.traces(self.profile), size),
            entry,
            machine.world_size if entry.needs_process_group else 1,
            self.precision,
            settings=self.options.settings,
            sharding=self.options.sharding_on(machine),
            whole_process=machine.device_kind == "cpu",
        )
        return None if find_shortage(found, machine, self.options.limit(machine)) else found.total


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
