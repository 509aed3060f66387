"""Every strategy's memory, traffic and time on the given ranks, and the fastest that fits. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

from strategies.alternatives import describe_alternatives, find_obstacle
from strategies.assessment import (
    Assessment,
    choose_fastest,
    choose_next,
    explain_pick,
    find_shortage,
    with_reason,
)
from strategies.base import StrategyEntry, TrainingStep
from strategies.batch import BatchSplit
from strategies.machine import MachineModel
from strategies.memory import MemoryEstimate, Method, estimate_memory
from strategies.options import DEFAULT_OPTIONS, ComparisonOptions
from strategies.precision import Precision
from strategies.registry import list_candidates
from strategies.step_time import step_time
from strategies.step_trace import ModelProfile, StepTrace, at_batch_size


@dataclass(frozen=True, slots=True)
class Comparison:
    """All candidates, and which one was chosen.

    Attributes:
        assessments: in the order of `list_candidates()`.
        pick: the name of the fastest that fits; None if none does.
        why: the reason for it; if nothing fits, by how much, and what would.
        next: the candidate to continue with if the pick runs out of memory; None if there is none.
        limit_bytes: bytes that a rank may use.
        method: how activations were found.
        next_obstacle: why the config does not allow the next candidate, and what to change; None if it does.
        next_checkpointed: the next candidate needs less only with activation checkpointing, which is off.
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
    next_checkpointed: bool = False

    def of(self, name: str) -> Assessment | None:
        """The assessment of that name."""
        return next((a for a in self.assessments if a.name == name), None)

    def with_reasons(self, reasons: Mapping[str, str]) -> Comparison:
        """The comparison with other reasons for the candidates of these names."""
        return replace(
            self, assessments=tuple(replace(a, reason=reasons.get(a.name, a.reason)) for a in self.assessments)
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with totals added for readers."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        for entry, assessed in zip(values["assessments"], self.assessments, strict=True):
            entry["memory"]["total"] = assessed.memory.total
            entry["step"]["seconds"] = assessed.step.seconds
            entry["step"]["seconds_per_sample"] = assessed.seconds_per_sample
            entry["step"]["bytes_inside_nodes"] = assessed.step.bytes_inside_nodes
            entry["samples"] = assessed.samples
        return values


def compare_strategies(
    profile: ModelProfile,
    machine: MachineModel,
    precision: Precision,
    splits: Sequence[BatchSplit],
    options: ComparisonOptions = DEFAULT_OPTIONS,
) -> Comparison:
    """Assess every candidate and pick the fastest that fits.

    `splits` are ways to share the global batch, the largest micro batch first; at least one.
    """
    limit = options.limit(machine)
    run = _Run(profile, machine, precision, splits, limit, options)
    first = [
        _assess(candidate, run, find_obstacle(candidate, profile, machine, precision, options))
        for candidate in list_candidates()
    ]
    pick = choose_fastest([a for a in first if a.can_train], machine)
    assessed = tuple(with_reason(a, pick, machine, limit) for a in first)
    if pick is None:
        why = describe_alternatives(first, profile, machine, precision, options)
    else:
        why = explain_pick(pick, first, machine)
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
    """The fastest candidate that needs less than `name`, which ran out of memory; None if `name` was not assessed."""
    own = next((a for a in assessed if a.name == name), None)
    after = choose_next([a for a in assessed if own and a.can_train and a.memory.total < own.memory.total], machine)
    return None if after is None else after.name


@dataclass(frozen=True, slots=True)
class _Run:
    """The inputs of every assessment; see `compare_strategies`."""

    profile: ModelProfile
    machine: MachineModel
    precision: Precision
    splits: Sequence[BatchSplit]
    limit: int
    options: ComparisonOptions


def _assess(candidate: StrategyEntry, run: _Run, obstacle: str | None) -> Assessment:
    model, machine = run.profile.model, run.machine
    ranks = machine.world_size if candidate.needs_process_group else 1
    traces, sharding = candidate.traces(run.profile), run.options.sharding_on(machine)
    found: tuple[BatchSplit, StepTrace, MemoryEstimate] | None = None
    fits = False
    for split in run.splits:
        trace = at_batch_size(*traces, split.micro_batch_size or traces[1].batch_size)
        memory = estimate_memory(
            model,
            trace,
            candidate,
            ranks,
            run.precision,
            settings=run.options.settings,
            sharding=sharding,
            accumulate=split.accumulate,
            method=cast("Method", run.profile.method),
            whole_process=machine.device_kind == "cpu",
        )
        found = split, trace, memory
        fits = find_shortage(memory, machine, run.limit) is None
        if fits:
            break
    if found is None:
        raise ValueError("compare_strategies needs at least one way to share the batch, none was given")
    split, trace, memory = found
    types = candidate.state_types(run.precision)
    step = TrainingStep(
        model, trace, machine.world_size, types, split.accumulate, run.options.settings, sharding=sharding
    )
    time, micro = step_time(candidate, step, machine), trace.batch_size
    return Assessment(
        candidate.name, memory, time, micro, split.accumulate, obstacle is None, fits, obstacle or "", ranks
    )
