"""Faults on a real SLURM of two nodes, at steps drawn from a seed: lost steps, final states bit by bit, hangs.

    python -m tests.benchmarks.slurm_faults [--faults preemption "time limit"] [--seeds 10] [--clusters 2] [--json FILE]

Each run is 2 nodes x 2 ranks of a small net with dropout under DDP, as `launcher submit` starts it. Its last checkpoint
(parameters, optimizer, scheduler, random states of all ranks) and the losses of all ranks are compared with those of
an undisturbed run. The clusters are started here (see `tests/support/slurm_cluster.py`) and run one job
each at a time; a line is printed, and appended to the file, as each run ends. A failed run writes a
report."""

from __future__ import annotations

import argparse
import contextlib
import json
import queue
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from launcher.training.rng_callback import KEY as RANDOM_STATES
from tests.support.runs import events_of, read_trace
from tests.support.slurm_cluster import Cluster
from tests.support.slurm_faults import FAULTS, Fault
from tests.support.slurm_jobs import Job, set_pace, submit

EPOCHS = 8
STEPS = 8 * EPOCHS
# Half of all steps remain; at the slow pace they take longer than SLURM's 30 s between two checks of limits.
FAULT_STEPS = range(2, STEPS // 2)
QUICK, SLOW = "0.15", "2"
MODEL = ("--model", "tests.support.slurm_paced.PacedToy", "--global_batch_size", "8", "--trainer.max_epochs",
         str(EPOCHS),
         "--checkpoint.every_n_steps", "5")  # fmt: skip
COMPARED = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch", RANDOM_STATES)
RANKS = range(4)


@dataclass(frozen=True)
class Outcome:
    """The result of one run.

    Attributes:
        fault: its name.
        seed: of the step.
        step: step of rank zero at the fault.
        ended: SLURM's state, or 'HANG'.
        attempts: number of attempts.
        steps_again: steps that were repeated.
        same_states: whether the final checkpoint equals the undisturbed run's, bit by bit.
        same_losses: whether each rank's last loss of each step does.
        same_wandb: whether all attempts had the same W&B id.
        seconds: from the fault to the first step of the next attempt; None without one.
        problem: difference from the expected result; empty if there is none.
    """

    fault: str
    seed: int
    step: int
    ended: str
    attempts: int
    steps_again: int
    same_states: bool
    same_losses: bool
    same_wandb: bool
    seconds: float | None
    problem: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", nargs="+", choices=list(FAULTS), default=list(FAULTS), metavar="FAULT")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--clusters", type=int, default=1)
    parser.add_argument("--json", type=Path, help="append one line for each run")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="slurm-faults-"))
    print(f"runs lie in {folder}", flush=True)
    # Seed by seed, so that an interrupted benchmark has results for all faults.
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    waiting: queue.SimpleQueue[tuple[Fault, int]] = queue.SimpleQueue()
    for seed in seeds:
        for name in options.faults:
            waiting.put((FAULTS[name], seed))
    outcomes: list[Outcome] = []
    with contextlib.ExitStack() as stack:
        clusters = [stack.enter_context(_cluster(folder / f"cluster-{n}")) for n in range(options.clusters)]
        undisturbed = submit(clusters[0], folder / "undisturbed", "undisturbed", *MODEL)
        if undisturbed.wait_for_end() != "COMPLETED":
            raise SystemExit(f"the undisturbed run failed\n{undisturbed.collect_output()}")
        threads = [
            threading.Thread(target=_work, args=(cluster, folder, waiting, undisturbed, outcomes, options.json))
            for cluster in clusters
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    print(table(outcomes))


@contextlib.contextmanager
def _cluster(folder: Path) -> Any:
    folder.mkdir()
    cluster = Cluster(folder)
    cluster.start()
    try:
        yield cluster
    finally:
        cluster.stop()


def _work(
    cluster: Cluster,
    folder: Path,
    waiting: queue.SimpleQueue[tuple[Fault, int]],
    undisturbed: Job,
    outcomes: list[Outcome],
    file: Path | None,
) -> None:
    while True:
        try:
            fault, seed = waiting.get_nowait()
        except queue.Empty:
            return
        outcome = one_run(cluster, folder / f"{fault.name.replace(' ', '-')}-{seed}", fault, seed, undisturbed)
        outcomes.append(outcome)
        line = json.dumps(asdict(outcome))
        print(line, flush=True)
        if file is not None:
            with file.open("a") as stream:
                stream.write(line + "\n")


def one_run(cluster: Cluster, folder: Path, fault: Fault, seed: int, undisturbed: Job) -> Outcome:
    """Train, cause the fault once, and compare with the undisturbed run."""
    folder.mkdir()
    pace = folder / "pace"
    set_pace(pace, QUICK)
    job = submit(cluster, folder, "it", *MODEL, "--partition", "low", "--signal-delay", "60", "--time", "10",
                 env={"PACE": str(pace)})  # fmt: skip
    ended, began, problem = "HANG", 0.0, ""
    step = random.Random(f"{fault.name} {seed}").choice(FAULT_STEPS)  # noqa: S311 -- no secret
    try:
        job.wait_for_step(step)
        set_pace(pace, SLOW)
        step, began = job.step, time.time()
        fault.inflict(job)
        try:
            if fault.requeues:
                job.wait_for("the requeue", lambda: int(job.cluster.job_field(job.job_id, "Restarts")) == 1)
            else:
                job.wait_for_step(job.step + 2)
        finally:
            fault.heal(job)
        pace.unlink()
        ended = job.wait_for_end()
    except AssertionError as error:
        problem = str(error)
    finally:
        cluster.command("scancel", job.job_id)
        job.wait_for("all nodes idle", lambda: cluster.node_states() == {"idle"})
    outcome = _judge(fault, seed, step, ended, began, job, undisturbed, problem.partition("\n")[0])
    if outcome.problem:
        (folder / "account.txt").write_text(f"{outcome}\n{problem or job.collect_output()}")
    return outcome


def _judge(
    fault: Fault, seed: int, step: int, ended: str, began: float, job: Job, undisturbed: Job, problem: str
) -> Outcome:
    starts = events_of(job.run, "run_started")
    later = [event["time"] for event in events_of(job.run, "first_step") if event["time"] > began]
    again = len(read_trace(job.trace)) - STEPS
    same_states = ended == "COMPLETED" and same(final_states(job), final_states(undisturbed))
    same_losses = all(_last_of_each_step(job, rank) == _last_of_each_step(undisturbed, rank) for rank in RANKS)
    same_wandb = len({event["wandb_id"] for event in starts}) == 1
    wrong = [
        text
        for text, is_so in (
            (f"ended as {ended}", ended != "COMPLETED"),
            (f"{again} steps lost", fault.warned and again != 0),
            (f"{len(starts)} attempts", len(starts) != 1 + fault.requeues),
            ("final states differ", ended == "COMPLETED" and not same_states),
            ("losses differ", ended == "COMPLETED" and not same_losses),
            ("several W&B ids", not same_wandb),
            (problem, problem),
        )
        if is_so
    ]
    seconds = round(later[-1] - began, 1) if fault.requeues and later else None
    return Outcome(fault.name, seed, step, ended, len(starts), again, same_states, same_losses, same_wandb, seconds,
                   "; ".join(wrong))  # fmt: skip


def final_states(job: Job) -> dict[str, Any]:
    """The compared parts of a run's last checkpoint."""
    content = torch.load(job.run / "checkpoints" / "last.ckpt", weights_only=True)
    return {key: content[key] for key in COMPARED}


def same(a: Any, b: Any) -> bool:
    """Whether two nested values are equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


def _last_of_each_step(job: Job, rank: int) -> dict[int, tuple[list[int], float]]:
    """Samples and loss of the last execution of each step."""
    return {step: (samples, loss) for step, samples, loss in read_trace(job.trace, rank)}


def table(outcomes: Sequence[Outcome]) -> str:
    """One line for each fault, in Markdown."""
    lines = [
        "| fault | runs | steps again (median, most) | equal states and losses | same W&B id | hangs | next step |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(outcome.fault for outcome in outcomes):
        runs = [outcome for outcome in outcomes if outcome.fault == name]
        equal = sum(run.same_states and run.same_losses for run in runs)
        again = [run.steps_again for run in runs]
        seconds = [run.seconds for run in runs if run.seconds is not None]
        took = f"{statistics.median(seconds):.0f} s, {max(seconds):.0f} s" if seconds else "not stopped"
        lines.append(
            f"| {name} | {len(runs)} | {statistics.median(again):g}, {max(again)} | {equal} "
            f"| {sum(run.same_wandb for run in runs)} | {sum(run.ended == 'HANG' for run in runs)} | {took} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
