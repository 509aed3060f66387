"""One rank of `monitor_cost`: the same training, monitored differently in each block of steps."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import wandb
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from launcher import AmpWandbCallback
from strategies.loss_scale import CountingGradScaler
from tests.benchmarks.monitor_cost import LEFT_OUT, VARIANTS


class Noise(Dataset[Tensor]):
    def __init__(self, width: int, size: int) -> None:
        self.batch, self.size = torch.randn(64, width), size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tensor:
        return self.batch


class Turns:
    """The variant of a step."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def at(self, step: int) -> str:
        block = step // self.steps
        return VARIANTS[(block % 3 + block // 3) % 3]


class SwitchedScaler(CountingGradScaler):
    """Counts only in the launcher's blocks."""

    counting = False

    def update(self, new_scale: float | Tensor | None = None) -> None:
        CountingGradScaler.update(self) if self.counting else torch.amp.GradScaler.update(self)


class Model(pl.LightningModule):
    def __init__(self, width: int, turns: Turns) -> None:
        super().__init__()
        self.net = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(4)))
        self.turns = turns

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = (self.net(batch) - 0.5).square().mean()
        if self.turns.at(self.global_step) == "common":
            scale = self.trainer.precision_plugin.scaler.get_scale()
            for n in range(8):
                self.log(f"v{n}", scale + n, on_step=True, sync_dist=True)
            if self.trainer.is_global_zero:
                wandb.log({"scale": scale, "loss": loss.item()})
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1e-3)


class Switch(pl.Callback):
    """Passes only the steps of its blocks to the callback under test, and measures the times."""

    def __init__(self, tested: AmpWandbCallback, turns: Turns, scaler: SwitchedScaler, out: Path) -> None:
        self.tested, self.turns, self.scaler, self.out = tested, turns, scaler, out
        self.times: dict[int, dict[str, list[float]]] = {}
        self.last = 0.0

    def _on(self, trainer: pl.Trainer) -> bool:
        return self.turns.at(trainer.global_step) == "launcher"

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.tested.on_train_start(trainer, pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.scaler.counting = self._on(trainer)
        if self.scaler.counting:
            self.tested.on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        if self.scaler.counting:
            self.tested.on_before_backward(trainer, pl_module, loss)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.scaler.counting:
            self.tested.on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        step = trainer.global_step - 1
        now, before = time.perf_counter(), self.last
        self.last = now
        if step % self.turns.steps >= LEFT_OUT:
            round_ = step // self.turns.steps // 3
            self.times.setdefault(round_, {}).setdefault(self.turns.at(step), []).append(now - before)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.tested.on_train_end(trainer, pl_module)
        if trainer.is_global_zero:
            means = [{v: sum(t) / len(t) for v, t in by.items()} for by in self.times.values() if len(by) == 3]
            # The first round warms up.
            self.out.write_text(json.dumps(means[1:]))


def main() -> None:
    out, rounds, steps, width = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    if os.environ["RANK"] == "0":
        wandb.init(project="monitor-cost", dir=str(out.parent))
    torch.manual_seed(0)
    turns, scaler = Turns(steps), SwitchedScaler("cpu", init_scale=1024.0)
    # One sample at the end of each block of the callback.
    tested = AmpWandbCallback(precision="16-mixed", every_n_steps=steps)
    trainer = pl.Trainer(
        accelerator="cpu", devices=int(os.environ["WORLD_SIZE"]), strategy="ddp", max_steps=(rounds + 1) * 3 * steps,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)], callbacks=[Switch(tested, turns, scaler, out)],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(Model(width, turns), DataLoader(Noise(width, 10**6), batch_size=None))
    if os.environ["RANK"] == "0":
        wandb.finish()


if __name__ == "__main__":
    main()
