"""Split one global batch over ranks and gradient accumulation, so that its size does not depend on their number."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass


class BatchSplitError(ValueError):
    """A global batch that cannot be split evenly over the ranks.

    Attributes:
        nearest_global_batch_sizes: the nearest sizes that these ranks can share.
        nearest_world_sizes: the nearest numbers of ranks that can share this size.
    """

    def __init__(self, message: str, *, global_batch_size: int, world_size: int, unit: int) -> None:
        below = global_batch_size // unit * unit
        accumulate = unit // world_size
        self.global_batch_size = global_batch_size
        self.world_size = world_size
        self.nearest_global_batch_sizes = tuple(n for n in (below, below + unit) if n > 0)
        shareable = global_batch_size % accumulate == 0
        self.nearest_world_sizes = nearest_divisors(global_batch_size // accumulate, world_size) if shareable else ()
        sizes = " or ".join(map(str, self.nearest_global_batch_sizes))
        worlds = f", or {' or '.join(map(str, self.nearest_world_sizes))} ranks" if shareable else ""
        super().__init__(f"{message}; nearest: global_batch_size {sizes}{worlds}")


@dataclass(frozen=True, slots=True)
class BatchSplit:
    """The samples of an optimizer step: `global_batch_size == micro_batch_size * world_size * accumulate`.

    Attributes:
        micro_batch_size: samples that a rank processes at once; None if only the user's loader knows.
        accumulate: micro batches whose gradients a rank accumulates before an optimizer step.
    """

    world_size: int
    micro_batch_size: int | None
    accumulate: int

    @property
    def global_batch_size(self) -> int | None:
        """Samples per optimizer step over all ranks; None if only the user's loader knows."""
        return None if self.micro_batch_size is None else self.micro_batch_size * self.world_size * self.accumulate


def split_batch(
    global_batch_size: int, world_size: int, *, largest_micro_batch: int | None = None, accumulate: int | None = None
) -> BatchSplit:
    """Split `global_batch_size` evenly over `world_size` ranks.

    Args:
        global_batch_size: samples per optimizer step over all ranks.
        world_size: number of ranks.
        largest_micro_batch: most samples that a rank may process at once; the largest divisor up to it is used.
        accumulate: a number of micro batches that the user set; None lets the split choose.

    Raises:
        BatchSplitError: no even split; lists the nearest sizes and numbers of ranks that have one.
        ValueError: a size below 1.
    """
    sizes = {"global_batch_size": global_batch_size, "world_size": world_size,
             "largest_micro_batch": largest_micro_batch, "accumulate": accumulate}  # fmt: skip
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, {value} was given")
    unit = world_size * (accumulate or 1)
    if global_batch_size % unit:
        times = f" x {accumulate} accumulated batches" if accumulate else ""
        raise BatchSplitError(
            f"global_batch_size {global_batch_size} cannot be shared by {world_size} ranks{times}",
            global_batch_size=global_batch_size,
            world_size=world_size,
            unit=unit,
        )
    share = global_batch_size // world_size
    if accumulate is not None:
        return BatchSplit(world_size, share // accumulate, accumulate)
    micro = share if largest_micro_batch is None else largest_divisor(share, largest_micro_batch)
    return BatchSplit(world_size, micro, share // micro)


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit` (and at least 1)."""
    return max((n for n in _divisors(number) if n <= limit), default=1)


def nearest_divisors(number: int, near: int) -> tuple[int, ...]:
    """The divisors of `number` nearest to `near`, below and above."""
    above = min((n for n in _divisors(number) if n > near), default=None)
    below = largest_divisor(number, near)
    return (below,) if above is None else (below, above)


def _divisors(number: int) -> Iterator[int]:
    for n in range(1, math.isqrt(number) + 1):
        if number % n == 0:
            yield n
            yield number // n
