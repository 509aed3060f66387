"""A rank of a preflight that is slow, or dies: `python -m tests.support.slow_preflight_rank slow|die RANK PLACE`."""

from __future__ import annotations

import json
import sys

import torch

from launcher.doctor.preflight_rank import RankRequest, measure, time_product
from launcher.process.parent_death import die_with_parent

# More than other load slows down a rank.
_FACTOR = 20


def _slowly(device: torch.device) -> tuple[str, float]:
    """Every product takes as long as twenty, as on a throttled device."""
    real = torch.mm

    def mm(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        for _ in range(_FACTOR - 1):
            real(one, other)
        return real(one, other)

    torch.mm = mm
    return time_product(device)


def _dying(device: torch.device) -> tuple[str, float]:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


if __name__ == "__main__":
    die_with_parent()
    how, number, text = sys.argv[1:]
    place = RankRequest(**json.loads(text))
    chosen = {"slow": _slowly, "die": _dying}[how] if place.rank == int(number) else None
    measure(place, chosen)
