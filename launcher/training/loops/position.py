"""The place of a training in its data: the one record that a resume uses."""

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
        epoch: the current epoch, from 0.
        batches: batches of this epoch that a rank has trained.
        stage: what follows the last of these batches. `between`: the next batch, or the end of the epoch after the
            last one. `batch_end`: the end of the batch, including a validation that is due. `validated`: the same,
            but the validation has run. `epoch_end`: the end of the epoch has run, except for schedulers that follow a
            metric.
        last: whether the last of these batches ended the epoch.
        total: batches that a rank has trained in all epochs.
        accumulate: micro batches per optimizer step in this epoch.
        planned_accumulate: the planned value of `accumulate`, which a callback may have changed.
        world_size: number of ranks.
        batch_sizes: micro batch size of each loader; None if the loader does not have one.
        validated_batches: no validation is due up to this batch of the epoch; set by `rewind_position` only.
        cut: the Trainer ended the epoch before its last batch, or was about to.
        validated_to_stop: a validation has run after the last batch only because the Trainer should stop.
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
        """Whether the epoch has started and its end has not run."""
        return (self.batches > 0 or self.validated_batches > 0) and self.stage != "epoch_end"

    def to_dict(self) -> dict[str, Any]:
        """The record as plain values."""
        return {**dataclasses.asdict(self), "batch_sizes": list(self.batch_sizes)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Position:
        """The inverse of `to_dict`."""
        return cls(**{**values, "batch_sizes": tuple(values["batch_sizes"])})


def read_position(
    epochs: Mapping[str, int], batches: Mapping[str, int], total: int, *, last: bool, stage: Stage | None, **more: Any
) -> Position:
    """The position according to Lightning's counters.

    A resume continues an epoch that the Trainer ended before its last batch (`max_steps`, `should_stop`, `max_time`).

    Args:
        epochs: the fit loop's counters of epochs: ready, started, processed, completed.
        batches: the epoch loop's counters of this epoch's batches.
        total: batches trained in all epochs.
        last: whether the last batch ended its epoch.
        stage: see `Position`; None derives it from the counters.
        more: further fields of `Position`.
    """
    trained = batches["processed"]
    if epochs["started"] > epochs["processed"]:
        if stage is None:
            # Plain Lightning wrote the checkpoint: after a validation, unless the batch has not ended.
            stage = "batch_end" if trained > batches["completed"] else "validated"
        return Position(epochs["processed"], trained, stage, last, total, **more)
    finished = last or trained == 0
    if epochs["ready"] > epochs["processed"] or (finished and epochs["completed"] == epochs["processed"]):
        return Position(epochs["processed"], 0, total=total, **more)
    ended = epochs["processed"] - 1
    if not finished:
        return Position(ended, trained, "between", False, total, **{**more, "cut": True})
    return Position(ended, trained, "epoch_end", True, total, **more)


def rewind_position(position: Position) -> Position:
    """The last point between two optimizer steps: checkpoints do not contain accumulated gradients."""
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


def scale_position(
    position: Position, world_size: int, planned_accumulate: int, batch_sizes: Sequence[int | None]
) -> Position:
    """The same point for another number of ranks or another batch size, by the number of samples of all ranks.

    If that is not between two optimizer steps of this run, the nearest such point before it is taken. A checkpoint of
    plain Lightning does not contain its number of ranks and batch size; they are taken from this run.
    """
    if not position.batch_sizes:
        position = dataclasses.replace(position, world_size=world_size)
    ratios = {
        Fraction(position.world_size * (old or 1), world_size * (new or 1))
        if old is not None and new is not None
        else Fraction(position.world_size, world_size)
        for old, new in zip(position.batch_sizes or (None,), batch_sizes or (None,), strict=False)
    }
    # A value that a callback has set does not depend on the number of ranks.
    is_changed = position.accumulate != position.planned_accumulate
    accumulate = position.accumulate if is_changed else planned_accumulate
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
    is_exact = batches == position.batches * ratio
    return dataclasses.replace(
        now,
        batches=batches,
        total=int(before * ratio) + batches,
        stage=position.stage if is_exact or position.last else "between",
        validated_batches=0,
    )


def describe_changes(saved: Position, now: Position) -> list[str]:
    """Describe what a resume at `now` does differently from a run that continues at `saved`."""
    found: list[str] = []
    if saved.in_epoch and not saved.last:
        if saved.world_size == now.world_size and now.batches < saved.batches:
            found.append(
                f"the checkpoint was saved while gradients were accumulated: its last {saved.batches - now.batches} "
                "batches are trained again, with other random numbers"
            )
        elif not saved.batch_sizes:
            pass  # a checkpoint of plain Lightning, which does not contain them
        elif len(saved.batch_sizes) != len(now.batch_sizes):
            found.append(f"the checkpoint had {len(saved.batch_sizes)} training loaders and this run has "
                         f"{len(now.batch_sizes)}: the epoch continues with other samples")  # fmt: skip
        elif (had := _samples(saved, now)) != (has := _samples(now, saved)):
            found.append(f"{had} samples of the epoch were trained, which is not a multiple of this run's "
                         f"steps: the epoch continues after {has} samples")  # fmt: skip
    return found


def _samples(position: Position, other: Position) -> tuple[int, ...] | int:
    """Samples of all ranks for each loader; batches where one of the two has no batch size."""
    sizes = [size if size is not None and other_size is not None else 1
             for size, other_size in zip(position.batch_sizes, other.batch_sizes, strict=False)]  # fmt: skip
    counts = tuple(position.batches * position.world_size * size for size in sizes)
    return counts[0] if len(set(counts)) == 1 else counts
