"""The training as a plain loop, for tools that restart a function: the same network, schedule, data and sleep.

The data of a step and the seed of its dropout follow from step and rank, so that a step that is done again is the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.benchmarks.recovery import trace
from tests.benchmarks.recovery.training import BATCH, BATCHES, Pairs, loss_of, network, optimizers


class Loop:
    """Model, optimizer, schedule and data of one rank.

    Args:
        rank: this rank.
        ranks: number of ranks that share an epoch's data.
    """

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks
        self.net = network()
        self.adam, self.schedule = optimizers(self.net)
        self.data = Pairs(ranks * BATCH * BATCHES)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """The batch of a step, as a distributed sampler would give it."""
        order = torch.randperm(len(self.data), generator=torch.Generator().manual_seed(step // BATCHES))
        own = order[self.rank :: self.ranks][step % BATCHES * BATCH :][:BATCH]
        return self.data.x[own], self.data.y[own]

    def loss(self, model: nn.Module, step: int) -> Tensor:
        """The loss of a step, whose dropout is seeded."""
        torch.manual_seed(step * 1000 + self.rank)
        return loss_of(model, self.batch(step))

    def state(self) -> dict[str, Any]:
        return {"net": self.net.state_dict(), "adam": self.adam.state_dict(), "schedule": self.schedule.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self.adam.load_state_dict(state["adam"])
        self.schedule.load_state_dict(state["schedule"])

    def save(self, path: Path, step: int) -> None:
        """Write a checkpoint of all finished steps, complete or not at all."""
        part = path.with_suffix(".part")
        torch.save({**self.state(), "step": step}, part)
        part.rename(path)

    def finish(self) -> None:
        """Write the digests of the final states."""
        states = {"parameters": self.net.state_dict(), "optimizers": [self.adam.state_dict()]}
        trace.write_final(self.rank, {**states, "schedulers": [self.schedule.state_dict()]})
