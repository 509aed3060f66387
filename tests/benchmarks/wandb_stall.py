"""W&B's service stopped (SIGSTOP) for a minute in the middle of a training: speed and rows.

    python -m tests.benchmarks.wandb_stall [--stall 60] [--calm 30] [--capacity 256]

One process, a row in every step through `AmpWandbCallback`, W&B offline. Steps are counted before, during and
after the stop; then the rows in the run's file are counted, which must be those that were not dropped.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from launcher import AmpWandbCallback
from tests.benchmarks.monitor_cost_worker import Noise
from tests.support.wandb_file import history_rows


class Net(pl.LightningModule):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(4)))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.net(batch) - 0.5).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1e-3)


class Phases(pl.Callback):
    """Counts steps before, during and after the stop, then ends the training."""

    def __init__(self, calm: float, stall: float) -> None:
        self.ends = [calm, calm + stall, 2 * calm + stall]
        self.steps: list[list[float]] = [[], [], []]
        self.began = self.last = 0.0
        self.children: list[int] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        now = time.monotonic()
        if trainer.global_step <= 50:
            self.began = self.last = now
            return
        phase = sum(now - self.began >= end for end in self.ends)
        if phase > 2:
            trainer.should_stop = True
            return
        if phase == 1 and not self.children:
            self.children = [pid for pid in children_of(os.getpid()) if "wandb" in command_of(pid)]
            for pid in self.children:
                os.kill(pid, signal.SIGSTOP)
            threading.Timer(self.ends[1] - self.ends[0], self.go_on).start()
        self.steps[phase].append(now - self.last)
        self.last = now

    def go_on(self) -> None:
        for pid in self.children:
            os.kill(pid, signal.SIGCONT)


def children_of(pid: int) -> list[int]:
    listed = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout.split()
    return [each for child in map(int, listed) for each in (child, *children_of(child))]


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stall", type=float, default=60)
    parser.add_argument("--calm", type=float, default=30)
    parser.add_argument("--capacity", type=int, default=256)
    parser.add_argument("--width", type=int, default=512)
    options = parser.parse_args()
    torch.set_num_threads(1)
    import wandb

    with tempfile.TemporaryDirectory() as folder:
        run = wandb.init(mode="offline", dir=folder, project="stall", settings=wandb.Settings(silent=True))
        callback = AmpWandbCallback(precision="16-mixed", every_n_steps=1, capacity=options.capacity)
        phases = Phases(options.calm, options.stall)
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=[callback, phases],
            plugins=[MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))],
        )  # fmt: skip
        trainer.fit(Net(options.width), DataLoader(Noise(options.width, 10**7), batch_size=None))
        steps, dropped = trainer.global_step, callback.dropped
        run.finish()
        rows = sum("amp/loss_scale" in row for row in history_rows(Path(folder)))
    speeds = [len(p) / sum(p) for p in phases.steps]
    calm = statistics.mean((speeds[0], speeds[2]))
    print("steps/s before, while, after: " + ", ".join(f"{s:.2f}" for s in speeds))
    medians = [statistics.median(p) for p in phases.steps]
    print("median step, ms: " + ", ".join(f"{m * 1e3:.2f}" for m in medians))
    by_median = statistics.mean((medians[0], medians[2])) / medians[1]
    print(f"while / calm: {speeds[1] / calm:.3f} by all steps, {by_median:.3f} by median step (target at least 0.99)")
    verdict = "exact" if steps - dropped == rows else "NOT exact"
    print(f"rows: {steps} logged, {dropped} dropped, {rows} in W&B's file; {verdict}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
