"""One of several gloo ranks with unused parameters: `python -m tests.support.unused_ranks FOLDER`.

Writes its results to FOLDER as `rank-<r>.json`. RANK and WORLD_SIZE are its variables.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from strategies.base import BuildOptions, RankLocation
from strategies.build import build_strategy
from strategies.choice import choose_strategy
from strategies.unused_parameters import UnusedParametersError
from tests.support.program_ranks import results_of_rank

# Kinds of steps, and in how many micro batches each.
SEARCHED = (("never", 1), ("never", 3), ("rank", 1), ("rank", 2), ("in turns", 1), ("gan", 1))
WHOLE = (("all", 1), ("all", 2), ("hidden", 1))


class Net(pl.LightningModule):
    """A trunk and three heads, of which a step uses some.

    Args:
        kind: 'never' uses one; 'rank' another one on rank 1; 'in turns' another one in every step; 'gan' the heads of
            each of two optimizers in turn; 'all' all; 'hidden' all, the trunk in a reentrant checkpoint; 'later' all
            but one from step 3 on; 'thaws' all, the trunk trained from step 4 on.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.kind = kind
        self.trunk, self.heads = nn.Linear(6, 8), nn.ModuleList(nn.Linear(8, 1) for _ in range(3))
        self.automatic_optimization = kind != "gan"
        self.trunk.requires_grad_(kind != "thaws")

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor | None:
        x = batch[0] + self.global_rank
        used = {"never": [0], "in turns": [batch_idx % 3], "rank": [0, 1] if self.global_rank == 1 else [0]}
        wanted = used.get(self.kind, [0, 1, 2])
        if self.kind == "thaws":
            self.trunk.requires_grad_(batch_idx >= 4)
        if self.kind == "later" and batch_idx >= 3:
            wanted = [0, 1]
        if self.kind == "hidden":
            return self._loss(
                checkpoint(lambda z: self.trunk(z).tanh(), x.requires_grad_(), use_reentrant=True), wanted
            )
        if self.kind != "gan":
            return self._loss(self.trunk(x).tanh(), wanted)
        for optimizer, heads in zip(self.optimizers(), ([0], [1, 2]), strict=True):  # type: ignore[arg-type]
            self.toggle_optimizer(optimizer)
            features = self.trunk(x).tanh()
            self.manual_backward(self._loss(features if heads == [0] else features.detach(), heads))
            optimizer.step()
            optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)
        return None

    def _loss(self, features: torch.Tensor, wanted: list[int]) -> torch.Tensor:
        return torch.stack([(self.heads[n](features) - n).pow(2).mean() for n in wanted]).sum()

    def configure_optimizers(self) -> Any:
        # Moments and weight decay show whether a parameter without a gradient was changed.
        if self.kind == "gan":
            return [
                torch.optim.AdamW([*self.trunk.parameters(), *self.heads[0].parameters()], 0.01),
                torch.optim.AdamW([*self.heads[1].parameters(), *self.heads[2].parameters()], 0.01),
            ]
        return torch.optim.AdamW(self.parameters(), 0.01)


def fit(kind: str, accumulate: int, *, search: bool | None) -> dict[str, Any]:
    """Train some steps; `search` looks for unused parameters from the start, None rejects them, False detects them."""
    rank, size = dist.get_rank(), dist.get_world_size()
    choice = choose_strategy("ddp", world_size=size, device_kind="cpu", accumulate=1, model_has_static_graph=False)
    choice = replace(choice, find_unused_parameters=bool(search))
    found: list[tuple[str, ...]] = []
    location = RankLocation(rank, size, rank, size, 0, "127.0.0.1", 0)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=size,
        strategy=build_strategy(
            choice, BuildOptions("cpu", location, 60, on_unused=None if search is None else found.append)
        ),
        accumulate_grad_batches=accumulate,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model, error = Net(kind), None
    try:
        trainer.fit(model, DataLoader(TensorDataset(torch.randn(96, 6)), batch_size=4))
    except UnusedParametersError as raised:
        error = str(raised)
    weights = {name: value.flatten().tolist() for name, value in model.state_dict().items()}
    return {"weights": weights, "found": found, "error": error, "steps": trainer.global_step}


def main(folder: Path) -> None:
    with results_of_rank(folder) as seen:
        for kind, accumulate in (*SEARCHED, *WHOLE):
            for search in (True, False) if (kind, accumulate) in SEARCHED else (None, False):
                seen[f"{kind} {accumulate} {search}"] = fit(kind, accumulate, search=search)
        for kind in ("never", "later"):
            seen[f"{kind} refused"] = fit(kind, 1, search=None)
        for accumulate in (1, 2):
            seen[f"thaws {accumulate}"] = fit("thaws", accumulate, search=False)
        seen["later"] = fit("later", 1, search=False)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
