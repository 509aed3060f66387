"""Modules as users write them: how they optimize, log and schedule."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 -- as everybody writes it


class Plain(pl.LightningModule):
    """Regression on the rows of `data.Table`; the others change one aspect."""

    def __init__(self, lr: float = 0.05, hidden: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.net = self.make(hidden)

    def make(self, hidden: int) -> nn.Module:
        return nn.Sequential(nn.Linear(8, hidden), nn.Tanh(), nn.Linear(hidden, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze(-1)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return F.mse_loss(self(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Adam(Plain):
    def configure_optimizers(self) -> Any:
        decayed = [p for p in self.parameters() if p.ndim > 1]
        others = [p for p in self.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0, "lr": self.lr / 2}]
        return torch.optim.AdamW(groups, lr=self.lr)


class OneCycle(Plain):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        total = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Plateau(Plain):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"}}


class TwoSchedules(Plain):
    """A list of optimizers and a list of schedules, with a warm-up before a cosine."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
        warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        both = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], milestones=[3])
        return [optimizer], [{"scheduler": both, "interval": "step", "frequency": 2}]


class OwnScheduleStep(Plain):
    """A schedule that is not a torch scheduler, with `lr_scheduler_step`."""

    class Decay:
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer, self.count = optimizer, 0

        def step_now(self) -> None:
            self.count += 1
            self.optimizer.param_groups[0]["lr"] *= 0.9

        def state_dict(self) -> dict[str, int]:
            return {"count": self.count}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.count = state["count"]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
        return [optimizer], [{"scheduler": self.Decay(optimizer), "interval": "epoch"}]

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step_now()


class Gan(pl.LightningModule):
    """Two optimizers with manual optimization, as in the GAN example."""

    def __init__(self, toggle: bool = True) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.toggle = toggle
        self.generator, self.critic = nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, _ = batch
        first, second = self.optimizers()
        noise = x[:, :4]
        if self.toggle:
            self.toggle_optimizer(first)
        loss = F.softplus(-self.critic(self.generator(noise))).mean()
        first.zero_grad()
        self.manual_backward(loss)
        first.step()
        if self.toggle:
            self.untoggle_optimizer(first)
            self.toggle_optimizer(second)
        other = F.softplus(self.critic(self.generator(noise).detach())).mean() + F.softplus(-self.critic(x)).mean()
        second.zero_grad()
        self.manual_backward(other)
        self.clip_gradients(second, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
        second.step()
        if self.toggle:
            self.untoggle_optimizer(second)
        self.log_dict({"g": loss, "d": other}, prog_bar=True)

    def configure_optimizers(self) -> Any:
        return (torch.optim.SGD(self.generator.parameters(), lr=0.01),
                torch.optim.SGD(self.critic.parameters(), lr=0.02))  # fmt: skip


class ManualAccumulation(Plain):
    """Manual optimization that steps every second batch, with a schedule at the end of an epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        loss = self.loss(batch) / 2
        self.manual_backward(loss)
        if (batch_idx + 1) % 2 == 0:
            optimizer.step()
            optimizer.zero_grad()

    def on_train_epoch_end(self) -> None:
        self.lr_schedulers().step()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


class Lbfgs(Plain):
    """An optimizer that calls the closure several times."""

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


class OwnSteps(Plain):
    """Overrides of the optimizer's hooks: warm-up in `optimizer_step`, custom clipping and zeroing."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        for group in optimizer.param_groups:
            group["lr"] = self.lr * min(1.0, (self.trainer.global_step + 1) / 5)
        optimizer.step(closure=optimizer_closure)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=False)

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any = None,
                                    gradient_clip_algorithm: Any = None) -> None:  # fmt: skip
        self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.log("grad", sum(p.grad.norm() for p in self.parameters() if p.grad is not None))


class Skips(Plain):
    """Returns None for some batches, as the documentation allows on one rank."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx % 3 == 2 else super().training_step(batch, batch_idx)


class DictOutput(Plain):
    """A dict from `training_step`, which a callback may read."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        return {"loss": loss, "batch": batch_idx}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert outputs["batch"] == batch_idx
        self.log("out", outputs["loss"])


class Logs(Plain):
    """Every way to log."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("a", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("b", float(batch_idx), reduce_fx="max", on_step=False, on_epoch=True)
        self.log("c", loss, sync_dist=True)
        self.log_dict({"d/x": loss, "d/y": torch.tensor(2.0)}, batch_size=4)
        return loss

    def on_validation_epoch_end(self) -> None:
        self.log("val_end", 3.0, sync_dist=True)


class Monitored(Plain):
    """`configure_callbacks` with the usual three."""

    def __init__(self, folder: str = "kept") -> None:
        super().__init__()
        self.folder = folder

    def configure_callbacks(self) -> Any:
        keep = ModelCheckpoint(self.folder, monitor="val_loss", save_top_k=2, filename="{epoch}-{step}")
        return [EarlyStopping("val_loss", patience=5), keep, LearningRateMonitor()]


class UsesTrainer(Plain):
    """Reads many attributes of the Trainer, as users do."""

    def on_train_start(self) -> None:
        trainer = self.trainer
        self.seen = (trainer.num_training_batches, trainer.max_epochs, trainer.is_global_zero, trainer.world_size)
        assert trainer.train_dataloader is not None
        assert trainer.logger is not None
        trainer.strategy.barrier()
        self.print("starting")
        self.logger.log_hyperparams({"own": 1})

    def on_train_epoch_end(self) -> None:
        gathered = self.all_gather(torch.tensor(float(self.global_rank)))
        self.log("ranks", gathered.float().max(), sync_dist=True)
        self.logger.log_metrics({"mine": 1.5}, step=self.global_step)
        if self.trainer.current_epoch == 1:
            self.trainer.should_stop = True


class ByIterator(Plain):
    """`training_step(self, dataloader_iter)`."""

    def training_step(self, dataloader_iter: Any) -> Any:
        batch, _, _ = next(dataloader_iter)
        return self.loss(batch)


class OnlyBatch(Plain):
    """`training_step(self, batch)` without an index."""

    def training_step(self, batch: Any) -> Any:
        return self.loss(batch)


class Fails(Plain):
    """Raises in its fourth step."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 3:
            raise KeyError("the user's own mistake")
        return super().training_step(batch, batch_idx)


class StopsItself(Plain):
    """`should_stop` in the middle of an epoch."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.global_step == 5:
            self.trainer.should_stop = True


class SkipsEpoch(Plain):
    """Returns -1 from `on_train_batch_start`: the rest of that epoch is skipped."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        return -1 if self.current_epoch == 0 and batch_idx == 2 else None
