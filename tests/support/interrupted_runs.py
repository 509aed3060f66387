"""Runs of the toy that end early and resume, and their loss curve for any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.processes import Finished, run_warm, torchrun
from tests.support.runs import TOY, events_of, read_trace, toy_env, train_on
from tests.support.warm import DEEPSPEED

# 64 samples are 5 global batches of 12: two epochs are 10 steps, on 1, 2 and 3 ranks.
SETTINGS = (*TOY, "--global_batch_size", "12", "--trainer.max_epochs", "2")
STEPS = 10
INTERRUPTED = 130


def train(folder: Path, trace: str, ranks: int, *arguments: str, options: Sequence[str] = ()) -> Finished:
    env = toy_env(folder / trace)
    if options:
        return run_warm(torchrun(ranks, *SETTINGS, *arguments, options=options), folder, env=env)
    return train_on(ranks, (*SETTINGS, *arguments), folder, env, preloaded=DEEPSPEED)


def interrupt(folder: Path, trace: str, ranks: int, name: str, step: int, *arguments: str) -> None:
    """Train until SIGINT in `step`."""
    finished = train(folder, trace, ranks, "--name", name, "--model.signal_at", str(step), *arguments)
    finished.check(INTERRUPTED)
    steps = {event["step"] for event in events_of(folder / "runs" / name, "interrupted")}
    # The ranks agree on the step in which they stop.
    assert len(steps) == 1, finished.output
    assert steps <= {step + 1, step + 2}, finished.output


def run_uninterrupted(folder: Path) -> list[tuple[list[int], float]]:
    """The curve of the uninterrupted run, on one rank without DeepSpeed."""
    train_on(1, SETTINGS, folder, toy_env(folder / "trace")).check()
    return curve(folder, "trace")


def curve(folder: Path, trace: str) -> list[tuple[list[int], float]]:
    """For each step the samples of all ranks and their mean loss, for any number of ranks.

    What was done again counts as it was done last.
    """
    steps: dict[int, list[tuple[list[int], float]]] = {}
    for file in folder.glob(f"{trace}-[0-9]"):
        seen = read_trace(folder / trace, int(file.name[-1]))
        last = {(step, tuple(samples)): loss for step, samples, loss in seen}
        for (step, samples), loss in last.items():
            steps.setdefault(step, []).append((list(samples), loss))
    return [
        (
            sorted(n for samples, _ in parts for n in samples),
            sum(loss * len(samples) for samples, loss in parts) / sum(len(samples) for samples, _ in parts),
        )
        for _, parts in sorted(steps.items())
    ]


def assert_same(got: list[tuple[list[int], float]], expected: list[tuple[list[int], float]]) -> None:
    assert [samples for samples, _ in got] == [samples for samples, _ in expected]
    assert [loss for _, loss in got] == pytest.approx([loss for _, loss in expected], rel=1e-4)
