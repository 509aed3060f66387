"""One of several gloo ranks that save and resume sharded trainings: `python -m tests.support.sharded_ranks FOLDER`."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.support.program_ranks import results_of_rank
from tests.support.sharded_contents import contents
from tests.support.sharded_programs import Model, fit, saved, weights


def resumed(folder: Path, kind: str, strategy: str = "fsdp2", **options: Any) -> dict[str, Any]:
    """Losses and weights of the uninterrupted training, and of one that resumes in its middle."""
    whole, again = Model(kind), Model(kind)
    first = fit(whole, strategy, folder, **options)
    last = fit(again, strategy, folder / "again", saved(folder), **options)
    return {
        "whole": list(whole.losses.items()),
        "again": list(again.losses.items()),
        "weights": weights(whole) == weights(again),
        "steps": last.global_step,
        "rates": [[group["lr"] for optimizer in each.optimizers for group in optimizer.param_groups]
                  for each in (first, last)],
    }  # fmt: skip


# All variants write the same folders: one of them stands for the others where another format is read or written.
PAIRS = [
    *(("ddp", other) for other in ("fsdp2", "hsdp")),
    *(("fsdp2", other) for other in ("ddp", "hsdp", "fsdp2_offload", "fsdp2_grad_op")),
    *((one, "fsdp2") for one in ("hsdp", "fsdp2_offload", "fsdp2_grad_op")),
    ("hsdp", "ddp"),
    *(("fsdp2", f"deepspeed_stage_{stage}") for stage in (1, 2, 3)),
    *((f"deepspeed_stage_{stage}", "fsdp2") for stage in (1, 2)),
    ("deepspeed_stage_3", "fsdp2_offload"),
]
# Of the optimizers, each kind of states: AdamW and momentum are in "groups" and "two".
KINDS = ("groups", "plain", "factored", "scalars", "nested", "two")
# Other variants that resume equal to the bit; in the middle of an epoch.
BIT_EQUAL: dict[str, dict[str, Any]] = {
    "hsdp": {"strategy": "hsdp", "shard_ranks": 1},
    "offload": {"strategy": "fsdp2_offload"},
    "accumulated": {"accumulate": 2},
}


def matrix(folder: Path) -> dict[str, Any]:
    """Losses of a training under one strategy, and of one under another that resumes from it."""
    found: dict[str, Any] = {}
    for one in dict(PAIRS):
        model = Model("groups")
        fit(model, one, folder / one)
        found[one] = list(model.losses.items())
    for one, other in PAIRS:
        print("pair", one, other, flush=True)
        model = Model("groups")
        # Replicas, as on two nodes.
        sharding: dict[str, Any] = {"shard_ranks": 1} if other == "hsdp" else {}
        fit(model, other, folder / f"{one}-{other}", saved(folder / one), **sharding)
        found[f"{one}-{other}"] = list(model.losses.items())
    return found


def distance_without_states(folder: Path) -> float:
    """How far losses are from the uninterrupted ones if the optimizer's states are not restored."""
    path = saved(folder / "ddp")
    content = torch.load(path, weights_only=True)
    content["optimizer_states"][0]["state"] = {}
    changed = folder / f"without-{dist.get_rank()}.ckpt"
    torch.save(content, changed)
    whole, model = Model("groups"), Model("groups")
    fit(whole, "ddp", folder / "ddp again")
    fit(model, "fsdp2", folder / "without", changed)
    return max(abs(whole.losses[n] - loss) for n, loss in model.losses.items())


def main(folder: Path) -> None:
    with results_of_rank(folder) as seen:
        for kind in KINDS:
            print("case", kind, flush=True)
            seen[f"fsdp2 {kind}"] = resumed(folder / kind, kind)
        for name, options in BIT_EQUAL.items():
            print("case", name, flush=True)
            seen[name] = resumed(folder / name, "groups", **options)
        seen["matrix"] = matrix(folder / "matrix")
        seen["without states"] = distance_without_states(folder / "matrix")
        seen |= contents(folder)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    main(Path(sys.argv[1]))
