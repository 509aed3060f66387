"""Submits the toy to the test cluster and waits for its results."""

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

# Seconds; longer than any of these jobs takes on a busy machine.
PATIENCE = 150.0
# The nodes share the machine's clock, disk and CPUs.
RANKS = ("--accelerator", "cpu", "--devices", "2", "--nodes", "2", "--cpus-per-task", "4")


@dataclass(frozen=True)
class Job:
    """One submitted run.

    Attributes:
        cluster: the cluster.
        cwd: folder of the submission.
        name: name of the run.
        job_id: SLURM's job id.
        trace: prefix of the ranks' trace files.
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
        """SLURM's job state."""
        return self.cluster.job_field(self.job_id, "JobState")

    def wait_for(self, what: str, done: Callable[[], object]) -> None:
        """Wait; after a timeout fail with the job's output."""
        try:
            wait_until(what, done, PATIENCE)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.collect_output()}") from None

    def wait_for_step(self, step: int, *, attempts: int = 1) -> None:
        """Wait until rank zero has done a step in its n-th attempt."""
        self.wait_for(f"step {step} of attempt {attempts}", lambda: self.attempts >= attempts and self.step >= step)

    def wait_for_end(self) -> str:
        """Wait for the end of the job and return SLURM's state."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        self.wait_for("the end", lambda: self.state in ended)
        return self.state

    @property
    def attempts(self) -> int:
        """Number of attempts."""
        return len(events_of(self.run, "run_started")) if (self.run / "events.jsonl").exists() else 0

    @property
    def step(self) -> int:
        """The last step in rank zero's trace."""
        try:
            lines = Path(f"{self.trace}-0").read_text().splitlines()
            return json.loads(lines[-1])[0]
        except (OSError, IndexError, ValueError):
            return 0

    def rank_log(self, rank: int) -> str:
        """A rank's output so far, of all attempts."""
        file = self.run / "logs" / f"rank-{rank}.log"
        return file.read_text(errors="replace") if file.exists() else ""

    def collect_output(self) -> str:
        """The output of the job's tasks and ranks, and SLURM's job record."""
        files = [*sorted(self.run.glob("submissions/*/*_log.*")), *sorted(self.run.glob("logs/*.log"))]
        texts = [f"== {file.relative_to(self.run)}\n{file.read_text(errors='replace')[-4000:]}" for file in files]
        shown = self.cluster.command("scontrol", "show", "job", self.job_id)
        return "\n".join([shown, *texts, self.cluster.log_tails()])


def run_launcher(
    cluster: Cluster, cwd: Path, *given: str, code: int = 0, env: dict[str, str] | None = None
) -> Finished:
    """Run one `launcher` command against the cluster."""
    environment = {**cluster.env, "PYTHONPATH": str(REPOSITORY), **(env or {})}
    return run(launcher(*given), cwd, env=environment, timeout=PATIENCE).check(code)


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
    """Set the duration of the paced toy's steps. Atomic, because the steps read it at any time."""
    written = pace.with_suffix(".new")
    written.write_text(seconds)
    written.replace(pace)
