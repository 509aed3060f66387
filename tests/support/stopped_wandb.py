"""A real training with a stopped W&B process: `python -m tests.support.stopped_wandb FOLDER`.

Writes its counts to FOLDER as `seen.json`, next to the W&B run.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import wandb
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from launcher import AmpWandbCallback
from tests.support.amp_ranks import Net

CAPACITY = 4
# The training ends after this many dropped rows.
ENOUGH = 10


class UntilDropped(pl.Callback):
    """Ends the training when enough rows were dropped, however large W&B's buffers are."""

    def __init__(self, amp: AmpWandbCallback) -> None:
        self.amp = amp

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.should_stop = self.amp.dropped >= ENOUGH


class CountedRows(AmpWandbCallback):
    """Counts the rows and alerts."""

    rows = alerted = 0

    @override
    def write(self, *arguments: Any) -> None:
        self.rows += 1
        super().write(*arguments)

    @override
    def alert(self, *arguments: Any) -> None:
        self.alerted += 1
        super().alert(*arguments)


def wandb_process() -> int:
    """W&B's process: the child named wandb-core."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                name, _, rest = (entry / "stat").read_text().rpartition(")")
            except OSError:
                continue
            if int(rest.split()[1]) == os.getpid() and "wandb-core" in name:
                return int(entry.name)
    raise LookupError("W&B has no process of its own")


def fill(run: Any, goes_on: threading.Event) -> None:
    """Write to the stopped process until its buffers are full."""
    while not goes_on.is_set():
        run.summary.update({"filler": "x" * 1_000_000})


def main(folder: Path) -> None:
    run = wandb.init(mode="offline", dir=str(folder), settings=wandb.Settings(silent=True, console="off"))
    amp = CountedRows(
        precision="32-true", every_n_steps=1, capacity=CAPACITY, on_notice=lambda text: notices.append(text)
    )
    notices: list[str] = []
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=-1, callbacks=[amp, UntilDropped(amp)], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    process = wandb_process()
    goes_on = threading.Event()
    filler = threading.Thread(target=fill, args=(run, goes_on))

    os.kill(process, signal.SIGSTOP)
    try:
        filler.start()
        trainer.fit(Net(), DataLoader(TensorDataset(torch.ones(64, 4)), batch_size=4))
        dropped, steps = amp.dropped, trainer.global_step
    finally:
        goes_on.set()
        os.kill(process, signal.SIGCONT)
    filler.join()
    assert amp.flush(60), "the row that was underway gets through"
    run.finish()
    wandb.teardown()
    seen = {"steps": steps, "rows": amp.rows, "alerted": amp.alerted, "dropped": dropped, "in_the_end": amp.dropped,
            "notices": notices}  # fmt: skip
    (folder / "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
