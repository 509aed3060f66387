"""The position of a training in its data: the only record that a resume uses for it."""

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
        epoch: from 0.
        batches: batches of this epoch that a rank has trained.
        stage: the work that follows the last of these batches. `between`: the next batch, or the end of the epoch.
            `batch_end`: the end of the batch, including a validation that is due. `validated`: the same, but the
            validation has run. `epoch_end`: only schedulers that follow a metric.
        last: whether the last of these batches ended the epoch.
        total: batches that a rank has trained in all epochs.
        accumulate: micro batches per optimizer step in this epoch; a callback may have changed the planned value.
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
    """The position according to Lightning's counters: ready, started, processed, completed.

    A resume continues an epoch that the Trainer ended before its last batch (`max_steps`, `should_stop`, `max_time`).

    `epochs` are the counters of the fit loop, `batches` those of this epoch's batches; the others are fields of
    `Position`. If `stage` is None, it is derived from the counters.
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
    pairs = zip(position.batch_sizes or (None,), batch_sizes or (None,), strict=False)
    # Without the batch size of both runs, only the numbers of ranks are compared.
    known = [(old or 1, new or 1) if old is not None and new is not None else (1, 1) for old, new in pairs]
    ratio = min(Fraction(position.world_size * old, world_size * new) for old, new in known)
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


def describe_change(saved: Position, now: Position) -> str | None:
    """Describe how a resume at `now` differs from a run that continues at `saved`; None if it does not."""
    if not saved.in_epoch or saved.last:
        return None
    if saved.world_size == now.world_size and now.batches < saved.batches:
        return (
            f"the checkpoint was saved while gradients were accumulated: its last {saved.batches - now.batches} "
            "batches are trained again, with other random numbers"
        )
    if not saved.batch_sizes:
        return None  # a checkpoint of plain Lightning, which does not contain them
    if len(saved.batch_sizes) != len(now.batch_sizes):
        return (f"the checkpoint had {len(saved.batch_sizes)} training loaders and this run has "
                f"{len(now.batch_sizes)}: the epoch continues with other samples")  # fmt: skip
    if (had := _samples(saved, now)) != (has := _samples(now, saved)):
        return (f"{had} samples of the epoch were trained, which is not a multiple of this run's steps: the epoch "
                f"continues after {has} samples")  # fmt: skip
    return None


def _samples(position: Position, other: Position) -> tuple[int, ...] | int:
    """Samples of all ranks for each loader; batches if one of the two positions has no batch size."""
    sizes = [size if size is not None and other_size is not None else 1
             for size, other_size in zip(position.batch_sizes, other.batch_sizes, strict=False)]  # fmt: skip
    counts = tuple(position.batches * position.world_size * size for size in sizes)
    return counts[0] if len(set(counts)) == 1 else counts
