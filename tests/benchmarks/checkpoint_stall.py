"""How long a checkpoint stops a training, and SIGKILLs at random moments of a save.

    python -m tests.benchmarks.checkpoint_stall [--ranks 1 2] [--mebibytes 500] [--saves 11] [--interval 150]
    python -m tests.benchmarks.checkpoint_stall --kills 200

The first form trains a model with so much state, under `checkpoint.background` true and false in turns. The stall of a
save is the time from a batch's start to the next one's, less the median of the batches without a save, on rank zero.
The second form kills one process after another, each at a random moment after it has begun a save; the next one has to
resume with the right state.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from launcher.checkpoint.atomic_io import AtomicCheckpointIO
from launcher.checkpoint.background import BackgroundWriter
from launcher.checkpoint.manifest import choose_checkpoint, read_step
from launcher.checkpoint.reader import Trust
from launcher.config.schema import CheckpointOptions
from launcher.training.callbacks.pending_writes import PendingWrites
from launcher.training.callbacks.run_checkpoint import RunCheckpoint

REPOSITORY = Path(__file__).resolve().parents[2]
_LARGE = 20  # MiB of a tensor
_KILLED_MEBIBYTES = 20


class Stateful(pl.LightningModule):
    """A step of some milliseconds, beside frozen tensors of `mebibytes` MiB; `times` gets the start of each batch."""

    def __init__(self, mebibytes: int = 500, times: str | None = None, every: int = 0) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 1))
        count = mebibytes // _LARGE
        self.large = nn.ParameterList(nn.Parameter(torch.rand(_LARGE << 18), requires_grad=False) for _ in range(count))
        self.register_buffer("done", torch.zeros(1))
        self._times, self._every = times, every
        self.starts: list[float] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.starts.append(time.perf_counter())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.get_buffer("done").add_(1)
        if self._every:
            # As a training changes its state in place.
            with torch.no_grad():
                for each in self.large:
                    each[:1000] += 1
        return self.net(batch).square().mean()

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(torch.randn(64 * 100_000 // 1000, 512).repeat(16, 1), batch_size=256)  # pyright: ignore[reportArgumentType]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 1e-4, momentum=0.9)

    def on_train_end(self) -> None:
        if self._times is not None and self.global_rank == 0:
            Path(self._times).write_text(json.dumps(self.starts))


def measure(ranks: int, mebibytes: int, saves: int, interval: int, *, background: bool) -> list[list[float]]:
    """Per save: its stall, and what the other batches until the next save cost more than their median; seconds."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        times = Path(folder) / "times.json"
        command = [sys.executable, "-m", "launcher", "fit", "--model", "tests.benchmarks.checkpoint_stall.Stateful"]
        values = {"model.mebibytes": mebibytes, "model.times": times, "wandb.mode": "disabled", "accelerator": "cpu",
                  "trainer.max_steps": interval * saves + interval // 2, "trainer.max_epochs": -1, "devices": ranks,
                  "checkpoint.every_n_steps": interval, "checkpoint.background": background,
                  "strategy": "ddp" if ranks > 1 else "single_device"}  # fmt: skip
        for key, value in values.items():
            command += [f"--{key}", str(value).lower() if isinstance(value, bool) else str(value)]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        ended = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=900, check=False)
        if ended.returncode:
            raise SystemExit(ended.stdout + ended.stderr)
        starts: list[float] = json.loads(times.read_text())
    lengths = [b - a for a, b in itertools.pairwise(starts)]
    steps = {n: length for n, length in enumerate(lengths, 1) if n > 5}
    middle = statistics.median(length for n, length in steps.items() if n % interval)
    found = [[steps[n] - middle, sum(steps[n + k] - middle for k in range(1, interval // 2))]
             for n in range(interval, interval * saves + 1, interval)]  # fmt: skip
    return [*found, [middle, 0.0]]


def compare(options: argparse.Namespace) -> None:
    """Print the stalls with and without the background."""
    for ranks in options.ranks:
        medians = {}
        for background in (False, True):
            *found, (step, _) = measure(
                ranks, options.mebibytes, options.saves, options.interval, background=background
            )
            first, stalls = found[0][0], [stall for stall, _ in found[1:]]
            medians[background] = statistics.median(stalls)
            later = statistics.median(rest for _, rest in found[1:])
            print(
                f"{ranks} ranks, background {background}: step {step * 1e3:.1f} ms; "
                f"stall median {medians[background]:.3f} s ({min(stalls):.3f} to {max(stalls):.3f}, n={len(stalls)}), "
                f"first {first:.3f} s; following steps {later:+.3f} s in all; load {os.getloadavg()[0]:.1f}",
                flush=True,
            )
        print(f"{ranks} ranks: ratio {medians[True] / medians[False]:.3f} (target at most 0.1)", flush=True)


class _Tell(pl.Callback):
    """Informs the parent of the step at which the training goes on, and of each save."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        done = int(pl_module.get_buffer("done").item())
        os.write(self._pipe, f"start {trainer.global_step} {done}\n".encode())

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        os.write(self._pipe, f"save {trainer.global_step} 0\n".encode())


def _train_until_killed(folder: Path, pipe: int) -> None:
    resume, _ = choose_checkpoint(folder / "checkpoints", "last.ckpt", None)
    writer = BackgroundWriter()
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=1_000_000, max_epochs=-1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, plugins=[AtomicCheckpointIO(Trust(folder), background=writer)],
        callbacks=[PendingWrites(writer), _Tell(pipe),
                   RunCheckpoint(CheckpointOptions(every_n_steps=5), folder / "checkpoints", writer)],
    )  # fmt: skip
    path = None if resume is None else str(resume)
    trainer.fit(Stateful(_KILLED_MEBIBYTES, every=1), ckpt_path=path, weights_only=True)


def _warm() -> None:
    """Import what a training needs, for the processes that are forked."""
    options: dict[str, Any] = {"enable_checkpointing": False, "enable_progress_bar": False, "logger": False}
    pl.Trainer(accelerator="cpu", max_steps=1, enable_model_summary=False, **options).fit(Stateful(_LARGE))


def kill(count: int, seed: int) -> None:
    """Kill `count` processes at random moments of a save; print how many resumes were valid."""
    chance, valid, redone, skipped = random.Random(seed), 0, [], 0  # noqa: S311 -- moments in time
    _warm()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        (folder / "checkpoints").mkdir(mode=0o700)
        longest, last = 1.0, 0
        for number in range(count + 1):
            reader, writer = os.pipe()
            pid = os.fork()
            if not pid:
                os.close(reader)
                devnull = os.open(os.devnull, os.O_WRONLY)
                os.dup2(devnull, 1)
                os.dup2(devnull, 2)
                try:
                    _train_until_killed(folder, writer)
                finally:
                    os._exit(1)
            os.close(writer)
            with os.fdopen(reader) as lines:
                kind, step, done = lines.readline().split() or ["none", "0", "-1"]
                is_valid = kind == "start" and step == done and (number == 0 or int(step) > 0)
                if number:
                    valid += is_valid
                    redone.append(last - int(step))
                # The save after the first one, at a random moment of it and of its write.
                while (line := lines.readline()) and not line.startswith("save"):
                    pass
                first = time.monotonic()
                while (line := lines.readline()) and not line.startswith("save"):
                    pass
                longest = min(longest, time.monotonic() - first)
                last = int(line.split()[1]) if line else int(step)
                time.sleep(chance.uniform(0, longest))
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            _, notices = choose_checkpoint(folder / "checkpoints", "last.ckpt", None)
            skipped += len(notices)
            if number % 10 == 0:
                print(f"{number} kills, {valid} valid, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        kept = read_step(folder / "checkpoints" / "last.ckpt")
    print(
        f"{count} kills: {valid} valid resumes; steps done again: median {statistics.median(redone):.0f}, "
        f"most {max(redone)}; damaged checkpoints: {skipped}; last step {kept}; {time.monotonic() - began:.0f} s; "
        f"load {os.getloadavg()[0]:.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--mebibytes", type=int, default=500)
    parser.add_argument("--saves", type=int, default=11)
    parser.add_argument("--interval", type=int, default=150)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.kills:
        kill(options.kills, options.seed)
    else:
        compare(options)


if __name__ == "__main__":
    main()
