"""The sample that a rank sends at each logging interval, and its packed vector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Fields of the vector, in order; -1 means that the rank does not count it, as no field is ever negative.
FIELDS: tuple[str, ...] = (
    "has_scale",
    "scale",
    "skipped_steps",
    "growth_tracker",
    "floor_steps",
    "loss_not_finite",
    "step_seconds",
    "data_seconds",
    "own_seconds",
    "peak_memory",
    "samples",
    "tokens",
)
ABSENT = -1.0


@dataclass(frozen=True, slots=True)
class RankSample:
    """One rank over the steps since its last sample.

    Attributes:
        rank: global rank.
        scale: its loss scale; None if nothing scales the loss, or if the scale could not be read.
        samples: mean number of samples of an optimizer step; None if the batch has no tensor.
        tokens: the same of tokens; None if no part of the batch is known to be a sequence.
        scale_unknown: whether there may be a scale that could not be read.
        skipped_steps: optimizer steps skipped since the training began; None if not counted.
        growth_tracker: steps since the scale last changed; None if not counted.
        floor_steps: steps in a row with the scale at its floor; None if not counted.
        loss_not_finite: whether the last step's loss was infinite or NaN.
        step_seconds: mean wall time of an optimizer step.
        data_seconds: mean time that an optimizer step waited for its batches.
        own_seconds: mean time of an optimizer step without waiting for other ranks: data and forward pass. In the
            backward pass the ranks wait for each other, so a complete step takes equally long on all of them.
        peak_memory: peak bytes allocated on the device so far; the process's resident memory on a CPU.
    """

    rank: int
    scale: float | None = None
    skipped_steps: int | None = None
    growth_tracker: int | None = None
    floor_steps: int | None = None
    loss_not_finite: bool = False
    step_seconds: float = 0.0
    data_seconds: float = 0.0
    own_seconds: float = 0.0
    peak_memory: int = 0
    scale_unknown: bool = False
    samples: float | None = None
    tokens: float | None = None


def unpack_sample(rank: int, vector: Sequence[float]) -> RankSample:
    """Unpack one rank's vector, which has one number for each of `FIELDS`."""
    values = dict(zip(FIELDS, vector, strict=True))

    def count(name: str) -> int | None:
        return None if values[name] == ABSENT else int(values[name])

    return RankSample(
        rank,
        values["scale"] if values["has_scale"] > 0 else None,
        count("skipped_steps"),
        count("growth_tracker"),
        count("floor_steps"),
        bool(values["loss_not_finite"]),
        values["step_seconds"],
        values["data_seconds"],
        values["own_seconds"],
        int(values["peak_memory"]),
        values["has_scale"] == ABSENT,
        None if values["samples"] == ABSENT else values["samples"],
        None if values["tokens"] == ABSENT else values["tokens"],
    )
