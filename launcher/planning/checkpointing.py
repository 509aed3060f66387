"""Decides on activation checkpointing: with `auto` only where the model does not fit without it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from strategies.batch import BatchSplit
from strategies.comparison import Comparison, compare_strategies
from strategies.machine import MachineModel
from strategies.options import ComparisonOptions
from strategies.precision import Precision
from strategies.step_trace import ModelProfile
from strategies.units import format_bytes


@dataclass(frozen=True, slots=True)
class ComparisonInputs:
    """The inputs of a comparison; see `compare_strategies`."""

    profile: ModelProfile
    machine: MachineModel
    precision: Precision
    splits: Sequence[BatchSplit]
    options: ComparisonOptions

    def compare(self) -> Comparison:
        """All candidates."""
        return compare_strategies(self.profile, self.machine, self.precision, self.splits, self.options)

    def checkpointed(self) -> ComparisonInputs | None:
        """The same with activation checkpointing; None if it is on, is not known, or frees nothing."""
        again = None if self.profile.checkpointed is None else self.profile.checkpointed()
        if again is None or again.plain[1].backward >= self.profile.plain[1].backward:
            return None
        sharding = dataclasses.replace(self.options.sharding, checkpoint_activations=True)
        return dataclasses.replace(self, profile=again, options=dataclasses.replace(self.options, sharding=sharding))

    def describe_saving(self, checkpointed: ComparisonInputs, name: str) -> str:
        """What activation checkpointing saves with a strategy, and what it costs."""
        own = checkpointed.compare().of(name)
        if own is None:
            return "the blocks' forward passes are computed twice"
        split = BatchSplit(self.machine.world_size, own.micro_batch_size, own.accumulate)
        without = dataclasses.replace(self, splits=[split]).compare().of(name)
        saved = 0 if without is None else without.memory.total - own.memory.total
        more = checkpointed.profile.plain[1].flops / max(self.profile.plain[1].flops, 1) - 1
        return f"saves {format_bytes(saved)}, and computes the blocks' forward pass once more ({more:+.0%} operations)"


@dataclass(frozen=True, slots=True)
class CheckpointedChoice:
    """A comparison, and whether it has activation checkpointing.

    Attributes:
        inputs: of the comparison.
        reasons: why activation checkpointing is on; empty if it is off.
    """

    inputs: ComparisonInputs
    found: Comparison
    reasons: tuple[str, ...] = ()


def compare_checkpointed(inputs: ComparisonInputs, name: str | None, *, may_checkpoint: bool) -> CheckpointedChoice:
    """Compare without activation checkpointing, and with it if nothing fits.

    Args:
        inputs: without it, unless the config requests it.
        name: the requested strategy, which then has to fit; None for `auto`.
        may_checkpoint: the config leaves the decision to the plan.
    """
    found = inputs.compare()
    own = None if name is None else found.of(name)
    fits = found.pick is not None if name is None else own is None or own.fits
    again = None if fits or not may_checkpoint else inputs.checkpointed()
    if again is None:
        return CheckpointedChoice(inputs, found)
    instead = again.compare()
    shown = name or instead.pick
    reasons = [] if shown is None else [inputs.describe_saving(again, shown)]
    reason = "; ".join([f"{name or 'nothing'} {'does not fit' if name else 'fits'} without it", *reasons])
    return CheckpointedChoice(again, instead, (reason,))
