"""The goodput ledger against an outside clock: real runs of 2 gloo ranks with injected faults.

    python -m tests.benchmarks.goodput [--cases plain kill ...]

The user's own code writes a line with the time of day at each of its hooks, around each batch of its loader and around
Lightning's own save of a checkpoint. The time of each kind is computed from these lines and from the start of the
process, without the launcher's events. A difference is given as a share of the run's time; the target is 1 % for every
kind. What follows the last event, the end of the processes, is in no kind: it is shown.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from launcher.core.events import read_events
from launcher.runs.ledger_reader import LedgerReader

STEPS, EVERY = 240, 20
# Variables of the faults: seconds of each, and the step in which a rank kills itself.
CASES: dict[str, dict[str, str]] = {
    "plain": {},
    "slow loader": {"LOADER": "0.02"},
    "slow validation": {"VALIDATION": "0.5"},
    "slow start": {"START": "4"},
    "slow checkpoint": {"CHECKPOINT": "0.4"},
    "rank 1 killed": {"KILL": "1:93"},
    "rank 0 killed": {"KILL": "0:93"},
    "killed twice, all slow": {"KILL": "1:53,0:127", "LOADER": "0.01", "VALIDATION": "0.3", "CHECKPOINT": "0.2",
                               "START": "2"},
}  # fmt: skip
KINDS = ("start", "first_step", "steps", "redone", "data", "validation", "checkpoint", "failure")


_files: dict[int, int] = {}


def note(what: str, step: int = -1) -> None:
    """Write a line to the trace of this rank and attempt, in some microseconds."""
    own = os.getpid()
    if own not in _files:
        name = f"{os.environ['GOODPUT']}-{os.environ.get('RANK', '0')}"
        _files[own] = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    os.write(_files[own], f"{json.dumps([time.time(), attempt, what, step])}\n".encode())


def pause(name: str) -> None:
    """Be slow by the seconds of this variable."""
    time.sleep(float(os.environ.get(name, "0")))


class Samples(Dataset[Tensor]):
    """A few numbers."""

    def __len__(self) -> int:
        return STEPS * 8

    def __getitem__(self, index: int) -> Tensor:
        return torch.randn(64, generator=torch.Generator().manual_seed(index))


class TracedLoader(DataLoader[Tensor]):
    """Traces the wait for each batch of rank 0."""

    def __iter__(self) -> Any:
        batches = super().__iter__()
        while True:
            note("data")
            pause("LOADER")
            batch = next(batches, None)
            if batch is None:
                note("data end")
                return
            yield batch


class Data(pl.LightningDataModule):
    """Without workers: the training waits for its data."""

    def train_dataloader(self) -> Any:
        return TracedLoader(Samples(), batch_size=4, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(Samples(), batch_size=STEPS * 4)


_save = pl.Trainer.save_checkpoint


def _traced_save(self: pl.Trainer, *arguments: Any, **options: Any) -> None:
    note("checkpoint")
    pause("CHECKPOINT")
    _save(self, *arguments, **options)
    note("checkpoint end")


pl.Trainer.save_checkpoint = _traced_save  # type: ignore[method-assign]


class Timed(pl.LightningModule):
    """Traces its hooks; a step takes 20 ms or more."""

    def __init__(self) -> None:
        super().__init__()
        pause("START")
        self.net = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Tanh(), torch.nn.Linear(256, 1))

    def on_train_start(self) -> None:
        note("train", self.global_step)

    def transfer_batch_to_device(self, batch: Tensor, device: torch.device, dataloader_idx: int) -> Tensor:
        moved = super().transfer_batch_to_device(batch, device, dataloader_idx)
        if self.trainer.training:
            note("data end")
        return moved

    def on_train_batch_start(self, *_: Any) -> None:
        note("step", self.global_step)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        for number, kill in enumerate(filter(None, os.environ.get("KILL", "").split(","))):
            rank, step = map(int, kill.split(":"))
            mark = Path(f"{os.environ['GOODPUT']}-killed-{number}")
            if (self.global_rank, self.global_step) == (rank, step) and not mark.exists():
                mark.touch()
                time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.02)
        return self.net(batch).square().mean()

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        super().optimizer_step(*arguments, **options)
        note("step end", self.global_step + 1)

    def on_validation_start(self) -> None:
        note("validation")

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        pause("VALIDATION")

    def on_validation_end(self) -> None:
        note("validation end")

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())


def outside(trace: Path, began: float) -> dict[str, float]:
    """Seconds of each kind by the trace of rank 0."""
    lines = [json.loads(line) for line in Path(f"{trace}-0").read_text().splitlines()]
    others = [json.loads(line) for line in Path(f"{trace}-1").read_text().splitlines()]
    found: dict[str, float] = defaultdict(float)
    starts = [line for line in lines if line[2] == "train"]
    found["start"] = starts[0][0] - began
    most = 0
    for index, (started, attempt, _, _) in enumerate(starts):
        own = [line for line in lines if line[1] == attempt and line[0] >= started]
        ends = [line for line in own if line[2] == "step end"]
        if index:
            before = [line for line in (*lines, *others) if line[1] == attempt - 1 and line[2] == "step end"]
            found["failure"] += started - max(line[0] for line in before)
            most = max(most, *(line[3] for line in before))
        found["first_step"] += ends[0][0] - started - _sum(own, "data", started, ends[0][0])
        for kind in ("data", "validation", "checkpoint"):
            until = ends[-1][0] if index + 1 < len(starts) else own[-1][0] + 1
            found[kind] += _sum(own, kind, started, until)
        steps = [line for line in own if line[2] in ("step", "step end")][2:]
        waits = [line for line in own if line[2] in ("data", "data end")]
        for (begin, _, _, _), (end, _, what, step) in itertools.pairwise(steps):
            if what == "step end":
                found["redone" if step <= most else "steps"] += end - begin
                # The data of a step that is done again is a part of its cost.
                if step <= most:
                    first, last = [line[0] for line in waits if line[0] <= begin][-2:]
                    found["redone"] += last - first
                    found["data"] -= last - first
    return found


def _sum(lines: list[Any], kind: str, begin: float, until: float) -> float:
    times = [line for line in lines if line[2] in (kind, f"{kind} end") and begin <= line[0] <= until]
    pairs = itertools.pairwise(times)
    return sum(end[0] - start[0] for start, end in pairs if start[2] == kind and end[2] != kind)


def measure(folder: Path, case: str) -> tuple[dict[str, float], dict[str, float], float]:
    """One run: seconds of each kind by the outside clock and by the ledger, and its total."""
    trace = folder / "trace"
    command = [sys.executable, "-m", "launcher", "fit", "--model", "tests.benchmarks.goodput.Timed", "--data",
               "tests.benchmarks.goodput.Data", "--wandb.mode", "disabled", "--name", "it", "--devices", "2",
               "--max-restarts", "3", "--checkpoint.every_n_steps", str(EVERY), "--trainer.max_steps", str(STEPS),
               "--trainer.val_check_interval", "50", "--trainer.log_every_n_steps", "10",
               "--trainer.num_sanity_val_steps", "0"]  # fmt: skip
    env = {**os.environ, **CASES[case], "GOODPUT": str(trace), "OMP_NUM_THREADS": "1",
           "PYTHONPATH": str(Path(__file__).resolve().parents[2])}  # fmt: skip
    began = time.time()
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False)
    ended = time.time()
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    ledger = LedgerReader(read_events(folder / "runs/it/events.jsonl")).ledger()
    assert ledger is not None
    seconds = {kind: ledger.seconds(kind) for kind in ledger.microseconds}
    own = {
        **seconds,
        "start": seconds["start"] + seconds["agreement"],
        "steps": seconds["productive"],
        "failure": seconds["detection"] + seconds["restart"],
    }
    found = outside(trace, began)
    # The ledger ends with the last event, before the processes have ended.
    own["total"], found["total"] = ledger.total, ended - began
    return found, own, ended - began


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=CASES)
    options = parser.parse_args()
    worst, worst_after = 0.0, 0.0
    for case in options.cases:
        with tempfile.TemporaryDirectory() as folder:
            found, own, total = measure(Path(folder), case)
        after = total - found["start"]
        print(f"{case}: {total:.1f} s by the outside clock, {own['total']:.1f} s in the ledger, "
              f"{own['other']:.2f} s of them other")  # fmt: skip
        for kind in KINDS:
            difference = own.get(kind, 0.0) - found[kind]
            share, share_after = difference / total, difference / after
            worst, worst_after = max(worst, abs(share)), max(worst_after, abs(share_after))
            print(f"  {kind:12} outside {found[kind]:7.3f} s  ledger {own.get(kind, 0.0):7.3f} s  {share:+.2%}  "
                  f"{share_after:+.2%} without the start")  # fmt: skip
    print(f"largest difference: {worst:.2%} of a run's time, {worst_after:.2%} of its time without the start")


if __name__ == "__main__":
    main()
