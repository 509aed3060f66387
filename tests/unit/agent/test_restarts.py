"""Restarts after running out of memory, and the count of restarts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from launcher.agent.restarts import RestartTracker, find_next_strategy, record_out_of_memory
from launcher.runs.oom_record import FILE_NAME
from tests.unit.agent.test_failure_report import make_error, make_outcome

KILLED = make_outcome(1, -9, out_of_memory=True)


def run_directory(path: Path, on_oom: str = "next", memory: object = None) -> Path:
    (path / "config.yaml").write_text(f"on_oom: {on_oom}\n")
    (path / "plan.json").write_text(json.dumps({"memory": memory}))
    return path


def test_the_strategy_that_the_rank_reported_is_used() -> None:
    reported = dataclasses.replace(make_error(), next_strategy="deepspeed_stage_2")
    assert find_next_strategy(make_outcome(1, 1, error=reported), None) == "deepspeed_stage_2"
    assert find_next_strategy(make_outcome(1, 1, error=make_error()), None) is None


def test_for_a_rank_that_the_kernel_killed_the_plan_has_the_next_strategy(tmp_path: Path) -> None:
    run = run_directory(tmp_path, memory={"next": "deepspeed_stage_3"})
    assert find_next_strategy(KILLED, run) == "deepspeed_stage_3"
    assert find_next_strategy(make_outcome(1, -9), run) is None
    assert find_next_strategy(KILLED, None) is None


def test_the_hosts_memory_does_not_change_the_strategy_on_gpus(tmp_path: Path) -> None:
    run = run_directory(tmp_path, memory={"next": "deepspeed_stage_3_offload"})
    plan = {**json.loads((run / "plan.json").read_text()), "device_kind": "cuda"}
    (run / "plan.json").write_text(json.dumps(plan))
    assert find_next_strategy(KILLED, run) is None
    assert record_out_of_memory(KILLED, run) is None
    assert not (run / FILE_NAME).exists()


@pytest.mark.parametrize(("on_oom", "memory"), [("stop", {"next": "ddp"}), ("next", None), ("next", {"next": None})])
def test_no_strategy_with_on_oom_stop_or_without_a_next_one(tmp_path: Path, on_oom: str, memory: object) -> None:
    assert find_next_strategy(KILLED, run_directory(tmp_path, on_oom, memory)) is None


@pytest.mark.parametrize(("name", "text"), [("config.yaml", "a: ["), ("plan.json", "{"), ("plan.json", "[]")])
def test_damaged_and_missing_files_give_no_strategy(tmp_path: Path, name: str, text: str) -> None:
    run = run_directory(tmp_path, memory={"next": "ddp"})
    (run / name).write_text(text)
    assert find_next_strategy(KILLED, run) is None
    (run / name).unlink()
    assert find_next_strategy(KILLED, run) is None


def test_restarts_are_counted_within_the_window(tmp_path: Path) -> None:
    times = iter((0.0, 1.0, 2.0, 3.0, 100.0))
    tracker = RestartTracker(1, 60.0, clock=lambda: next(times))
    killed = make_outcome(1, -9)
    first = tracker.decide(killed, tmp_path)
    assert first.reason == "restart 1 of 1; no checkpoint was saved yet"
    tracker.record(killed, first)
    assert not tracker.decide(killed, tmp_path).restart
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    assert not tracker.decide(killed, tmp_path).restart
    assert tracker.decide(killed, tmp_path).reason == "restart 1 of 1, from the last checkpoint"


def test_a_strategy_is_used_for_one_restart(tmp_path: Path) -> None:
    tracker = RestartTracker(0, 60.0)
    failure = make_outcome(1, 1, error=dataclasses.replace(make_error(), next_strategy="deepspeed_stage_2"))
    decision = tracker.decide(failure, tmp_path)
    assert (decision.restart, decision.strategy) == (True, "deepspeed_stage_2")
    tracker.record(failure, decision)
    assert not tracker.decide(failure, tmp_path).restart
