from __future__ import annotations

import ctypes
import os
import stat
from pathlib import Path

import psutil
import pytest

import launcher
from launcher.agent.hang_detection import RankState
from launcher.agent.rank_activity import read_process_status
from launcher.agent.rank_inspector import (
    RankInspector,
    count_oom_kills,
    find_oom_kill_counters,
    read_last_lines,
)
from launcher.agent.state_request import RankProcess
from launcher.process.heartbeat import BEFORE_TRAINING, UNKNOWN, Heartbeat, HeartbeatWriter, read_heartbeat
from launcher.process.rank_status import FOLDER_VARIABLE, RankStatusWriter, beat_path, read_status, report_path


def test_heartbeats_are_read_as_written(tmp_path: Path) -> None:
    times = iter((1.0, 2.0, 3.0, 4.0))
    path = tmp_path / "beat"
    assert read_heartbeat(path) is None
    writer = HeartbeatWriter(path, clock=lambda: next(times))
    assert read_heartbeat(path) == Heartbeat(BEFORE_TRAINING, 1.0, UNKNOWN, False)
    writer.beat(7)
    writer.beat()
    assert read_heartbeat(path) == Heartbeat(7, 3.0, UNKNOWN, False)
    writer.set_collectives(42)
    assert read_heartbeat(path) == Heartbeat(7, 3.0, 42, False), "a count from another thread is not a heartbeat"
    writer.announce_stack_dumps()
    assert read_heartbeat(path) == Heartbeat(7, 4.0, 42, True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_bytes(b"cut")
    assert read_heartbeat(path) is None


def test_a_ranks_report_is_read_and_keeps_its_first_error(tmp_path: Path) -> None:
    report = RankStatusWriter(tmp_path, 3, clock=lambda: 9.0)
    report.update(log=tmp_path / "log")
    report.beat(5)
    report.record_error(ValueError("first"))
    report.record_error(ValueError("second"))
    report.update(run=tmp_path)
    status = read_status(tmp_path, 3)
    assert (status.log, status.run) == (tmp_path / "log", tmp_path)
    assert status.error is not None
    assert (status.error.message, status.error.step, status.error.time) == ("first", 5, 9.0)
    assert stat.S_IMODE(report_path(tmp_path, 3).stat().st_mode) == 0o600


def test_without_an_agent_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    report = RankStatusWriter.from_env({"RANK": "1"})
    report.update(log="x")
    report.record_error(ValueError("x"))
    report.beat(1)
    assert not report.has_agent
    assert not list(tmp_path.iterdir())


def test_a_process_has_one_report(tmp_path: Path) -> None:
    env = {FOLDER_VARIABLE: str(tmp_path), "RANK": "2"}
    assert RankStatusWriter.from_env(env) is RankStatusWriter.from_env(dict(env))
    assert RankStatusWriter.from_env(env).has_agent


def test_a_missing_folder_loses_the_report_but_does_not_raise(tmp_path: Path) -> None:
    report = RankStatusWriter(tmp_path / "gone", 0)
    report.update(log="x")
    report.record_error(ValueError("x"))
    report.beat(1)


def test_missing_and_damaged_reports_have_no_error(tmp_path: Path) -> None:
    assert read_status(tmp_path, 0).error is None
    report_path(tmp_path, 0).write_text('{"error": {"kind": 1}}')
    assert read_status(tmp_path, 0).error is None


def test_with_an_agent_the_traceback_goes_to_the_log_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = RankStatusWriter(tmp_path, 0)
    report.update(log=tmp_path / "log")
    report.write_traceback(ValueError("mine"))
    assert capsys.readouterr().err == ""
    assert "ValueError: mine" in (tmp_path / "log").read_text()
    RankStatusWriter(None, 0).write_traceback(ValueError("mine"))
    assert "ValueError: mine" in capsys.readouterr().err


def test_the_last_lines_of_a_log_are_read(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert read_last_lines(None) == read_last_lines(log) == ()
    log.write_text("\n".join(f"line {n}" for n in range(5000)) + "\n\n")
    assert read_last_lines(log, 2) == ("line 4998", "line 4999")
    crash = (
        'Fatal Python error: Segmentation fault\n\nThread 0x1:\n  File "a"\n\nCurrent thread 0x2:\n  File "guilty"\n'
    )
    log.write_text("before\n" + crash + "\n".join("Extension modules" for _ in range(30)))
    assert read_last_lines(log, 3) == (
        "Fatal Python error: Segmentation fault",
        "Current thread 0x2:",
        '  File "guilty"',
    )


def test_the_stack_of_a_crash_ends_with_the_users_code(tmp_path: Path) -> None:
    log = tmp_path / "log"
    files = [ctypes.__file__, "/home/me/train.py", launcher.__file__, "<frozen runpy>"]
    frames = [f'  File "{file}", line 1 in f' for file in files]
    lines = ["Fatal Python error: Segmentation fault", "Current thread 0x2 (most recent call first):", *frames]
    log.write_text("\n".join([*lines, "Extension modules: numpy (total: 1)"]))
    assert read_last_lines(log) == tuple(lines[:4])


def test_the_status_of_a_process_is_read() -> None:
    assert read_process_status(os.getpid()) == psutil.STATUS_RUNNING
    assert read_process_status(2**22 + 1) == psutil.STATUS_DEAD


def test_outcomes_combine_the_process_and_the_ranks_report(tmp_path: Path) -> None:
    RankStatusWriter(tmp_path, 0).beat(4)
    report = RankStatusWriter(tmp_path, 1)
    report.beat(5)
    report.record_error(ValueError("mine"))
    inspector = RankInspector(tmp_path)
    ranks = {0: RankProcess(os.getpid(), None), 1: RankProcess(1, 1, ended=8.0)}
    states = {0: RankState(read_heartbeat(beat_path(tmp_path, 0)), "stopped")}
    zero, one = inspector.collect_outcomes(ranks, states, hung={0: "stopped"})
    assert (zero.hung, zero.doing, zero.step, zero.exit_code) == (True, "stopped", 4, None)
    assert (one.step, one.exit_code, one.time) == (5, 1, 8.0)
    assert one.error is not None
    assert one.error.message == "mine"


def test_out_of_memory_kills_are_counted_in_both_versions_of_cgroups(tmp_path: Path) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    for path, text in {
        proc / "self/cgroup": "4:memory:/job\n2:cpu,cpuacct:/\n0::/slice/job\n",
        proc / "vmstat": "nr_free_pages 5\noom_kill 1\n",
        groups / "memory/job/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
        groups / "slice/job/memory.events": "low 0\noom 3\noom_kill 4\noom_group_kill 9\n",
        groups / "cpu/job/cpu.stat": "oom_kill 100\n",
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    counters = find_oom_kill_counters(proc, groups)
    assert len(counters) == 3
    assert count_oom_kills(counters) == 1 + 2 + 4
    (groups / "slice/job/memory.events").unlink()
    assert count_oom_kills(counters) == 3, "a control group may disappear"
    assert find_oom_kill_counters(tmp_path / "no", groups) == ()


def test_the_counters_of_this_machine_are_read() -> None:
    assert Path("/proc/vmstat") in find_oom_kill_counters()
    assert count_oom_kills(find_oom_kill_counters()) >= 0
