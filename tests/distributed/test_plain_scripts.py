"""`launcher run`: plain scripts behave as under torchrun, with the launcher's logs, restarts and failure report."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.documentation import write_user_files
from tests.support.plain_scripts import ENDS, MODEL, SEEN, TRAIN
from tests.support.processes import Finished, launcher, run, run_warm

pytestmark = pytest.mark.slow
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ENV = {"OMP_NUM_THREADS": "1"}


def _events(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "runs" / name / "events.jsonl").read_text().splitlines()]


def _status(folder: Path, name: str) -> dict[str, Any]:
    done = run_warm(launcher("status", name, "--json"), folder).check()
    return json.loads(done.output)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What the two ranks of a script see, under torchrun and under `launcher run`."""
    folder = tmp_path_factory.mktemp("seen")
    (folder / "inner").mkdir()
    (folder / "inner" / "seen.py").write_text(SEEN)
    # The fork server has imported installed modules of these names.
    for name in ("mpmath", "strategies"):
        (folder / "inner" / f"{name}.py").write_text("OWN = 1\n")
    found: dict[str, list[dict[str, Any]]] = {}
    flags = ["--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    script = ["inner/seen.py", "--a", "b c", "--", "-x"]
    env = {"PYTHONPATH": str(Path(__file__).parents[2])}
    for who, command in (("torchrun", TORCHRUN), ("launcher", launcher("run"))):
        # PYTHONUNBUFFERED is set by `run`: the streams are unbuffered as under torchrun without it.
        run([*command, *flags, *script], folder, env={**env, "SEEN": who}).check()
        found[who] = [json.loads((folder / f"{who}-{rank}.json").read_text()) for rank in range(2)]
    return found


@pytest.mark.parametrize("rank", [0, 1])
def test_a_script_sees_what_it_sees_under_torchrun(seen: dict[str, list[dict[str, Any]]], rank: int) -> None:
    assert seen["launcher"][rank] == seen["torchrun"][rank]
    assert seen["launcher"][rank]["pools"] == [[42], [42], [42]]


def _end_of_all_ranks(output: str) -> str:
    """What all ranks print of their parameters at the end."""
    (end,) = {line.rpartition(" ")[2] for line in output.splitlines() if "ended with" in line}
    return end


def test_a_module_of_a_package_starts_spawned_loader_workers(tmp_path: Path) -> None:
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").write_text("")
    (tmp_path / "pkg" / "model.py").write_text(MODEL)
    (tmp_path / "pkg" / "train.py").write_text(TRAIN.replace("IMPORT", "from .model import make_model"))
    command = launcher("run", "--nproc-per-node", "2", "-m", "pkg.train", "--workers", "spawn", "--steps", "1")
    output = run_warm(command, tmp_path, env=ENV).check().output
    assert "[rank 1] rank 1 starts at step 0" in output.splitlines()
    assert _end_of_all_ranks(output)


def test_a_killed_rank_is_restarted_and_the_script_resumes_from_its_own_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "model.py").write_text(MODEL)
    (tmp_path / "scripts" / "train.py").write_text(TRAIN.replace("IMPORT", "from model import make_model"))
    script = ["scripts/train.py"]
    flags = ["--nproc-per-node", "2", "--max-restarts", "1", "--name", "ddp"]
    done = run_warm(launcher("run", *flags, *script, "--lr", "0.1", "--kill-at", "2"), tmp_path, env=ENV).check()
    assert "error: rank 1 " in done.output
    assert "failed first: killed by SIGKILL (signal 9)\n" in done.output
    assert "\n  restart 1 of 1\n" in done.output
    lines = done.output.splitlines()
    assert "rank 0 starts at step 0" in lines
    assert "rank 0 starts at step 2" in lines
    assert "[rank 1] rank 1 starts at step 2" in lines
    assert _end_of_all_ranks(done.output)
    logs = tmp_path / "runs" / "ddp" / "logs"
    assert sorted(file.name for file in logs.iterdir()) == [
        "rank-0.1.log", "rank-0.log", "rank-1.1.log", "rank-1.log"]  # fmt: skip
    assert "rank 1 starts at step 2\n" in (logs / "rank-1.log").read_text()
    status = _status(tmp_path, "ddp")
    assert (status["state"], status["attempts"]) == ("done", 2)
    assert [event["kind"] for event in _events(tmp_path, "ddp")] == [
        "run_started", "rank_failed", "run_started", "finished"]  # fmt: skip


def _end(how: str, folder: Path, *flags: str, ranks: int = 3, **options: Any) -> Finished:
    (folder / "ends.py").write_text(ENDS)
    command = launcher("run", "--nproc-per-node", str(ranks), "--name", "ends", *flags, "ends.py", how)
    return run_warm(command, folder, env=ENV, **options)


