"""One of several gloo ranks that lose a rank in random programs: run as
`python -m tests.support.kept_programs FOLDER FIRST COUNT`.

One rank ends at a random place; the others lose it there, keep the state of the last step, and all continue from it.
Writes the differences to an uninterrupted run for each seed to FOLDER as `rank-<r>.json`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import sys
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from launcher.process.rank_status import RankStatusWriter
from launcher.runs.kept_state import find_kept_state
from launcher.training.resume.epoch_metrics import EpochMetrics
from launcher.training.resume.random_states import RandomStates
from launcher.training.survivors.keeper import StepKeeper
from launcher.training.survivors.saving import KeptFolders
from tests.support.resume_programs import Program, Trace, fit_program, new_folder, random_program, whole_steps

PLACES = ("forward", "backward", "validation", "epoch end", "epoch start")


class _KilledError(BaseException):
    """The end of the rank that is killed: nothing handles it."""


class _Loss(pl.Callback):
    """At a place of the batch or epoch `at`, rank `victim` ends, and the others lose it."""

    def __init__(self, place: str, at: int, victim: int) -> None:
        self.place, self.at, self.victim = place, at, victim
        self.steps_before = 0

    def _lose(self, trainer: Any, place: str) -> None:
        if place != self.place or trainer.sanity_checking or trainer.fit_loop.total_batch_idx < self.at:
            return
        self.steps_before = trainer.global_step
        if trainer.global_rank == self.victim:
            raise _KilledError
        raise RuntimeError("Connection closed by peer")

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        torch.rand(1)
        self._lose(trainer, "forward")

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        self._lose(trainer, "backward")

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *arguments: Any, **options: Any) -> None:
        self._lose(trainer, "validation")

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._lose(trainer, "epoch end")

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._lose(trainer, "epoch start")


@contextlib.contextmanager
def _group(folder: Path, rank: int, size: int) -> Any:
    store = dist.FileStore(str(folder), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def play(program: Program, folder: Path, rank: int, size: int, draw: random.Random) -> dict[str, Any]:
    """What differs from an uninterrupted run; nothing if the step was kept."""
    place, victim = draw.choice(PLACES), draw.randrange(size)
    at = draw.randrange(2, 14)
    whole, first, second = Trace(), Trace(), Trace()
    loss = _Loss(place, at, victim)
    kept_folder = folder / "kept"

    def more(metrics: EpochMetrics) -> Sequence[pl.Callback]:
        keeper = StepKeeper(KeptFolders(kept_folder, kept_folder, kept_folder), metrics, status, (RandomStates,))
        return [keeper, loss]

    status = RankStatusWriter(None, rank)
    folder.mkdir(exist_ok=True)
    with _group(folder / "store-1", rank, size):
        steps = whole_steps(program, folder)
        never = [_Loss("never", 0, 0)]
        fit_program(program, new_folder(folder / "whole"), whole, None, breaks=False, whole_steps=steps,
                    more=lambda _: never)  # fmt: skip
        new_folder(kept_folder)
        parts = new_folder(folder / "parts")
        ended = False
        try:
            fit_program(program, parts, first, None, breaks=False, whole_steps=steps, more=more)
            ended = True
        except (_KilledError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "closed by peer" not in str(error):
                raise
    with _group(folder / "store-2", rank, size):
        dist.barrier()
        state, notices = find_kept_state([kept_folder])
        not_kept = vars(status)["_values"].get("not_kept")
        result = {"place": place, "at": at, "victim": victim, "ended": ended, "notices": list(notices),
                  "not_kept": not_kept, "kept": state is not None, "found": []}  # fmt: skip
        if ended or state is None:
            return result
        fit_program(program, parts, second, state, breaks=False, whole_steps=steps, more=lambda _: never)
    merged = {**first.batches, **second.batches}
    found = [f"batch {key}: {whole.batches.get(key)} whole, {merged.get(key)} in parts"
             for key in sorted({*whole.batches, *merged}) if whole.batches.get(key) != merged.get(key)]  # fmt: skip
    again = [key for key, value in second.batches.items() if key in first.batches and value[1] < loss.steps_before]
    found += [f"batch {key} of a finished step was trained again" for key in again]
    valid = {**first.validations, **second.validations}
    steps_validated = sorted({*whole.validations, *valid})
    found += [f"validation at step {key}: {whole.validations.get(key)} whole, {valid.get(key)} in parts"
              for key in steps_validated if whole.validations.get(key) != valid.get(key)]  # fmt: skip
    found += [f"{key}: {value} whole, {second.end.get(key)} in parts" for key, value in whole.end.items()
              if second.end.get(key) != value]  # fmt: skip
    return {**result, "found": found[:4], "notices": second.notices}


def main(folder: Path, first: int, count: int) -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    seen: dict[str, Any] = {}
    for seed in range(first, first + count):
        print(f"rank {rank}: seed {seed}", flush=True)
        program = dataclasses.replace(random_program(seed), end="none")
        seen[str(seed)] = play(program, folder / str(seed), rank, size, random.Random(seed))  # noqa: S311 -- no secret
    (folder / f"rank-{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
