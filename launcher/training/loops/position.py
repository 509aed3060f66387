"""Where a training is in its data: the one record that a resume goes by."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

KEY = "launcher_position"

Stage = Literal["between", "batch_end", "validated", "epoch_end"]


@dataclass(frozen=True, slots=True)
class Position:
    """A point between two batches of a training.

    Attributes:
        epoch: the epoch that the training is in, from 0.
        batches: of this epoch, that a rank has trained.
        stage: what follows the last of them. `between`: the next batch, or the end of the epoch after the last one.
            `batch_end`: what ends a batch, the validation that is due included. `validated`: the same, but the
            validation has run. `epoch_end`: the end of the epoch has run up to the schedulers that follow a metric.
        last: whether the last of the batches ended the epoch.
        total: batches that a rank has trained in all epochs.
        accumulate: batches that made an optimizer step in this epoch.
        planned_accumulate: the same, as planned: a callback may have changed it.
        world_size: number of ranks.
        batch_sizes: samples that a rank took at once, of each loader; None where a loader does not say.
        validated_batches: of this epoch, up to which no validation is due; only after `rewound`.
        cut: the Trainer ended the epoch before its last batch, or was about to.
        validated_to_stop: a validation has run after the last batch only because the Trainer was told to stop.
    """

    epoch: int
    batches: int
    stage: Stage = "between"
    last: bool = False
    total: int = 0
    accumulate: int = 1
    planned_accumulate: int = 1
    world_size: int = 1
    batch_sizes: tuple[int | None, ...] = ()
    validated_batches: int = 0
    cut: bool = False
    validated_to_stop: bool = False

    @property
    def in_epoch(self) -> bool:
        """Whether the epoch has begun and its end has not run."""
        return (self.batches > 0 or self.validated_batches > 0) and self.stage != "epoch_end"

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {**dataclasses.asdict(self), "batch_sizes": list(self.batch_sizes)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Position:
        """The inverse of `to_dict`."""
        return cls(**{**values, "batch_sizes": tuple(values["batch_sizes"])})


def read_position(
    epochs: Mapping[str, int], batches: Mapping[str, int], total: int, *, last: bool, stage: Stage | None, **more: Any
) -> Position:
    """The position that Lightning's counters say.

    An epoch that the Trainer ended before its last batch (`max_steps`, `should_stop`, `max_time`) is gone on with.

    Args:
        epochs: the fit loop's count of epochs: ready, started, processed, completed.
        batches: the epoch loop's count of this epoch's batches.
        total: trained batches of all epochs.
        last: whether the last batch ended its epoch.
        stage: what is known beyond the counters; None derives it from them.
        more: further fields of `Position`.
    """
    trained = batches["processed"]
    if epochs["started"] > epochs["processed"]:
        if stage is None:
            # Of a checkpoint that plain Lightning wrote: after a validation, unless it was before the batch's end.
            stage = "batch_end" if trained > batches["completed"] else "validated"
        return Position(epochs["processed"], trained, stage, last, total, **more)
    finished = last or trained == 0
    if epochs["ready"] > epochs["processed"] or (finished and epochs["completed"] == epochs["processed"]):
        return Position(epochs["processed"], 0, total=total, **more)
    ended = epochs["processed"] - 1
    if not finished:
        return Position(ended, trained, "between", False, total, **{**more, "cut": True})
    return Position(ended, trained, "epoch_end", True, total, **more)


def rewound(position: Position) -> Position:
    """The last point at which no gradients were being accumulated, which no checkpoint holds."""
    over = position.batches % position.accumulate
    if not over or position.last or not position.in_epoch:
        return position
    validated = position.batches - (1 if position.stage == "batch_end" else 0)
    return dataclasses.replace(
        position,
        batches=position.batches - over,
        total=position.total - over,
        stage="between",
        validated_batches=validated,
    )


def moved(position: Position, world_size: int, planned_accumulate: int, batch_sizes: Sequence[int | None]) -> Position:
    """The same point for another number of ranks or another batch: the count of the samples of all ranks is kept.

    Where it is no point between two optimizer steps of this run, it is the nearest one before. A checkpoint that plain
    Lightning wrote does not say its ranks and batch: they are this run's.
    """
    if not position.batch_sizes:
        position = dataclasses.replace(position, world_size=world_size)
    ratios = {
        Fraction(position.world_size * (old or 1), world_size * (new or 1))
        if old is not None and new is not None
        else Fraction(position.world_size, world_size)
        for old, new in zip(position.batch_sizes or (None,), batch_sizes or (None,), strict=False)
    }
    # A callback's number of batches a step is its own, on any number of ranks.
    changed = position.accumulate != position.planned_accumulate
    accumulate = position.accumulate if changed else planned_accumulate
    now = dataclasses.replace(
        position,
        accumulate=accumulate,
        planned_accumulate=planned_accumulate,
        world_size=world_size,
        batch_sizes=tuple(batch_sizes),
    )
    ratio = min(ratios)
    if ratio == 1 or not position.in_epoch:
        return now if ratio == 1 else dataclasses.replace(now, total=int(position.total * ratio))
    batches = int(position.batches * ratio)
    if not position.last:
        batches -= batches % accumulate
    before = position.total - position.batches
    exact = batches == position.batches * ratio
    return dataclasses.replace(
        now,
        batches=batches,
        total=int(before * ratio) + batches,
        stage=position.stage if exact or position.last else "between",
        validated_batches=0,
    )


def changes_of(saved: Position, now: Position) -> list[str]:
    """What a resume at `now` cannot repeat of a run that went on from `saved`, in words for the user."""
    found: list[str] = []
    if saved.in_epoch and not saved.last:
        if saved.world_size == now.world_size and now.batches < saved.batches:
            found.append(
                f"the checkpoint was saved between two optimizer steps; its last {saved.batches - now.batches} "
                "batches are trained again, with other random draws"
            )
        elif not saved.batch_sizes:
            pass  # plain Lightning's, which does not say them
        elif len(saved.batch_sizes) != len(now.batch_sizes):
            found.append(f"the checkpoint had {len(saved.batch_sizes)} training loaders, now there are "
                         f"{len(now.batch_sizes)}: the epoch goes on with other samples")  # fmt: skip
        elif (had := _samples(saved, now)) != (has := _samples(now, saved)):
            found.append(f"{had} samples of the epoch were trained, no whole number of this run's steps: "
                         f"it goes on after {has}")  # fmt: skip
    return found


def _samples(position: Position, other: Position) -> tuple[int, ...] | int:
    """Of all ranks; of a loader that does not say its batch in both, the batches."""
    sizes = [own if own is not None and theirs is not None else 1
             for own, theirs in zip(position.batch_sizes, other.batch_sizes, strict=False)]  # fmt: skip
    counts = tuple(position.batches * position.world_size * size for size in sizes)
    return counts[0] if len(set(counts)) == 1 else counts
