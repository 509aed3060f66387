"""User models that change themselves, or save objects in their checkpoints. They do not use the launcher."""

from __future__ import annotations

import enum
import os
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Kind(enum.Enum):
    SMALL = "small"


class Counts:
    """State of a callback and a data module."""

    def __init__(self, start: int = 0) -> None:
        self.seen = start
        self.mean = np.float64(0.5)


class Data(pl.LightningDataModule):
    def __init__(self, batch_size: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters({"batch_size": batch_size, "counted": Counts()})
        self.batch_size = batch_size
        self.counts = Counts()

    def setup(self, stage: str | None = None) -> None:
        x = torch.randn(64, 12, generator=torch.Generator().manual_seed(0))
        self.dataset = TensorDataset(x, (x.sum(1) > 0).long())
        self.classes = 2

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.dataset, batch_size=self.batch_size, shuffle=True)

    def state_dict(self) -> dict[str, Any]:
        return {"counts": self.counts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.counts = state_dict["counts"]
        assert isinstance(self.counts, Counts)


class Whole(pl.LightningModule):
    """All layers exist from the beginning."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.lr = lr
        self.make()

    def make(self) -> None:
        self.body, self.head = nn.Linear(12, 16), nn.Linear(16, 2)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.head(self.body(x).relu()), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class MadeInSetup(Whole):
    def make(self) -> None:
        self.body = nn.Linear(12, 16)

    def setup(self, stage: str) -> None:
        if not hasattr(self, "head"):
            self.head = nn.Linear(16, self.trainer.datamodule.classes)  # type: ignore[attr-defined]


class MadeInConfigureModel(Whole):
    def make(self) -> None: ...

    def configure_model(self) -> None:
        if not hasattr(self, "head"):
            super().make()


class Adapter(Whole):
    """The frozen part is not saved."""

    def make(self) -> None:
        super().make()
        self.body.requires_grad_(False)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {key: value for key, value in state.items() if not key.startswith("body.")}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name, value in self.body.state_dict().items():
            checkpoint["state_dict"][f"body.{name}"] = value

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.head.parameters(), lr=self.lr)


class TrainedPartOnly(Adapter):
    """As in adapter libraries: the frozen part is neither saved nor expected."""

    def make(self) -> None:
        super().make()
        self.strict_loading = False

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None: ...


class Lazy(Whole):
    def make(self) -> None:
        self.body, self.head = nn.LazyLinear(16), nn.LazyLinear(2)

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.trainer.world_size > 1:
            self.head(self.body(torch.zeros(1, 12)).relu())

    def configure_optimizers(self) -> Any:
        # The first batch determines the shapes.
        self.head(self.body(torch.zeros(1, 12)).relu())
        return super().configure_optimizers()


class Compiled(Whole):
    """A layer's names have `_orig_mod.` in them."""

    def make(self) -> None:
        super().make()
        self.body = torch.compile(self.body, backend="eager")  # type: ignore[assignment]


class Renamed(Whole):
    """Checkpoints have the names of an earlier version."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {f"old.{key}": value for key, value in state.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {key.removeprefix("old."): value for key, value in state.items()}


class Grows(nn.Linear):
    """A layer that takes its shape from the loaded state, like an index or a vocabulary."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.index = nn.Buffer(torch.empty_like(state_dict[f"{prefix}index"]))
        super()._load_from_state_dict(state_dict, prefix, *args)


class Growing(Whole):
    def make(self) -> None:
        self.body, self.head = Grows(12, 16), nn.Linear(16, 2)
        self.body.index = nn.Buffer(torch.zeros(1))

    def on_train_start(self) -> None:
        self.body.index = nn.Buffer(torch.zeros(3))


class Counter(pl.Callback):
    """The state is an object."""

    def __init__(self) -> None:
        self.counts = Counts()

    def on_train_batch_end(self, *_: Any) -> None:
        self.counts.seen += 1

    def state_dict(self) -> dict[str, Any]:
        return {"counts": self.counts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.counts = state_dict["counts"]

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self.counts.seen == trainer.fit_loop.total_batch_idx + 1, self.counts.seen


class Scaled:
    """A schedule that is an object with NumPy numbers."""

    def __init__(self) -> None:
        self.last = np.float32(1)

    def __call__(self, step: int) -> float:
        self.last = np.float32(0.9) ** step
        return float(self.last)


class Objects(Whole):
    """Objects at every place of its checkpoints, NumPy numbers in its optimizer and its schedule."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(lr)
        self.save_hyperparameters({"loss": nn.CrossEntropyLoss(), "kind": Kind.SMALL, "counts": Counts(), "lr": lr})

    def configure_callbacks(self) -> Any:
        return [Counter()]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["stats"] = {"mean": np.arange(3), "kind": Kind.SMALL, "where": Path("x"), "counts": Counts(3)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        stats = checkpoint["stats"]
        assert stats["mean"].tolist() == [0, 1, 2]
        assert stats["kind"] is Kind.SMALL
        assert stats["counts"].seen == 3

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=np.float64(self.lr))  # type: ignore[arg-type]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, Scaled())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class EmptyGroup(Objects):
    """Only matrices are trained; the group of those without decay is empty, and comes first."""

    def make(self) -> None:
        super().make()
        for layer in (self.body, self.head):
            layer.bias.requires_grad_(False)

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW([
            {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
        ], lr=self.lr)  # fmt: skip
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[0.1, 0.05], total_steps=100)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_end(self) -> None:
        if self.global_rank == 0:
            groups = self.optimizers().param_groups  # type: ignore[union-attr]
            rate = next(group["lr"] for group in groups if group["weight_decay"])
            Path(f"rate-{self.trainer.global_step}").write_text(repr(float(rate)))


class Dies(MadeInSetup, Adapter, Objects):
    """All of the above; rank 1 is killed once."""

    def setup(self, stage: str) -> None:
        self.body.requires_grad_(False)
        super().setup(stage)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        Adapter.on_save_checkpoint(self, checkpoint)
        Objects.on_save_checkpoint(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        Adapter.on_load_checkpoint(self, checkpoint)
        Objects.on_load_checkpoint(self, checkpoint)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        mark = Path("died")
        if self.global_rank == 1 and self.global_step == 6 and os.environ.get("DIES") and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, batch_idx)


KINDS = (MadeInSetup, MadeInConfigureModel, Adapter, TrainedPartOnly, Lazy, Compiled, Renamed, Growing, Objects,
         EmptyGroup)  # fmt: skip