@pytest.mark.parametrize("how", ["before", "after"])
def test_the_first_failure_is_reported_once(how: str, tmp_path: Path) -> None:
    output = _end(how, tmp_path).check(1).output
    assert output.count("Traceback (most recent call last)") == 1, output
    assert output.count("    | ValueError: bad data in rank 1\n") == 1, output
    report = output[output.index("error: rank 1 ") :]
    assert "failed first: ValueError: bad data in rank 1\n  its last lines (runs/ends/logs/rank-1.log):\n" in report
    assert '    |   File "' + str(tmp_path / "ends.py") + '", line ' in report
    assert "launcher/agent" not in report, "the traceback begins in the script"
    if how == "after":
        assert report.count(": lost the connection to another rank (") == 2
    status = _status(tmp_path, "ends")
    assert status["state"] == "failed"
    assert "ValueError: bad data in rank 1" in status["detail"]


@pytest.mark.parametrize(("how", "code", "shown"), [("code", 255, []), ("exit", 5, ["flushed"]), ("wrong", 2, [])])
def test_an_exit_code_of_the_script_is_that_of_the_command(
    how: str, code: int, shown: list[str], tmp_path: Path
) -> None:
    output = _end(how, tmp_path).check(code).output
    for text in shown:
        assert text in output.splitlines()
    report = f"error: all 3 ranks exited with code {code}; the output is in runs/ends/logs/rank-0.log\n"
    assert report in output
    # argparse's error is shown once, and is in the log of every rank.
    assert output.count("invalid choice: 'wrong'") == (how == "wrong")
    for rank in range(3):
        log = (tmp_path / "runs" / "ends" / "logs" / f"rank-{rank}.log").read_text()
        assert ("invalid choice: 'wrong'" in log) == (how == "wrong")
        assert (f"exit function of {rank}" in log) == (how == "code")
    if how == "code":
        assert _status(tmp_path, "ends")["detail"].endswith(" ended with exit code 255"), "not a lost fork server"


def _send_when_two_wait(number: int) -> Callable[[str, int], None]:
    """Receives the lines of the agent, to which it sends a signal."""
    waiting: list[str] = []

    def stop(line: str, process: int) -> None:
        waiting.extend([line] if "waiting" in line else [])
        if "waiting" in line and len(waiting) == 2:
            os.kill(process, number)

    return stop


def test_a_signal_lets_every_rank_save(tmp_path: Path) -> None:
    output = (
        _end("save", tmp_path, ranks=2, on_line=_send_when_two_wait(signal.SIGQUIT)).check(128 + signal.SIGQUIT).output
    )
    assert output.count("saved\n") == 2
    assert output.endswith(
        "stopped by SIGQUIT; all ranks ended with exit code 0; the output of all ranks is in runs/ends/logs\n"
    )
    assert "SignalException" not in output
    assert _status(tmp_path, "ends")["state"] == "stopped"


def test_an_interrupt_that_python_ignores_ends_the_ranks(tmp_path: Path) -> None:
    output = (
        _end("lose", tmp_path, ranks=2, on_line=_send_when_two_wait(signal.SIGINT)).check(128 + signal.SIGINT).output
    )
    assert "trained on" not in output
    assert "Ctrl-C: waiting for the ranks to end, at most 120 s; Ctrl-C again kills them\n" in output
    assert output.endswith("stopped by Ctrl-C; the output of all ranks is in runs/ends/logs\n")


def test_a_crash_is_reported_once(tmp_path: Path) -> None:
    output = _end("crash", tmp_path, ranks=2).check(128 + signal.SIGSEGV).output
    assert output.count("Fatal Python error") == 1
    assert output.count(" in crash_here\n") == 1


def test_a_hang_names_the_rank_that_the_others_wait_for(tmp_path: Path) -> None:
    output = _end("hang", tmp_path, "--hang-timeout", "2", ranks=2).check(1).output
    assert (
        "hang: no rank has entered a collective for 2 s; the other ranks wait for rank 1; stacks of all ranks: "
        in output
    )
    assert "failed first: hung: it was in " in output
    assert ", in hang_here" in output
    assert [event["waiting_for"] for event in _events(tmp_path, "ends") if event["kind"] == "hang"] == [[1]]


def test_output_of_selected_ranks_and_a_second_run_with_the_same_name(tmp_path: Path) -> None:
    output = _end("fine", tmp_path, "--local-ranks-filter", "1", "--preload", "none", ranks=2).check().output
    lines = [line for line in output.splitlines() if "[Gloo]" not in line]  # torch 2.10 prints its connections
    assert lines == ["[rank 1] last line without an endexit function of 1"]
    log = tmp_path / "runs" / "ends" / "logs" / "rank-0.log"
    assert log.read_text().endswith("last line without an endexit function of 0\n")
    (tmp_path / "runs" / "ends" / "config.yaml").write_text("")
    output = _end("fine", tmp_path).check(2).output
    assert "was started by `launcher fit`; choose another --name" in output


def test_the_documented_script_is_submitted_in_the_background(tmp_path: Path) -> None:
    write_user_files(tmp_path)
    command = launcher("submit", "--script", "train.py", "--cluster", "local", "--nproc-per-node", "2",
                       "--name", "job", "--", "--steps", "2")  # fmt: skip
    done = run_warm(command, tmp_path, env=ENV).check()
    assert "run job: launcher status job, logs, cancel\n" in done.output
    followed = run_warm(launcher("logs", "job", "--rank", "1", "--follow"), tmp_path, timeout=60).check()
    assert "rank 1: 2 steps, loss " in followed.output
    assert _status(tmp_path, "job")["state"] == "done"
