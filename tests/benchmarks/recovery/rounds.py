"""One round: start a training, kill ranks at a moment of a step, wait, and compare with an undisturbed run."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.benchmarks.recovery import trace
from tests.benchmarks.recovery.self_kill import VARIABLE, killed_file
from tests.benchmarks.recovery.training import BATCHES
from tests.support import warm
from tests.support.processes import descendants

REPOSITORY = Path(__file__).resolve().parents[3]
_POLL = 0.002


@dataclass(frozen=True)
class Launch:
    """How to start a training.

    Attributes:
        command: its command line.
        ranks: number of ranks that train.
        environment: additional variables.
        timeout: seconds after which a round has failed.
        patience: seconds from the kill to the end of the training.
        warm: start from a process that has imported torch and Lightning, which saves seconds; only for this Python.
    """

    command: Sequence[str]
    ranks: int
    environment: Mapping[str, str] = field(default_factory=dict)
    timeout: float = 240.0
    patience: float = 60.0
    warm: bool = False


@dataclass(frozen=True)
class Kill:
    """When to kill which ranks.

    Attributes:
        victims: the ranks.
        after: number of finished batches of the first victim.
        delay: seconds after it, for a random moment within the next step.
        moment: one of `self_kill.MOMENTS`, in which the first victim kills itself instead.
    """

    victims: tuple[int, ...]
    after: int
    delay: float
    moment: str = ""


@dataclass
class Outcome:
    """What a round showed.

    Attributes:
        folder: with the trace and the output of the run.
        code: exit code; None if it was ended at the time limit.
        killed: monotonic clock of the kill; None if none happened.
        seconds: from the kill to the end of the first new optimizer step; None if there was none.
        redone: optimizer steps that were done again.
        differences: the first difference to the undisturbed run of each kind (a rank's losses, a part of the states).
        problem: why the round does not count as one that went on; empty if it does.
    """

    folder: Path
    code: int | None = None
    killed: float | None = None
    seconds: float | None = None
    redone: int = 0
    differences: dict[str, str] = field(default_factory=dict)
    problem: str = ""

    @property
    def goes_on(self) -> bool:
        return not self.problem

    def same(self, *parts: str) -> bool:
        """Whether no part's name that starts with one of `parts` differs."""
        return self.goes_on and not any(name.startswith(parts) for name in self.differences)


def run(launch: Launch, folder: Path, kill: Kill | None, reference: Path | None = None) -> Outcome:
    """Run a round.

    Args:
        launch: how to start it.
        folder: an empty folder for the run; its output is in the file `output`.
        kill: None leaves the run undisturbed.
        reference: folder of the undisturbed run.
    """
    outcome = Outcome(folder)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), trace.FOLDER: str(folder),
                   "PYTHONUNBUFFERED": "1", **launch.environment}  # fmt: skip
    # As users have it: without compiled files each start compiles what it imports.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    if kill is not None and kill.moment:
        epoch, batch = divmod(kill.after, BATCHES)
        environment[VARIABLE] = f"{kill.victims[0]} {kill.moment} {epoch} {batch}"
    give_up = time.monotonic() + launch.timeout
    with (folder / "output").open("wb") as output:
        process = _start(launch, folder, environment, output.fileno())
        try:
            if kill is not None:
                outcome.killed = _kill(process, folder, kill, give_up)
                give_up = min(give_up, time.monotonic() + launch.patience)
            with contextlib.suppress(subprocess.TimeoutExpired, TimeoutError):
                outcome.code = process.wait(max(give_up - time.monotonic(), 0.1))
        finally:
            # torchrun's ranks have separate sessions and outlive it.
            for pid in (*descendants(process.pid), process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
    lines = {rank: trace.read(folder, rank) for rank in range(launch.ranks)}
    if outcome.killed is not None:
        outcome.seconds, outcome.redone = recovery(lines, outcome.killed)
    outcome.problem = _problem(outcome, kill)
    if reference is not None and outcome.goes_on:
        outcome.differences = differences(folder, reference, lines)
    return outcome


def _start(
    launch: Launch, folder: Path, environment: Mapping[str, str], output: int
) -> subprocess.Popen[bytes] | warm.WarmProcess:
    if launch.warm:
        return warm.start(launch.command[1:], folder, environment, output)
    return subprocess.Popen(launch.command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=output,
                            stderr=output, start_new_session=True)  # fmt: skip


def _kill(
    process: subprocess.Popen[bytes] | warm.WarmProcess, folder: Path, kill: Kill, give_up: float
) -> float | None:
    """Wait for the moment and kill; returns the time, or None if the run ended before."""
    file = killed_file(folder)
    if kill.moment:
        while not file.exists() or not file.read_text():
            if process.poll() is not None or time.monotonic() > give_up:
                return None
            time.sleep(_POLL)
        return float(file.read_text())
    while len(trace.read(folder, kill.victims[0])) < kill.after:
        if process.poll() is not None or time.monotonic() > give_up:
            return None
        time.sleep(_POLL)
    pids = [lines[-1].pid for rank in kill.victims if (lines := trace.read(folder, rank))]
    time.sleep(kill.delay)
    when = time.monotonic()
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return when


def _problem(outcome: Outcome, kill: Kill | None) -> str:
    if kill is not None and outcome.killed is None:
        return f"ended before the kill (exit code {outcome.code})"
    if outcome.code is None:
        return "did not end" if kill is None or outcome.seconds is not None else "no new step"
    if outcome.code != 0:
        return f"exit code {outcome.code}" + ("" if kill is None or outcome.seconds is not None else ", no new step")
    if not list(outcome.folder.glob("final-*.json")):
        return "no final state"
    return "no new step" if kill is not None and outcome.seconds is None else ""


def recovery(lines: Mapping[int, Sequence[trace.Line]], killed: float) -> tuple[float | None, int]:
    """Seconds from the kill to the end of the first step that had not been done before, and the steps done again.

    A step that was running and still ends on a survivor belongs to the old attempt (a process and its number).
    """
    every = [line for rank in lines.values() for line in rank]
    old = {(line.pid, line.attempt) for line in every if line.when <= killed}
    new = [line for line in every if (line.pid, line.attempt) not in old]
    if not new:
        return None, 0
    began = min(line.when for line in new)
    done = {line.at for line in every if (line.pid, line.attempt) in old and line.finished and line.when < began}
    last = max(done, default=(-1, -1))
    first = [line.when for line in new if line.finished and line.at > last]
    again = {line.at for line in new if line.finished and line.at <= last}
    return (min(first) - killed if first else None), len(again)


def differences(folder: Path, reference: Path, lines: Mapping[int, Sequence[trace.Line]]) -> dict[str, str]:
    """The first difference of each rank's losses, and the parts of the final states that differ."""
    found: dict[str, str] = {}
    trained = {line.at for own in lines.values() for line in own}
    for rank, own in lines.items():
        expected = {line.at: line.loss for line in trace.read(reference, rank)}
        wrong = [line for line in own if expected.get(line.at) != line.loss]
        # A rank that died after the step's reduction has no line of a batch that the others finished.
        missing = sorted(set(expected) - trained)
        if wrong:
            line, wanted = wrong[0], expected.get(wrong[0].at)
            relative = "" if wanted is None else f", expected {float.fromhex(wanted):.9g}"
            found[f"loss of rank {rank}"] = (
                f"{len(wrong)} of {len(own)} differ, first at epoch {line.epoch} batch {line.batch}: "
                f"{float.fromhex(line.loss):.9g}{relative}"
            )
        elif missing:
            found[f"loss of rank {rank}"] = f"no line for {len(missing)} batches, first {missing[0]}"
        final, wanted_final = folder / f"final-{rank}.json", reference / f"final-{rank}.json"
        if not wanted_final.exists():
            found[f"parameters of rank {rank}"] = "the undisturbed run has no final state of this rank"
            continue
        if not final.exists():
            found[f"parameters of rank {rank}"] = "no final state"
            continue
        states = json.loads(final.read_text())
        for part, value in json.loads(wanted_final.read_text()).items():
            if states.get(part) != value:
                found[f"{part} of rank {rank}"] = _entries(states.get(part), value)
    return found


def _entries(got: Any, expected: Any) -> str:
    """Which entries of a part have another SHA-256."""
    if not isinstance(got, dict) or not isinstance(expected, dict):
        return "another SHA-256"
    other = [name for name in {**expected, **got} if got.get(name) != expected.get(name)]
    return f"{len(other)} of {len(expected)} entries have another SHA-256: {', '.join(other[:4])}"


def largest_loss_difference(folder: Path, reference: Path, ranks: int) -> float:
    """The largest relative difference of a loss of any rank; what was done again counts as it was done last."""
    largest = 0.0
    for rank in range(ranks):
        expected = {line.at: float.fromhex(line.loss) for line in trace.read(reference, rank)}
        for at, loss in {line.at: float.fromhex(line.loss) for line in trace.read(folder, rank)}.items():
            if at in expected:
                largest = max(largest, abs(loss - expected[at]) / abs(expected[at]))
    return largest


def step_seconds(folder: Path, ranks: int) -> float:
    """The median time between finished batches of an undisturbed run."""
    gaps = sorted(
        after.when - before.when
        for rank in range(ranks)
        for lines in [trace.read(folder, rank)]
        for before, after in itertools.pairwise(lines[2:])
    )
    return gaps[len(gaps) // 2] if gaps else 0.0


def random_kill(chance: random.Random, victims: tuple[int, ...], window: tuple[int, int], step: float) -> Kill:
    """A kill after a random batch of the window, at a random moment of the next one."""
    return Kill(victims, chance.randint(*window), chance.uniform(0, step))
