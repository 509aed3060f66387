from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from launcher.agent.diagnostics import RankEvidence, RankProcess, last_lines, process_state
from launcher.agent.hang import RankState
from launcher.process.heartbeat import BEFORE_TRAINING, UNKNOWN, Heartbeat, HeartbeatWriter, read_beat
from launcher.process.oom_kills import count_oom_kills, oom_kill_counters
from launcher.process.rank_status import FOLDER_VARIABLE, RankStatusWriter, beat_path, read_status, report_path


def test_a_heart_is_heard_as_it_beats(tmp_path: Path) -> None:
    times = iter((1.0, 2.0, 3.0, 4.0))
    path = tmp_path / "beat"
    assert read_beat(path) is None
    heart = HeartbeatWriter(path, clock=lambda: next(times))
    assert read_beat(path) == Heartbeat(BEFORE_TRAINING, 1.0, UNKNOWN, False)
    heart.beat(7)
    heart.beat()
    assert read_beat(path) == Heartbeat(7, 3.0, UNKNOWN, False)
    heart.set_collectives(42)
    assert read_beat(path) == Heartbeat(7, 3.0, 42, False), "another thread's number is no sign of life"
    heart.announce_stack_dumps()
    assert read_beat(path) == Heartbeat(7, 4.0, 42, True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_bytes(b"cut")
    assert read_beat(path) is None


def test_what_a_rank_tells_is_read_and_its_first_error_stays(tmp_path: Path) -> None:
    report = RankStatusWriter(tmp_path, 3, clock=lambda: 9.0)
    report.update(log=tmp_path / "log")
    report.beat(5)
    report.record_error(ValueError("first"))
    report.record_error(ValueError("second"))
    report.update(run=tmp_path)
    words = read_status(tmp_path, 3)
    assert (words.log, words.run) == (tmp_path / "log", tmp_path)
    assert words.error is not None
    assert (words.error.message, words.error.step, words.error.time) == ("first", 5, 9.0)
    assert stat.S_IMODE(report_path(tmp_path, 3).stat().st_mode) == 0o600


def test_without_an_agent_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    report = RankStatusWriter.from_env({"RANK": "1"})
    report.update(log="x")
    report.record_error(ValueError("x"))
    report.beat(1)
    assert not report.has_agent
    assert not list(tmp_path.iterdir())


def test_a_process_has_one_report_wherever_it_asks(tmp_path: Path) -> None:
    env = {FOLDER_VARIABLE: str(tmp_path), "RANK": "2"}
    assert RankStatusWriter.from_env(env) is RankStatusWriter.from_env(dict(env))
    assert RankStatusWriter.from_env(env).has_agent


def test_a_folder_that_is_gone_costs_the_report_and_not_the_training(tmp_path: Path) -> None:
    report = RankStatusWriter(tmp_path / "gone", 0)
    report.update(log="x")
    report.record_error(ValueError("x"))
    report.beat(1)


def test_nothing_and_nonsense_are_no_words(tmp_path: Path) -> None:
    assert read_status(tmp_path, 0).error is None
    report_path(tmp_path, 0).write_text('{"error": {"kind": 1}}')
    assert read_status(tmp_path, 0).error is None


def test_the_traceback_goes_to_the_log_alone_where_an_agent_tells(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = RankStatusWriter(tmp_path, 0)
    report.update(log=tmp_path / "log")
    report.write_traceback(ValueError("mine"))
    assert capsys.readouterr().err == ""
    assert "ValueError: mine" in (tmp_path / "log").read_text()
    RankStatusWriter(None, 0).write_traceback(ValueError("mine"))
    assert "ValueError: mine" in capsys.readouterr().err


def test_the_end_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert last_lines(None) == last_lines(log) == ()
    log.write_text("\n".join(f"line {n}" for n in range(5000)) + "\n\n")
    assert last_lines(log, 2) == ("line 4998", "line 4999")
    crash = (
        'Fatal Python error: Segmentation fault\n\nThread 0x1:\n  File "a"\n\nCurrent thread 0x2:\n  File "guilty"\n'
    )
    log.write_text("before\n" + crash + "\n".join("Extension modules" for _ in range(30)))
    assert last_lines(log, 3) == (
        "Fatal Python error: Segmentation fault",
        "Current thread 0x2:",
        '  File "guilty"',
    )


def test_the_kernels_letter_for_a_process() -> None:
    assert process_state(os.getpid()) == "R"
    assert process_state(2**22 + 1) == "X"


def test_ends_join_what_the_process_and_the_rank_say(tmp_path: Path) -> None:
    RankStatusWriter(tmp_path, 0).beat(4)
    report = RankStatusWriter(tmp_path, 1)
    report.beat(5)
    report.record_error(ValueError("mine"))
    watch = RankEvidence(tmp_path, lambda pid: None)
    ranks = {0: RankProcess(0, os.getpid(), None), 1: RankProcess(1, 1, 1, ended=8.0)}
    states = {0: RankState(read_beat(beat_path(tmp_path, 0)), "T")}
    zero, one = watch.ends(ranks, states, hung={0: "stopped"})
    assert (zero.hung, zero.doing, zero.step, zero.exit_code) == (True, "stopped", 4, None)
    assert (one.step, one.exit_code, one.time) == (5, 1, 8.0)
    assert one.error is not None
    assert one.error.message == "mine"


def test_kills_for_memory_are_counted_in_both_versions_of_cgroups(tmp_path: Path) -> None:
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
    counters = oom_kill_counters(proc, groups)
    assert len(counters) == 3
    assert count_oom_kills(counters) == 1 + 2 + 4
    (groups / "slice/job/memory.events").unlink()
    assert count_oom_kills(counters) == 3, "a cgroup may vanish"
    assert oom_kill_counters(tmp_path / "no", groups) == ()


def test_this_machines_counters_can_be_read() -> None:
    assert Path("/proc/vmstat") in oom_kill_counters()
    assert count_oom_kills(oom_kill_counters()) >= 0
