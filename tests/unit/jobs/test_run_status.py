"""`launcher status`, `logs` and `cancel`, by the run's name."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from launcher.cli import main as cli
from launcher.cli.status import describe_status, format_runs
from launcher.core.errors import NoSuchRunError
from launcher.core.events import EventLog
from launcher.jobs.backends.base import JobStatus
from launcher.jobs.backends.slurm import to_job_status
from launcher.jobs.logs import find_logs, follow_log, read_log
from launcher.jobs.status import read_run_status, summarize_events
from launcher.process.background import is_running, request_stop, start_detached, start_time
from launcher.runs.lookup import find_run_named, find_runs
from slurm.queue import JobState, QueueCommandError, cancel_job, read_job_state
from tests.support.processes import launcher
from tests.support.run_directories import config, make_run
from tests.support.stand_ins import StandIns

from launcher.runs.directory import open_run_directory  # isort: skip


def _submitted(runs: Path, name: str = "it", attempts: int = 0, **record: Any) -> Path:
    folder = runs / name / "submissions" / "1"
    folder.mkdir(parents=True)
    values = {"cluster": "slurm", "job_id": "42", "submitted": 0.0, "host": os.uname().nodename, **record}
    (folder / "submission.json").write_text(json.dumps(values))
    line = json.dumps({"job_id": "42", "number": 0, "step": 0, "time": 0.0, "host": "n1"})
    (folder / "attempts.jsonl").write_text(f"{line}\n" * attempts)
    return runs / name


def _events(run: Path, *kinds: tuple[str, dict[str, Any]]) -> None:
    log = EventLog(run / "events.jsonl", 0)
    for kind, fields in kinds:
        log.write(kind, **fields)


UNREPORTED = "no report at its end: killed, or the node was lost"
STARTED = ("run_started", {})
FINISHED = ("finished", {"step": 9, "metrics": {"loss": 0.5}})
FAILED = ("failed", {"error": "nan"})
MISSING = ("nodes_missing", {"nodes": [1, 3]})
STOPPED = ("interrupted", {"signal": 15, "step": 5})


@pytest.mark.parametrize(
    ("asked", "attempts", "events", "state", "detail"),
    [
        (JobState("PENDING", "(Resources)"), 0, [], "queued", "(Resources)"),
        (JobState("PENDING", "(BeginTime)"), 1, [STARTED, STOPPED], "requeued", "(BeginTime)"),
        (JobState("RUNNING", "n[1-2]"), 1, [STARTED], "running", "n[1-2]"),
        (JobState("COMPLETED", exit_code=0), 1, [STARTED, FINISHED], "done", "done after 9 steps"),
        (JobState("FAILED", exit_code=1), 1, [STARTED, FAILED], "failed", "FAILED, exit code 1: rank 0: nan"),
        (JobState("CANCELLED"), 1, [STARTED, STOPPED], "cancelled",
         "CANCELLED: the job was cancelled; stopped by SIGTERM at step 5; no checkpoint saved"),
        (JobState("FAILED", exit_code=2), 2, [STARTED, MISSING], "failed",
         "FAILED, exit code 2: nodes 1, 3 did not join"),
        (JobState("NODE_FAIL"), 1, [STARTED], "failed", "NODE_FAIL: a node of the job failed"),
        (JobState("TIMEOUT", exit_code=143), 1, [STARTED, STOPPED], "failed",
         "TIMEOUT: SLURM ended the job at its time limit; stopped by SIGTERM at step 5; no checkpoint saved"),
        (JobState("PREEMPTED"), 1, [STARTED], "failed", "PREEMPTED: SLURM preempted the job for another one"),
        (JobState("OUT_OF_MEMORY"), 1, [STARTED], "failed",
         "OUT_OF_MEMORY: SLURM killed the job: out of the memory it asked for"),
        (JobState("UNKNOWN"), 1, [STARTED, FINISHED], "done", "done after 9 steps; SLURM no longer knows the job"),
        (JobState("UNKNOWN"), 1, [STARTED], "ended",
         f"{UNREPORTED}; SLURM no longer knows the job"),
    ],
)  # fmt: skip
def test_the_state_combines_the_queue_and_the_events(
    tmp_path: Path, asked: JobState, attempts: int, events: list[Any], state: str, detail: str
) -> None:
    path = _submitted(tmp_path, attempts=attempts)
    _events(path, *events)
    status = read_run_status(path, to_job_status(asked))
    assert (status.state, status.detail, status.job, status.attempts) == (state, detail, "slurm 42", attempts)


def test_the_status_states_that_the_queue_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    path = _submitted(tmp_path, attempts=1)
    _events(path, STARTED, FINISHED)
    status = read_run_status(path)
    assert (status.state, status.step) == ("done", 9)
    assert "there is no squeue" in status.detail


def test_events_of_an_earlier_submission_do_not_end_this_one(tmp_path: Path) -> None:
    path = _submitted(tmp_path, submitted=4e9)
    _events(path, STARTED, FINISHED)
    assert read_run_status(path, JobStatus("ended")).state == "ended"


def test_a_run_that_was_not_submitted_is_running_while_its_directory_is_locked(tmp_path: Path) -> None:
    open_run = open_run_directory(config(tmp_path))
    _events(open_run.path, STARTED, ("step", {"step": 3, "metrics": {"loss": 2.0}}), ("checkpoint", {"step": 4}))
    status = read_run_status(open_run.path)
    assert (status.state, status.step, status.checkpoint_step, status.metrics) == ("running", 4, 4, {"loss": 2.0})
    open_run.release()
    assert read_run_status(open_run.path).state == "ended"
    _events(open_run.path, STOPPED)
    assert read_run_status(open_run.path).state == "stopped"


def test_a_later_attempt_clears_the_end_of_an_earlier_one(tmp_path: Path) -> None:
    _events(tmp_path, STARTED, ("failed", {"error": "x"}), STARTED)
    progress = summarize_events(tmp_path / "events.jsonl")
    assert (progress.attempts, progress.endings.find_ending("it")) == (2, None)


def test_an_unknown_name_lists_three_runs_and_suggests_a_similar_one(tmp_path: Path) -> None:
    for number in range(6):
        run = make_run(tmp_path, f"20261129-18000{number}-train")
        os.utime(run, (number, number))
    make_run(tmp_path, "baseline")
    with pytest.raises(NoSuchRunError) as error:
        find_run_named(tmp_path, "basline")
    newest = "20261129-180004-train, 20261129-180005-train, baseline"
    assert str(error.value) == (
        f"there is no run 'basline' in {tmp_path}; did you mean baseline? the newest are {newest}; "
        "`launcher status` lists 4 more"
    )


@pytest.mark.parametrize("name", ["none", "../it", "/etc", "", ".", "a/../it"])
def test_a_name_outside_the_runs_is_rejected(tmp_path: Path, name: str) -> None:
    make_run(tmp_path / "runs", "it")
    with pytest.raises(NoSuchRunError, match="the newest is it"):
        find_run_named(tmp_path / "runs", name)


def test_only_run_directories_are_found(tmp_path: Path) -> None:
    make_run(tmp_path, "a")
    _submitted(tmp_path, "b")
    (tmp_path / "other").mkdir()
    (tmp_path / "file").touch()
    assert {path.name for path in find_runs(tmp_path)} == {"a", "b"}
    assert find_runs(tmp_path / "none") == []


def test_logs_of_all_attempts_are_read_in_order(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    texts = {"0": "3", "0.1": "1", "0.2": "2", "0.10": "x", "01": "-", "1": "other"}
    for name, text in {f"rank-{key}.log": text for key, text in texts.items()}.items():
        (logs / name).write_text(text)
    assert [file.name for file in find_logs(tmp_path, 0)] == [
        "rank-0.1.log",
        "rank-0.2.log",
        "rank-0.10.log",
        "rank-0.log",
    ]
    assert b"".join(read_log(tmp_path, 0)) == b"12x3"
    with pytest.raises(NoSuchRunError, match=r"rank 7 of run .* has no log; ranks with a log: 0, 1"):
        list(read_log(tmp_path, 7))


def test_follow_continues_after_a_requeue_and_ends_with_the_run(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "rank-0.log"
    log.parent.mkdir()
    log.write_bytes(b"one ")
    ended = False

    def next_moment(_: float) -> None:
        nonlocal ended
        if log.read_bytes() == b"one ":
            with log.open("ab") as file:
                file.write(b"two ")
        elif log.read_bytes() == b"one two ":
            log.rename(log.with_name("rank-0.1.log"))
            log.write_bytes(b"three ")
        else:
            with log.open("ab") as file:
                file.write(b"four")
            ended = True

    assert b"".join(follow_log(tmp_path, 0, lambda: ended, next_moment)) == b"one two three four"


def test_a_detached_process_is_identified_by_its_start_time_too(tmp_path: Path) -> None:
    started = start_detached([sys.executable, "-c", "import signal; signal.pause()"], tmp_path, tmp_path)
    pid = started["pid"]
    assert os.getsid(pid) == pid != os.getsid(0)
    assert is_running(pid, started["started"])
    assert not is_running(pid, started["started"] - 1)
    assert not request_stop(pid, started["started"] - 1), "another process with that number gets no signal"
    assert is_running(pid, start_time(pid))
    assert request_stop(pid, started["started"])
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM
    assert not request_stop(pid, started["started"])


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIns:
    stand_ins = StandIns(tmp_path / "bin", {"squeue": (0, "", ""), "sacct": (0, "", ""), "scancel": (0, "", "")})
    monkeypatch.setenv("PATH", stand_ins.env["PATH"])
    return stand_ins


@pytest.mark.parametrize(
    ("squeue", "sacct", "state"),
    [
        ((0, "RUNNING|n[1-2]\n", ""), (0, "", ""), JobState("RUNNING", "n[1-2]")),
        ((0, "PENDING|(Priority)\n", ""), (1, "", "slurmdbd is down"), JobState("PENDING", "(Priority)")),
        ((0, "", ""), (0, "CANCELLED by 1000|0:15|n1\n", ""), JobState("CANCELLED", "n1", 143)),
        (
            (1, "", "slurm_load_jobs error: Invalid job id specified"),
            (0, "FAILED|75:0|n1\n", ""),
            JobState("FAILED", "n1", 75),
        ),
        ((0, "COMPLETED|n1\n", ""), (0, "", ""), JobState("COMPLETED")),
        ((0, "", ""), (0, "", ""), JobState("UNKNOWN")),
    ],
)
def test_the_job_state_is_read_from_squeue_and_sacct(slurm: StandIns, squeue: Any, sacct: Any, state: JobState) -> None:
    slurm.answer(squeue=squeue, sacct=sacct)
    assert read_job_state("42") == state


def test_the_error_has_the_message_of_squeue(slurm: StandIns) -> None:
    slurm.answer(squeue=(1, "", "slurm_load_jobs error: Unable to contact slurm controller"))
    with pytest.raises(QueueCommandError, match=r"squeue: .*Unable to contact"):
        read_job_state("42")


@pytest.mark.parametrize("job_id", ["", "1; rm", "-u root", "a", "1_"])
def test_only_a_job_number_is_passed_to_slurm(slurm: StandIns, job_id: str) -> None:
    with pytest.raises(QueueCommandError, match="expected a number"):
        cancel_job(job_id)
    assert slurm.calls("scancel") == []


def test_status_logs_and_cancel_find_a_run_by_name(
    tmp_path: Path, slurm: StandIns, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def output(*arguments: str, code: int = 0) -> str:
        assert cli.run(arguments) == code
        shown = capsys.readouterr()
        return shown.out + shown.err

    monkeypatch.chdir(tmp_path)
    path = _submitted(tmp_path / "runs", attempts=1)
    _events(path, STARTED, ("step", {"step": 3, "metrics": {"[red]loss": 0.25}}))
    (path / "logs").mkdir()
    (path / "logs" / "rank-0.log").write_text("a line\n")
    slurm.answer(squeue=(0, "RUNNING|n[1-2]\n", ""))

    shown = output("status")
    assert "running" in shown
    assert "[red]loss 0.25" in shown, "a name is not read as markup"
    asked = json.loads(output("status", "it", "--json"))
    assert (asked["name"], asked["state"], asked["job"], asked["step"]) == ("it", "running", "slurm 42", 3)
    assert output("logs", "it") == "a line\n"
    assert "no log; ranks with a log: 0" in output("logs", "it", "--rank", "5", code=2)
    assert "is cancelled" in output("cancel", "it")
    assert slurm.calls("scancel") == [["42"]]
    for command in ("status", "logs", "cancel"):
        assert output(command, "nope", code=2) == "error: there is no run 'nope' in runs; the newest is it\n"
    slurm.answer(scancel=(1, "", "scancel: error: Kill job error on job id 42: Access denied"))
    assert "Access denied" in output("cancel", "it", code=1)
    slurm.answer(squeue=(0, "", ""))
    assert "is not running" in output("cancel", "it")


def test_cancel_reports_a_process_that_no_back_end_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    opened = open_run_directory(config(tmp_path / "runs", name="it"))
    assert cli.run(["cancel", "it"]) == 1
    process = f"process {os.getpid()} on {os.uname().nodename}"
    assert f"run 'it' was not submitted; {process} trains it; to save and stop, use Ctrl-C" in capsys.readouterr().err
    folder = opened.path / "submissions" / "1"
    folder.mkdir(parents=True)
    (folder / "submission.json").write_text(json.dumps({"cluster": "local", "pid": 0, "started": 1}))
    assert cli.run(["cancel", "it"]) == 1
    assert "process 0 does not run on this machine; to save and stop, send SIGTERM" in capsys.readouterr().err
    opened.release()
    assert cli.run(["cancel", "it"]) == 0


def test_a_closed_pipe_ends_the_command_without_an_error(tmp_path: Path) -> None:
    path = _submitted(tmp_path / "runs")
    (path / "logs").mkdir()
    (path / "logs" / "rank-0.log").write_bytes(b"x" * 1_000_000)
    with subprocess.Popen(
        launcher("logs", "it"), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        timer = threading.Timer(60, process.kill)
        timer.start()
        assert process.stderr.read() == b""
        timer.cancel()
        assert process.wait() == 0


OUTPUT = """notice: job 42 has 2 nodes
error: the config has 1 problem:
  model.class_path: no.Such does not import; mend that
