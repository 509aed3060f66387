"""Submitting the toy to the cluster of the tests, and waiting for what becomes of it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.support.processes import Finished, launcher, run
from tests.support.runs import REPOSITORY, TOY, events_of
from tests.support.slurm_cluster import Cluster, wait_until

# Longer than any of these jobs takes on a slow machine with others on it.
PATIENCE = 150.0
# The nodes are the machine itself: its clock, disk and CPUs.
RANKS = ("--accelerator", "cpu", "--devices", "2", "--nodes", "2", "--cpus-per-task", "4")


@dataclass(frozen=True)
class Job:
    """One submitted run.

    Attributes:
        cluster: where it is.
        cwd: where it was submitted.
        name: of the run.
        job_id: of SLURM's.
        trace: where its ranks write what they saw.
    """

    cluster: Cluster
    cwd: Path
    name: str
    job_id: str
    trace: Path

    @property
    def run(self) -> Path:
        """The run's directory."""
        return self.cwd / "runs" / self.name

    @property
    def state(self) -> str:
        """SLURM's word for how it stands."""
        return self.cluster.job_field(self.job_id, "JobState")

    def wait_for(self, what: str, done: Callable[[], object]) -> None:
        """Wait; shows everything that the job has said if it takes too long."""
        try:
            wait_until(what, done, PATIENCE)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.collect_output()}") from None

    def wait_for_step(self, step: int, *, attempts: int = 1) -> None:
        """Until rank zero has done a step, in its n-th attempt."""
        self.wait_for(f"step {step} of attempt {attempts}", lambda: self.attempts >= attempts and self.step >= step)

    def wait_for_end(self) -> str:
        """Until nothing more comes of it; SLURM's word for how it ended."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        self.wait_for("the end", lambda: self.state in ended)
        return self.state

    @property
    def attempts(self) -> int:
        """How often a training began."""
        return len(events_of(self.run, "run_started")) if (self.run / "events.jsonl").exists() else 0

    @property
    def step(self) -> int:
        """The last step that rank zero was seen in."""
        try:
            lines = Path(f"{self.trace}-0").read_text().splitlines()
            return json.loads(lines[-1])[0]
        except (OSError, IndexError, ValueError):
            return 0

    def rank_log(self, rank: int) -> str:
        """What a rank has said so far, in all attempts."""
        file = self.run / "logs" / f"rank-{rank}.log"
        return file.read_text(errors="replace") if file.exists() else ""

    def collect_output(self) -> str:
        """All that the job's tasks and ranks have said, and SLURM of it."""
        files = [*sorted(self.run.glob("submissions/*/*_log.*")), *sorted(self.run.glob("logs/*.log"))]
        texts = [f"== {file.relative_to(self.run)}\n{file.read_text(errors='replace')[-4000:]}" for file in files]
        shown = self.cluster.command("scontrol", "show", "job", self.job_id)
        return "\n".join([shown, *texts, self.cluster.log_tails()])


def run_launcher(
    cluster: Cluster, cwd: Path, *given: str, code: int = 0, env: dict[str, str] | None = None
) -> Finished:
    """Run one `launcher` command against the cluster."""
    whole = {**cluster.env, "PYTHONPATH": str(REPOSITORY), **(env or {})}
    return run(launcher(*given), cwd, env=whole, timeout=PATIENCE).check(code)


def submit(cluster: Cluster, folder: Path, name: str, *given: str, env: dict[str, str] | None = None) -> Job:
    """Submit the toy, 2 nodes x 2 ranks."""
    folder.mkdir(exist_ok=True)
    trace = folder / f"trace-{name}"
    own = {"TRACE": str(trace), "OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"], **(env or {})}
    export = [word for variable in ("TRACE", *(env or {})) for word in ("--export-env", variable)]
    output = run_launcher(cluster, folder, "submit", *RANKS, *export, *TOY, "--name", name, *given, env=own).output
    found = re.search(r"job (\d+) is queued", output)
    assert found is not None, output
    return Job(cluster, folder, name, found[1], trace)


def set_pace(pace: Path, seconds: str) -> None:
    """Set how long the paced toy's steps take; in one go, as they read it at any time."""
    written = pace.with_suffix(".new")
    written.write_text(seconds)
    written.replace(pace)
