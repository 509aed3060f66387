"""The measured memory of a rank next to the planned memory: in the event and in the report."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from launcher.core.errors import Interrupted
from launcher.core.events import EventLog, read_events
from launcher.report.history import read_history
from launcher.report.overview import to_values
from launcher.report.source import read_run
from launcher.training.callbacks.memory import MeasuredMemory, MemoryReporter
from tests.support.made_run import MadeRun, with_memory
from tests.unit.report.test_report_page import trained, written

GROWTH = "growth of the process's resident memory since before the model was made"


def status(path: Path, now: int, most: int) -> Path:
    path.write_text(f"Name:\tpython\nVmHWM:\t{most} kB\nVmRSS:\t{now} kB\n")
    return path


def test_cpu_memory_is_the_growth_since_before_the_model(tmp_path: Path) -> None:
    clear = tmp_path / "clear"
    measured = MeasuredMemory("cpu", status(tmp_path / "status", 1000, 1500), clear)
    assert clear.read_text() == "5"
    status(tmp_path / "status", 1200, 3000)
    assert (measured.peak(), measured.method) == (2000 * 1024, GROWTH)
    status(tmp_path / "status", 500, 900)
    assert measured.peak() == 0


def test_kernel_without_peak_reset_gives_a_larger_value(tmp_path: Path) -> None:
    measured = MeasuredMemory("cpu", status(tmp_path / "status", 1000, 1500), tmp_path / "none" / "clear")
    assert measured.peak() == 500 * 1024
    elsewhere = MeasuredMemory("cpu", tmp_path / "none", tmp_path / "none" / "clear")
    assert elsewhere.peak() >= 0


def test_memory_of_a_tensor_in_this_process_is_measured() -> None:
    measured = MeasuredMemory("cpu")
    held = torch.ones(16 << 20)
    assert held.sum() > 0
    assert measured.peak() > 60 << 20


def test_gpu_memory_is_the_allocators_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    cleared: list[bool] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: cleared.append(True))
    MeasuredMemory("cuda")
    assert not cleared  # this rank's device is not chosen yet
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7)
    measured = MeasuredMemory("cuda")
    assert (measured.peak(), cleared) == (7, [True])
    assert "allocator" in measured.method


def test_event_has_planned_and_measured_memory(tmp_path: Path) -> None:
    parts = {"parameters": 3, "gradients": 4, "total": 7}
    memory = {"assessments": [{"name": "ddp", "memory": parts}]}
    plan = cast(Any, SimpleNamespace(memory=memory, strategy=SimpleNamespace(name="ddp")))
    measured = cast(Any, SimpleNamespace(peak=lambda: 5, method="so"))
    module = cast(Any, SimpleNamespace(device=torch.device("cpu")))
    for rank in (1, 0):
        reported = MemoryReporter(plan, measured, EventLog(tmp_path / "events.jsonl", rank))
        trainer = cast(Any, SimpleNamespace(global_rank=rank, global_step=9))
        reported.on_train_end(trainer, module)
        reported.on_exception(trainer, module, Interrupted(15, checkpoint=None, step=9))
        reported.on_exception(trainer, module, RuntimeError("the others do not know"))
    expected = {"rank": 0, "kind": "memory", "step": 9, "planned": parts, "ranks": [0], "measured": [5],
                "measured_by": "so"}  # fmt: skip
    found = [{name: event[name] for name in expected} for event in read_events(tmp_path / "events.jsonl")]
    assert found == [expected, expected], "at the end, and after a signal"


def test_report_has_a_row_for_each_rank(tmp_path: Path) -> None:
    run = MadeRun(tmp_path / "it")
    parts = {"parameters": 2**30, "gradients": 2**30, "optimizer_states": 2**31, "activations": 0, "buffers": 0}
    run.plan = with_memory(run.plan, parts, 70 * 2**30)
    trained(run, memory=30 * 2**30)
    run.write_event("memory", ranks=[0, 1], measured=[3 * 2**30, 5 * 2**30], measured_by=GROWTH, step=100,
                    planned={**parts, "total": 2**32})  # fmt: skip
    page = written(run).text
    assert "rank 0 4 GiB 3 GiB 75%" in page
    assert "rank 1 4 GiB 5 GiB 125%" in page
    assert f"{GROWTH}" in page
    assert "The highest peak was 5 GiB (rank 1), 125% of the planned 4 GiB" in page
    reported = to_values(read_run(run.path))["attempts"][-1]["memory"]
    assert reported == {"planned": 2**32, "measured": {"0": 3 * 2**30, "1": 5 * 2**30}, "measured_by": GROWTH}
    assert json.dumps(reported)


@pytest.mark.parametrize("more", [{"measured": [1]}, {"ranks": "all"}, {"measured": [-1, 2]}, {"planned": [1]}])
def test_damaged_event_is_ignored(more: dict[str, Any]) -> None:
    event = {"time": 1.0, "rank": 0, "kind": "memory", "ranks": [0, 1], "measured": [1, 2], "measured_by": "so", **more}
    history = read_history([{"time": 0.0, "rank": 0, "kind": "run_started"}, event])
    assert (history.attempts[0].memory, history.unreadable_lines) == (None, 1)
