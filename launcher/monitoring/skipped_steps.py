"""Whether too many optimizer steps are skipped because their gradients overflow. Pure functions.

A dynamic scaler begins at 65536, halves the scale at each overflow, and doubles it after 2000 steps without one
(`torch.amp.GradScaler`; Micikevicius et al., "Mixed Precision Training", 2018). So a healthy training skips

- a run of steps at its start, while the scale falls to a value that fits: 16 steps from 65536 to 1;
- the same again after the gradients have grown;
- about one step in 2000 (0.05 %) later, each time the scale was doubled too far.

Two things are not healthy:

- Below a scale of 1 the gradients overflow although the loss is not enlarged at all. torch's scaler documents for this
  range that "something is likely wrong", and DeepSpeed and Megatron-LM stop there (`min_loss_scale` is 1). It is
  reported at once if `SHARE_BELOW_FLOOR` of the last `WINDOW` steps were skipped, at least `_FEWEST`; the single
  skipped step that follows a doubling of the scale is not reported.
- `SHARE` of the steps skipped in two windows in succession. A fall to a new scale takes at most 32 steps (from 2**32,
  the largest initial scale in use), nearly all of them in one window: of a fall across two windows, at least 10 steps
  must be in each, that is from 2**20 to 1. It happens with a short growth interval, where the scale never falls far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Optimizer steps; longer if the samples are further apart.
WINDOW = 50
SHARE_BELOW_FLOOR = 0.1
_FEWEST = 5
SHARE = 0.2


@dataclass(frozen=True, slots=True)
class SkipCount:
    """Steps skipped since the training began, after `step` optimizer steps."""

    step: int
    skipped: int


@dataclass(frozen=True, slots=True)
class SkippedSteps:
    """Too many skipped steps: `skipped` of the last `steps`."""

    skipped: int
    steps: int
    is_below_floor: bool


def recent_counts(counts: Sequence[SkipCount]) -> tuple[SkipCount, ...]:
    """The counts that the next decision needs, oldest first: two windows before the last one."""
    first = _window_start(counts, _window_start(counts, len(counts) - 1))
    return tuple(counts[first:])


def find_skipped_steps(counts: Sequence[SkipCount], lowest_scale: float | None, floor: float) -> SkippedSteps | None:
    """Decide about the last of `counts`, oldest first; None if not too many steps are skipped.

    `lowest_scale` is the lowest loss scale of all ranks, None if it is not known.
    """
    last = len(counts) - 1
    middle = _window_start(counts, last)
    if last < 1 or middle == last:
        return None
    recent = _skipped(counts, middle, last, is_below_floor=True)
    is_below_floor = lowest_scale is not None and lowest_scale < floor
    if is_below_floor and recent.skipped >= max(_FEWEST, SHARE_BELOW_FLOOR * recent.steps):
        return recent
    first = _window_start(counts, middle)
    is_complete = all(
        counts[end].step - counts[start].step >= WINDOW for start, end in ((first, middle), (middle, last))
    )
    if is_complete and min(_share(counts, first, middle), _share(counts, middle, last)) >= SHARE:
        return _skipped(counts, first, last, is_below_floor=False)
    return None


def _window_start(counts: Sequence[SkipCount], end: int) -> int:
    """Index of the last count that is a window before `end`; the first one if there is none."""
    starts = (i for i in range(end - 1, -1, -1) if counts[end].step - counts[i].step >= WINDOW)
    return next(starts, 0)


def _share(counts: Sequence[SkipCount], start: int, end: int) -> float:
    return (counts[end].skipped - counts[start].skipped) / max(counts[end].step - counts[start].step, 1)


def _skipped(counts: Sequence[SkipCount], start: int, end: int, *, is_below_floor: bool) -> SkippedSteps:
    return SkippedSteps(
        counts[end].skipped - counts[start].skipped, counts[end].step - counts[start].step, is_below_floor
    )
