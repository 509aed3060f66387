"""A third job back end, defined here alone: a folder with a file for each job, which some other program would run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from launcher.cli.main import run
from launcher.core.errors import Problem, QueueError, SubmitError
from launcher.core.events import EventLog
from launcher.jobs.backends import registry
from launcher.jobs.backends.base import JobBackend, JobStatus, Record, SubmittedJob
from launcher.jobs.submission import Submission
from slurm.job import SlurmJob

MODEL = ("--model", "my_pkg.Model", "--name", "it", "--no-snapshot", "--cluster", "mine")


class FileQueue(JobBackend):
    """Jobs as files in a folder: `<number>.job` with the command, `<number>.state` with the state.

    Args:
        folder: of the queue.
    """

    name = "mine"
    summary = "in a folder of files"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def check(self, job: SlurmJob) -> None:
        if job.nodes > 4:
            raise SubmitError([Problem("--nodes", f"given {job.nodes}; expected at most 4")])

    def submit(self, submission: Submission, cwd: Path) -> SubmittedJob:
        number = len(list(self.folder.glob("*.job"))) + 1
        if (self.folder / "full").exists():
            raise QueueError("the queue is full; wait")
        (self.folder / f"{number}.job").write_text(json.dumps([str(cwd), *submission.command]))
        self.set_state(number, "queued")
        return SubmittedJob({"job_id": number, "output": ["mine-*.txt"]}, f"file {number} is queued")

    def render(self, submission: Submission) -> str:
        return f"run {' '.join(submission.command[-2:])} on {submission.job.nodes} nodes\n"

    def statuses(self, records: Sequence[Record]) -> list[JobStatus]:
        return [JobStatus(self._file(record).read_text(), "by file") for record in records]  # type: ignore[arg-type]

    def cancel(self, record: Record) -> str:
        self._file(record).write_text("cancelled")
        return f"file {record['job_id']} is cancelled"

    def set_state(self, number: int, state: str) -> None:
        (self.folder / f"{number}.state").write_text(state)

    def _file(self, record: Record) -> Path:
        return self.folder / f"{record['job_id']}.state"


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileQueue]:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    queue = FileQueue(tmp_path / "queue")
    registry.register_backend(queue)
    yield queue
    registry.unregister_backend(queue.name)


@pytest.fixture
def launch(queue: FileQueue, capfd: pytest.CaptureFixture[str]) -> Any:
    def launch(*arguments: str, code: int = 0) -> tuple[str, str]:
        assert run(arguments) == code
        captured = capfd.readouterr()
        return captured.out, captured.err

    return launch


def test_the_back_end_is_in_the_help(queue: FileQueue, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        run(["submit", "--help"])
    help_text = " ".join(capsys.readouterr().out.split())
    assert "--cluster {slurm,local,mine}" in help_text
    assert "mine: in a folder of files" in help_text


def test_a_dry_run_prints_its_script_and_queues_nothing(queue: FileQueue, launch: Any) -> None:
    out, err = launch("submit", *MODEL, "--nodes", "2", "--dry-run")
    assert out == f"run --config {Path.cwd()}/runs/it/submissions/1/config.yaml on 2 nodes\n"
    assert "Plan" in err
    assert list(queue.folder.iterdir()) == []


def test_a_job_is_submitted_shown_and_cancelled(queue: FileQueue, launch: Any) -> None:
    assert launch("submit", *MODEL)[0] == "file 1 is queued\nrun it: launcher status it, logs, cancel\n"
    cwd, *command = json.loads((queue.folder / "1.job").read_text())
    assert (cwd, command[-1]) == (str(Path.cwd()), f"{Path.cwd()}/runs/it/submissions/1/config.yaml")
    assert "run 'it' is queued already (mine 1)" in launch("submit", *MODEL, code=2)[1]

    queue.set_state(1, "running")
    status = json.loads(launch("status", "it", "--json")[0])
    assert (status["state"], status["detail"], status["job"]) == ("running", "by file", "mine 1")
    assert "mine 1" in launch("status")[0]
    assert launch("cancel", "it")[0] == "file 1 is cancelled\n"
    assert launch("cancel", "it")[0] == "run it is not running: cancelled\n"
    launch("submit", *MODEL)
    assert (queue.folder / "2.job").exists()


def test_logs_and_status_find_the_output_of_a_job_without_ranks(queue: FileQueue, launch: Any) -> None:
    launch("submit", *MODEL)
    queue.set_state(1, "ended")
    Path("runs/it/submissions/1/mine-1.txt").write_text("error: no such class\n")
    out, _ = launch("logs", "it")
    assert out.endswith("mine-1.txt:\nerror: no such class\n")
    status = json.loads(launch("status", "it", "--json")[0])
    assert (status["state"], "no such class" in status["detail"]) == ("failed", True)
    assert "no such class" in launch("report", "it", code=2)[1]


def test_a_refused_job_leaves_no_file(queue: FileQueue, launch: Any) -> None:
    (queue.folder / "full").touch()
    assert launch("submit", *MODEL, code=1)[1] == "error: the queue is full; wait\n"
    assert "expected at most 4" in launch("submit", *MODEL, "--nodes", "8", code=2)[1]
    assert list(Path.cwd().iterdir()) == []


def test_a_sweep_is_a_job_for_each_member(queue: FileQueue, launch: Any) -> None:
    out, err = launch("submit", *MODEL, "--sweep", "seed=1,2,3", "--dry-run")
    assert (out, "it-2: seed=3" in err) == ("", True)
    out, _ = launch("submit", *MODEL, "--sweep", "seed=1,2,3", "--array", "0,2")
    assert out == "2 jobs were submitted\nsweep it: launcher status it, cancel\n"
    queue.set_state(1, "done")
    EventLog(Path("runs/it-0/events.jsonl"), 0).write("finished", step=5, metrics={"val_loss": 0.5})
    first, left_out, last = json.loads(launch("status", "it", "--json")[0])
    assert (first["run"]["state"], left_out["run"], last["run"]["state"]) == ("done", None, "queued")
    assert launch("cancel", "it")[0] == "file 2 is cancelled\n"
    assert launch("cancel", "it")[0] == "sweep it is not running\n"


def test_a_sweep_that_is_refused_midway_cancels_its_first_jobs(
    queue: FileQueue, launch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = queue.submit

    def submit_one(submission: Submission, cwd: Path) -> SubmittedJob:
        job = submit(submission, cwd)
        (queue.folder / "full").touch()
        return job

    monkeypatch.setattr(queue, "submit", submit_one)
    assert launch("submit", *MODEL, "--sweep", "seed=1,2", code=1)[1] == "error: the queue is full; wait\n"
    assert (queue.folder / "1.state").read_text() == "cancelled"
    assert list(Path.cwd().iterdir()) == []


def test_a_job_that_cannot_be_recorded_is_cancelled(queue: FileQueue, launch: Any) -> None:
    submit = queue.submit

    def block_record(submission: Submission, cwd: Path) -> SubmittedJob:
        (submission.folder / "submission.json").mkdir()
        return submit(submission, cwd)

    queue.submit = block_record  # type: ignore[method-assign]
    assert "job mine 1 was accepted and is now cancelled; choose" in launch("submit", *MODEL, code=2)[1]
    assert (queue.folder / "1.state").read_text() == "cancelled"


def test_a_record_of_an_unknown_back_end_is_reported(queue: FileQueue, launch: Any) -> None:
    launch("submit", *MODEL)
    registry.unregister_backend(queue.name)
    status = json.loads(launch("status", "it", "--json")[0])
    # The job may still run: its events decide, and it cannot be cancelled from here.
    assert (status["state"], status["job"]) == ("running", "mine")
    assert status["detail"] == "unknown job back end 'mine'; valid are slurm, local"
    assert "unknown job back end 'mine'" in launch("cancel", "it", code=1)[1]
    registry.register_backend(queue)


def test_an_installed_package_adds_its_back_end(tmp_path: Path) -> None:
    information = tmp_path / "my_queue-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: my-queue\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(
        "[launcher.job_backends]\nmine = my_queue:Mine\nbroken = no_such_module:Broken\nother = my_queue:Other\n"
    )
    # What cannot be read declares nothing.
    (tmp_path / "a_first-1.0.dist-info" / "entry_points.txt").mkdir(parents=True)
    (tmp_path / "my_queue.py").write_text(
        "from launcher.jobs.backends.local import LocalBackend\n"
        "class Mine(LocalBackend):\n    name, summary = 'mine', 'by my queue'\n"
        "class Other: name = 'other'\n"
    )
    program = (
        "from launcher.core.errors import QueueError\n"
        "from launcher.jobs.backends.registry import find_backend, list_backends\n"
        "print([backend.name for backend in list_backends()])\n"
        "for name in ('broken', 'other'):\n"
        "    try: find_backend(name)\n"
        "    except QueueError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(tmp_path)},
                          capture_output=True, text=True, timeout=60, check=True)  # fmt: skip
    assert "['slurm', 'local', 'mine']" in done.stdout
    assert "'broken' (my-queue cannot be loaded: ModuleNotFoundError" in done.stdout
    assert "my_queue:Other is of type Other; expected JobBackend" in done.stdout
