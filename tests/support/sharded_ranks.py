"""One of several gloo ranks that save and resume sharded trainings: `python -m tests.support.sharded_ranks FOLDER`."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

from tests.support.program_ranks import results_of_rank
from tests.support.sharded_programs import OPTIMIZERS, Model, fit, saved, weights


def resumed(folder: Path, kind: str, strategy: str = "fsdp2", **options: Any) -> dict[str, Any]:
    """Losses and weights of the uninterrupted training, and of one that resumes in its middle."""
    whole, again = Model(kind), Model(kind)
    fit(whole, strategy, folder, **options)
    last = fit(again, strategy, folder / "again", saved(folder), **options)
    return {
        "whole": list(whole.losses.items()),
        "again": list(again.losses.items()),
        "weights": weights(whole) == weights(again),
        "steps": last.global_step,
        "rates": [group["lr"] for optimizer in last.optimizers for group in optimizer.param_groups],
    }


FSDP = ("fsdp2", "fsdp2_grad_op", "hsdp", "fsdp2_offload")
ZERO = ("deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")
ALL = ("ddp", *FSDP, *ZERO)
# ZeRO and DDP have tests of their own for the pairs without FSDP2.
PAIRS = [(a, b) for a in ALL for b in ALL if a in FSDP or b in FSDP]


def matrix(folder: Path) -> dict[str, Any]:
    """Losses of a training under one strategy, and of one under another that resumes from it."""
    found: dict[str, Any] = {}
    for one in ALL:
        model = Model("groups")
        fit(model, one, folder / one)
        found[one] = list(model.losses.items())
    for one, other in PAIRS:
        print("pair", one, other, flush=True)
        model = Model("groups")
        fit(model, other, folder / f"{one}-{other}", saved(folder / one))
        found[f"{one}-{other}"] = list(model.losses.items())
    return found


def main(folder: Path) -> None:
    with results_of_rank(folder) as seen:
        for kind in OPTIMIZERS:
            print("case", kind, flush=True)
            seen[f"fsdp2 {kind}"] = resumed(folder / kind, kind)
        seen["matrix"] = matrix(folder / "matrix")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    main(Path(sys.argv[1]))
