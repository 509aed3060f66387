"""The section about the use of time, with and without failures, and for runs of older versions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launcher.report.overview import to_values
from launcher.report.source import read_run
from tests.support.made_run import MadeRun
from tests.unit.report.test_report_page import written


def _spent(step: float, data: float = 0.0) -> dict[str, float]:
    return {"step": step, "data": data, "validation": 0.0, "checkpoint": 0.0}


def _make(path: Path, **started: Any) -> MadeRun:
    run = MadeRun(path)
    run.write_event("run_started", 5.0, restart_count=0, times={"launched": run.clock.now}, **started)
    run.write_event("planned", plan=run.plan)
    run.write_event("training_started", 1.0, step=0)
    run.write_event("first_step", 1.0, step=1, spent=_spent(1.0))
    run.write_event("step", 10.0, step=11, seconds_per_step=1.0, metrics={"loss": 1.0}, spent=_spent(10.0, 1.0))
    return run


def test_each_failure_has_a_row_with_its_cost(tmp_path: Path) -> None:
    run = _make(tmp_path / "it")
    run.write_event("rank_failed", 0.5, rank=1, step=11, host="n", exit_code=-9, restart=True, reason="out_of_memory",
                    last_sign=run.clock.now, others=[])  # fmt: skip
    run.write_event("run_started", 1.0, restart_count=1, times={})
    run.write_event("training_started", 1.0, step=6)
    run.write_event("first_step", 1.0, step=7, spent=_spent(1.0))
    run.write_event("step", 10.0, step=17, seconds_per_step=1.0, metrics={"loss": 1.0}, spent=_spent(11.0))
    page = written(run)
    assert "rank 1: out of memory 500 ms 2 s 4 s 5 6.5 s" in page.text
    assert "1 failure cost 6.5 s" in page.text
    # 9 of the first 10 seconds, and 6 of the last 10.
    assert "49.2% of the time was productive: 15 s of 30.5 s" in page.text
    values = to_values(read_run(run.path))["goodput"]
    assert values["seconds"]["productive"] == 15
    assert values["failures"][0]["redone_steps"] == 5
    assert sum(values["seconds"].values()) == values["total"] == values["active"]


def test_a_run_without_failures_has_no_table_of_them(tmp_path: Path) -> None:
    page = written(_make(tmp_path / "it"))
    assert "Cost of each failure" not in page.text
    assert "Every second of the run" in page.text
    assert "the run was stopped" not in page.text


def test_a_run_of_an_older_version_has_a_report_without_the_ledger(tmp_path: Path) -> None:
    run = MadeRun(tmp_path / "it")
    run.start()
    run.step(10)
    page = written(run)
    assert "an older version wrote a part of this run" in page.text
    assert "effective training" not in page.text
    assert to_values(read_run(run.path))["goodput"] is None
