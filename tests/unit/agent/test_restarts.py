"""What to go on with after running out of memory."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from launcher.agent.restarts import next_strategy, remember_failure
from launcher.runs.oom_record import FILE_NAME
from tests.unit.agent.test_failure_report import ended, error

KILLED = ended(1, -9, out_of_memory=True)


def run_directory(path: Path, on_oom: str = "next", memory: object = None) -> Path:
    (path / "config.yaml").write_text(f"on_oom: {on_oom}\n")
    (path / "plan.json").write_text(json.dumps({"memory": memory}))
    return path


def test_what_the_rank_itself_said_counts() -> None:
    told = dataclasses.replace(error(), next_strategy="deepspeed_stage_2")
    assert next_strategy(ended(1, 1, error=told), None) == "deepspeed_stage_2"
    assert next_strategy(ended(1, 1, error=error()), None) is None


def test_for_a_rank_that_the_kernel_killed_the_run_directory_says_it(tmp_path: Path) -> None:
    run = run_directory(tmp_path, memory={"next": "deepspeed_stage_3"})
    assert next_strategy(KILLED, run) == "deepspeed_stage_3"
    assert next_strategy(ended(1, -9), run) is None
    assert next_strategy(KILLED, None) is None


def test_a_rank_of_a_gpu_that_the_kernel_killed_ran_out_of_the_hosts_memory(tmp_path: Path) -> None:
    run = run_directory(tmp_path, memory={"next": "deepspeed_stage_3_offload"})
    plan = {**json.loads((run / "plan.json").read_text()), "device_kind": "cuda"}
    (run / "plan.json").write_text(json.dumps(plan))
    assert next_strategy(KILLED, run) is None
    assert remember_failure(KILLED, run) is None
    assert not (run / FILE_NAME).exists()


@pytest.mark.parametrize(("on_oom", "memory"), [("stop", {"next": "ddp"}), ("next", None), ("next", {"next": None})])
def test_nothing_where_the_config_says_stop_or_nothing_comes_next(tmp_path: Path, on_oom: str, memory: object) -> None:
    assert next_strategy(KILLED, run_directory(tmp_path, on_oom, memory)) is None


@pytest.mark.parametrize(("name", "text"), [("config.yaml", "a: ["), ("plan.json", "{"), ("plan.json", "[]")])
def test_files_that_are_damaged_or_missing_say_nothing(tmp_path: Path, name: str, text: str) -> None:
    run = run_directory(tmp_path, memory={"next": "ddp"})
    (run / name).write_text(text)
    assert next_strategy(KILLED, run) is None
    (run / name).unlink()
    assert next_strategy(KILLED, run) is None
