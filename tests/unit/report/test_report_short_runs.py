"""The page about a run that is shorter than a logging interval, and about values that do not change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.config.schema import TrainerOptions
from launcher.jobs.status import summarize_events
from launcher.report.command import render
from launcher.report.source import read_run
from tests.support.made_run import START, MadeRun
from tests.unit.report.test_report_page import Outline

FAILED: dict[str, Any] = {"host": "n1", "error": "KeyError: 17", "step": 5}
NONE_LOGGED = "The model logged no metric (self.log)."
NOT_RECORDED = (
    "No metric was recorded in 5 steps: metrics are recorded at the first step, every {interval} steps "
    "(log_every_n_steps), and after a validation or an epoch."
)


def _read_page(run: MadeRun) -> str:
    return Outline(render([read_run(run.path)], START)).text


def _started(path: Path, first_metrics: dict[str, float], **config: Any) -> MadeRun:
    run = MadeRun(path, **config)
    run.start(has_step=False)
    run.write_event("first_step", step=1, metrics=first_metrics, learning_rate=[3e-4])
    return run


def test_a_run_that_fails_before_a_logging_interval_shows_the_metrics_of_its_first_step(tmp_path: Path) -> None:
    run = _started(tmp_path / "bad", {"train_loss": 1.389})
    run.write_event("failed", 1, rank=1, **FAILED)
    page = _read_page(run)
    assert "train_loss 1.389 last; lowest 1.389" in page, "one of the main figures"
    assert "train_loss was 1.389 at step 1, the only value that was recorded: metrics are" in page
    assert "The learning rate was 0.0003 at all recorded steps." in page
    assert "1 at logged steps" in page
    assert NONE_LOGGED not in page
    assert summarize_events(run.path / "events.jsonl").metrics == {"train_loss": 1.389}


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("failed", FAILED),
        ("out_of_memory", {"host": "n1", "strategy": "ddp", "step": 5}),
        ("rank_failed", {"host": "n1", "exit_code": -9, "step": 5, "restart": False}),
        ("interrupted", {"signal": 15, "step": 5, "checkpoint": None}),
        ("checkpoint", {"step": 5, "epoch": 0}),
    ],
)
@pytest.mark.parametrize("interval", [None, 20])
def test_a_run_without_a_known_metric_has_the_reason(
    tmp_path: Path, kind: str, fields: dict[str, Any], interval: int | None
) -> None:
    run = _started(tmp_path / "bad", {}, trainer=TrainerOptions(log_every_n_steps=interval))
    run.write_event(kind, 1, rank=1, **fields)
    page = _read_page(run)
    assert NOT_RECORDED.format(interval=interval or 50) in page
    assert NONE_LOGGED not in page


@pytest.mark.parametrize("kind", ["finished", "validation"])
def test_a_model_without_metrics_is_reported_when_it_had_the_chance_to_log_them(tmp_path: Path, kind: str) -> None:
    run = _started(tmp_path / "mute", {})
    run.write_event(kind, 1, step=5, metrics={})
    assert NONE_LOGGED in _read_page(run)


def test_values_that_do_not_differ_are_one_number(tmp_path: Path) -> None:
    run = _started(tmp_path / "even", {"loss": 4.0})
    run.step(50, rate=3e-4)
    run.ranks(50, own=(0.04, 0.0401))
    run.write_event("finished", step=50, metrics={}, reason="max_steps")
    page = _read_page(run)
    assert "The learning rate was 0.0003 at all recorded steps." in page
    assert "An optimizer step took 100 ms. Validation and checkpoints are not included." in page
    assert "Rank 1 had the longest own time (median), less than 1% above the median of the other ranks;" in page


def test_values_that_differ_have_their_range(tmp_path: Path) -> None:
    run = _started(tmp_path / "uneven", {"loss": 4.0})
    for step, seconds in ((50, 0.1), (100, 0.3)):
        run.step(step, seconds=seconds, rate=step * 1e-5)
        run.ranks(step, own=(0.04, 0.05))
    page = _read_page(run)
    assert "The learning rate for the next step was between 0.0003 and 0.001." in page
    assert "An optimizer step took 200 ms (median), and 300 ms in the slowest interval." in page
    assert "1.25 times the median of the other ranks" in page