run it ended with exit code 2 on node 0
"""
REASON = "the config has 1 problem: model.class_path: no.Such does not import; mend that"


def _silent(runs: Path, kind: str) -> tuple[Path, Path]:
    """A run whose job ended before a rank started, and the file with its output."""
    if kind == "local":
        run = _submitted(runs, cluster="local", pid=0, started=None, submitted=5.0)
        file = run / "submissions/1/output.log"
    elif kind == "slurm":
        run = _submitted(runs, submitted=5.0)
        file = run / "submissions/1/42_0_log.err"
        (run / "submissions/1/42_0_log.out").write_text("nothing of use\n")
    else:
        run = _submitted(runs, "sweep-1", job_id="42_1", submitted=5.0, sweep="sweep")
        file = runs / "sweep/arrays/1/42_1_0_log.err"
        file.parent.mkdir(parents=True)
    file.write_text(OUTPUT)
    return run, file


@pytest.mark.parametrize("kind", ["local", "slurm", "member"])
@pytest.mark.parametrize("earlier", [False, True])
def test_the_status_of_a_job_without_ranks_has_the_error_of_its_output(
    tmp_path: Path, kind: str, earlier: bool, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    run, file = _silent(tmp_path, kind)
    if earlier:
        # Of an earlier submission.
        log = EventLog(run / "events.jsonl", 0, clock=lambda: 1.0)
        log.write("run_started")
        log.write("finished", step=9, metrics={})
        (run / "logs").mkdir()
        (run / "logs/rank-0.log").write_text("trained\n")
    status = read_run_status(run, JobStatus("failed"))
    assert status.state == "failed"
    assert status.detail.endswith(f"{REASON} ({file})")
    assert read_run_status(run, JobStatus("ended")).state == "failed"

    shown = b"".join(read_log(run, 0)).decode()
    assert shown.endswith(OUTPUT)
    assert str(file) in shown
    assert shown.startswith("trained" if earlier else "no rank of the newest job has started")
    assert b"".join(follow_log(run, 0, lambda: True)).decode() == shown

    code = cli.run(["report", run.name, "--runs-dir", str(tmp_path)])
    printed = b"".join(capsysbinary.readouterr()).decode()
    assert (code, REASON in printed, str(file) in printed) == (0 if earlier else 2, True, True)


def test_the_status_of_a_job_with_ranks_comes_from_its_events(tmp_path: Path) -> None:
    run, _ = _silent(tmp_path, "local")
    _events(run, STARTED, FAILED)
    (run / "logs").mkdir()
    (run / "logs/rank-0.log").write_text("trained\n")
    assert (read_run_status(run).detail, b"".join(read_log(run, 0))) == ("rank 0: nan", b"trained\n")


def test_the_status_of_a_job_without_an_error_has_its_last_line(tmp_path: Path) -> None:
    run, file = _silent(tmp_path, "local")
    file.write_text("Traceback (most recent call last):\n  here\nImportError: no launcher\n\n")
    status = read_run_status(run)
    assert (status.state, status.detail) == ("failed", f"its last line: ImportError: no launcher ({file})")


def test_a_job_without_output_has_ended_without_a_reason(tmp_path: Path) -> None:
    run, file = _silent(tmp_path, "local")
    file.write_text("")
    status = read_run_status(run)
    assert (status.state, status.detail) == ("ended", "")
    with pytest.raises(NoSuchRunError, match="no rank has started yet"):
        list(read_log(run, 0))


@pytest.mark.parametrize("arguments", [None, 'train(..., name="it", resume_from_checkpoint="auto")'])
@pytest.mark.parametrize("ending", [FAILED, STOPPED, ("notice", {"message": "the last event"})])
def test_no_command_continues_a_run_that_python_code_started(
    tmp_path: Path, arguments: str | None, ending: tuple[str, dict[str, Any]]
) -> None:
    run = tmp_path / "it"
    run.mkdir()
    _events(run, ("run_started", {"continue_with": arguments}), ("planned", {"plan": {}}),
            ("checkpoint", {"step": 5, "epoch": 0}), ending)  # fmt: skip
    status = read_run_status(run)
    assert (status.command == "") == (arguments is not None)
    assert (arguments or "--resume auto") in status.advice


@pytest.mark.parametrize(
    ("plans", "added"),
    [
        ([{"world_size": 1, "num_nodes": 1}], ""),
        ([{"world_size": 2, "num_nodes": 1}], " --nproc-per-node 2"),
        ([{"world_size": 2, "num_nodes": 1}, {"world_size": 4, "num_nodes": 1}], " --nproc-per-node 4"),
        (
            [{"world_size": 8, "num_nodes": 2, "hosts": ["a", "b"]}],
            " --nnodes 2 --rdzv-endpoint a:29400 --nproc-per-node 4",
        ),
        ([{}], ""),
        ([{"world_size": "2", "num_nodes": 1}], ""),
        ([None], ""),
    ],
)
@pytest.mark.parametrize("name", ["it", "a run"])
def test_the_command_continues_on_as_many_ranks(tmp_path: Path, name: str, plans: list[Any], added: str) -> None:
    run = tmp_path / name
    run.mkdir()
    _events(run, *[event for plan in plans for event in (STARTED, ("planned", {"plan": plan}))],
            ("checkpoint", {"step": 5, "epoch": 0}), STOPPED)  # fmt: skip
    config_file = shlex.quote(f"{run}/config.yaml")
    assert read_run_status(run).command == f"launcher fit --config {config_file} --resume auto{added}"


def test_a_notice_about_a_possible_hang_stays_until_it_is_over(tmp_path: Path) -> None:
    open_run = open_run_directory(config(tmp_path))
    notice = ("hang_suspected", {"message": "possible hang: rank 1 sleeps"})
    _events(open_run.path, STARTED, notice)
    status = read_run_status(open_run.path)
    assert status.to_dict()["hang"] == "possible hang: rank 1 sleeps"
    assert describe_status(status) == ["possible hang: rank 1 sleeps"]
    assert "  possible hang: rank 1 sleeps" in format_runs([status], 80)
    _events(open_run.path, ("hang_over", {}))
    assert read_run_status(open_run.path).hang == ""
    _events(open_run.path, notice)
    open_run.release()
    assert read_run_status(open_run.path).hang == "", "the run has ended"
