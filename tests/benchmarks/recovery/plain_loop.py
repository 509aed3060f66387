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

    The global batch has one share for each rank that the training began with. If fewer are left, a rank does several
    shares, so that the curve stays the same but for rounding.

    Args:
        rank: this rank.
        ranks: number of ranks now.
        shares: number of ranks at the start.
    """

    def __init__(self, rank: int, ranks: int, shares: int) -> None:
        self.ranks, self.shares = ranks, shares
        self.own = range(rank, shares, ranks)
        self.net = network()
        self.adam, self.schedule = optimizers(self.net)
        self.data = Pairs(shares * BATCH * BATCHES)

    def batch(self, step: int, share: int) -> tuple[Tensor, Tensor]:
        """A share of a step's batch, as a distributed sampler would give it."""
        order = torch.randperm(len(self.data), generator=torch.Generator().manual_seed(step // BATCHES))
        own = order[share :: self.shares][step % BATCHES * BATCH :][:BATCH]
        return self.data.x[own], self.data.y[own]

    def losses(self, model: nn.Module, step: int) -> list[Tensor]:
        """The losses of this rank's shares of a step, whose dropout is seeded."""
        losses = []
        for share in self.own:
            torch.manual_seed(step * 1000 + share)
            losses.append(loss_of(model, self.batch(step, share)))
        return losses

    def total(self, losses: list[Tensor]) -> Tensor:
        """What to differentiate: the mean over the ranks is then the mean over the shares."""
        return torch.stack(losses).sum() * (self.ranks / self.shares)

    def record(self, attempt: int, step: int, losses: list[Tensor]) -> None:
        """Write the trace of a finished step."""
        for share, loss in zip(self.own, losses, strict=True):
            trace.append(share, attempt, (0, step), finished=True, loss=loss.item())

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
        for share in self.own:
            trace.write_final(share, {**states, "schedulers": [self.schedule.state_dict()]})
