"""One of several gloo ranks that train in real fp16 on a CPU: `python -m tests.support.amp_ranks FOLDER`.

Writes its results to FOLDER as `rank-<r>.json`. RANK and WORLD_SIZE are its variables.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from launcher import AmpWandbCallback
from strategies.base import BuildOptions, RankLocation
from strategies.build import build_strategy
from strategies.choice import choose_strategy
from tests.support.program_ranks import results_of_rank
from tests.support.wandb_stand_in import RecordingWandb

STEPS = 6


class Net(pl.LightningModule):
    """One layer; on rank `overflow_on` the gradients of step 2 overflow at any scale."""

    def __init__(self, overflow_on: int | None = None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        self.overflow_on = overflow_on

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = self.layer(batch[0]).float().pow(2).mean() + 1
        return loss * (1e36 if self.global_step == 2 and self.global_rank == self.overflow_on else 1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class SkewScale(pl.Callback):
    """From step 2 on, rank 1 has a different loss scale."""

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 2 and trainer.global_rank == 1:
            scaler = trainer.precision_plugin.scaler  # type: ignore[attr-defined]
            scaler._scale.mul_(0.25)


class Ops(TorchDispatchMode):
    """Counts the ops of the thread that trains.

    torch's profiler sometimes crashes if a gloo thread finishes while the profiler starts or ends.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


class Watched:
    """The ops of each batch, including those of all other callbacks."""

    def __init__(self) -> None:
        self.syncs: list[int] = []
        self.collectives: list[dict[str, int]] = []
        self._ops = Ops()

        class First(pl.Callback):
            def on_train_batch_start(_, *__: Any) -> None:  # noqa: N805 -- `self` is the watch
                self._begin()

        class Last(pl.Callback):
            def on_train_batch_end(_, *__: Any) -> None:  # noqa: N805 -- `self` is the watch
                self._end()

        self.first, self.last = First(), Last()

    def _begin(self) -> None:
        self._ops = Ops()
        self._ops.__enter__()

    def _end(self) -> None:
        self._ops.__exit__(None, None, None)
        names = self._ops.names
        self.syncs.append(names["aten::_local_scalar_dense"])
        self.collectives.append({name: n for name, n in sorted(names.items()) if name.startswith("c10d::")})


def fit(model: Net, *callbacks: pl.Callback) -> pl.Trainer:
    rank, size = dist.get_rank(), dist.get_world_size()
    choice = choose_strategy("ddp", world_size=size, device_kind="cpu", accumulate=1, model_has_static_graph=False)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=size,
        strategy=build_strategy(
            choice, BuildOptions("cpu", RankLocation(rank, size, rank, size, 0, "127.0.0.1", 0), 60)
        ),
        plugins=[MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", 1024.0))],
        callbacks=list(callbacks),
        max_steps=STEPS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    torch.manual_seed(0)
    trainer.fit(model, DataLoader(TensorDataset(torch.ones(64, 4)), batch_size=4))
    return trainer


def profiled(*callbacks: pl.Callback) -> dict[str, Any]:
    watched = Watched()
    fit(Net(), watched.first, *callbacks, watched.last)
    return {"syncs": watched.syncs, "collectives": watched.collectives}


def logged(wandb: RecordingWandb) -> list[dict[str, Any]]:
    rows = [row for _, row in wandb.rows]
    wandb.rows.clear()
    return rows


def main(folder: Path) -> None:
    wandb = RecordingWandb()
    sys.modules["wandb"] = wandb
    with results_of_rank(folder) as seen:
        seen["bare"] = profiled()
        seen["watched"] = profiled(AmpWandbCallback(every_n_steps=3))
        seen["watched"]["rows"] = logged(wandb)
        wandb.run.step = 0

        amp = AmpWandbCallback(every_n_steps=2)
        model = Net(overflow_on=1)
        scaler = fit(model, amp).precision_plugin.scaler  # type: ignore[attr-defined]
        seen["overflow"] = {
            "rows": logged(wandb),
            "scale": scaler.get_scale(),
            "counts": scaler.counts(),
            "weights": [value.tolist() for value in model.state_dict().values()],
        }
        wandb.run.step = 0

        reported: list[Any] = []
        amp = AmpWandbCallback(
            every_n_steps=1, on_alert=lambda alert, step: reported.append([alert.kind, step, alert.ranks])
        )
        fit(Net(), SkewScale(), amp)
        seen["skewed"] = {"rows": logged(wandb), "reported": reported, "alerts": wandb.alerts}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
