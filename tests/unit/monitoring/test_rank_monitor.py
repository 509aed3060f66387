"""`RankMonitor`: events and the terminal receive the same numbers as the trackers."""

from __future__ import annotations

import io
import math
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from launcher.config.schema import WatchOptions
from launcher.core.events import EventLog, read_events
from launcher.core.output import RunOutput
from launcher.monitoring.gather import Gathered
from launcher.monitoring.health import Alert
from launcher.monitoring.rank_monitor import RankMonitor
from launcher.monitoring.samples import RankSample
from launcher.planning.flops import ModelWork


class Monitored:
    """A monitor with its events and its terminal."""

    def __init__(self, folder: Path, precision: str = "16-mixed", **options: Any) -> None:
        self._file = folder / "events.jsonl"
        self._screen = io.StringIO()
        console = Console(file=self._screen, width=200)
        events = EventLog(self._file, 0)
        self.monitor = RankMonitor(WatchOptions(**options), precision, RunOutput(events, console, is_rank_zero=True))

    @property
    def notices(self) -> list[str]:
        return [event["message"] for event in self.events("notice")]

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [e for e in read_events(self._file) if e["kind"] == kind] if self._file.exists() else []

    def screen(self) -> str:
        return self._screen.getvalue()


@pytest.fixture
def monitored(tmp_path: Path) -> Monitored:
    return Monitored(tmp_path)


def test_the_limits_are_the_configs(tmp_path: Path) -> None:
    watch = Monitored(tmp_path, floor=4.0, floor_steps=7, slow_factor=3.0, slow_share=0.5, every_n_steps=9).monitor
    limits = watch.limits
    assert (limits.floor, limits.floor_steps, limits.slow_factor, limits.slow_share) == (4.0, 7, 3.0, 0.5)
    assert watch.every_n_steps == 9


@pytest.mark.parametrize(("matmul", "has_mfu"), [("highest", True), ("high", False)])
def test_a_row_has_the_work_of_the_plan_at_the_measured_speed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, matmul: str, has_mfu: bool
) -> None:
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: matmul)
    rows: list[dict[str, Any]] = []
    tracker: Any = SimpleNamespace(log_row=lambda row, step: rows.append(row))
    output = RunOutput(EventLog(tmp_path / "events.jsonl", 0), Console(file=io.StringIO()), is_rank_zero=True)
    monitor = RankMonitor(WatchOptions(), "32-true", output, [tracker], work=ModelWork(3e9, 6e10))
    monitor.write(SimpleNamespace(), {"perf/samples_per_second": 10.0}, 7)
    monitor.write(SimpleNamespace(), {"perf/step_seconds": 0.1}, 8)
    assert rows[0]["perf/flops_per_second"] == 3e10
    assert rows[0].get("perf/mfu") == (0.5 if has_mfu else None)
    assert "perf/flops_per_second" not in rows[1]


@pytest.mark.parametrize(("precision", "looks"), [("16-mixed", True), ("bf16-mixed", False), ("32-true", False)])
def test_the_scale_is_read_if_the_plan_has_one(tmp_path: Path, precision: str, looks: bool) -> None:
    assert Monitored(tmp_path, precision).monitor.watches(SimpleNamespace(precision="16-mixed")) is looks


@pytest.mark.case(19)
def test_with_a_users_plugin_the_trainers_precision_counts(tmp_path: Path) -> None:
    watch = Monitored(tmp_path, "custom").monitor
    assert watch.precision is None
    assert watch.watches(SimpleNamespace(precision="16-mixed"))
    assert watch.watches(SimpleNamespace(precision="theirs")), "an unknown precision may scale the loss"
    assert not watch.watches(SimpleNamespace(precision="bf16-true"))


def test_a_logged_training_loss_that_is_not_finite_is_one_alert_and_the_runs_problem(monitored: Monitored) -> None:
    monitor = monitored.monitor
    monitor.check_logged({"loss": 1.0, "grad_norm": math.inf, "val_loss": math.nan}, 8)
    assert monitor.problem is None
    for step in (16, 24):
        monitor.check_logged({"train/loss": math.nan, "acc": 0.5}, step)
    (alert,) = monitored.events("alert")
    assert (alert["alert"], alert["step"], alert["ranks"]) == ("loss_not_finite", 16, [0])
    assert "train/loss is nan" in alert["text"]
    assert monitor.problem == "the training loss is not finite (alert at step 16)"
    monitor.check_logged({"train/loss": 0.5}, 32)
    monitor._raised = frozenset()  # as after a sample with a finite loss
    assert monitor.problem is None
    monitor.check_logged({"train/loss": math.inf}, 40)
    assert [event["step"] for event in monitored.events("alert")] == [16, 40]


def test_every_ranks_own_numbers_are_one_event(monitored: Monitored) -> None:
    samples = (
        RankSample(0, 1024.0, 3, 5, 0, False, 0.51234567, 0.1, 0.2, 2**30),
        RankSample(1, None, None, None, None, True, 0.5, 0.0, 0.3, 7),
    )
    monitored.monitor.observe(Gathered(40, 2, samples))
    (event,) = monitored.events("ranks")
    expected = {
        "step": 40, "ranks": [0, 1], "loss_scale": [1024.0, None], "skipped_steps": [3, None],
        "step_seconds": [0.512346, 0.5], "data_seconds": [0.1, 0.0], "own_seconds": [0.2, 0.3],
        "peak_memory": [2**30, 7],
    }  # fmt: skip
    assert {key: event[key] for key in expected} == expected


def test_a_broken_scale_is_text_in_the_event_as_json_has_no_nan(monitored: Monitored) -> None:
    samples = (RankSample(0, float("nan")), RankSample(1, float("inf")), RankSample(2, 0.0))
    monitored.monitor.observe(Gathered(1, 0, samples))
    assert monitored.events("ranks")[0]["loss_scale"] == ["nan", "inf", 0.0]


def test_the_event_of_many_ranks_holds_the_first_64(monitored: Monitored) -> None:
    monitored.monitor.observe(Gathered(1, 0, tuple(RankSample(n) for n in range(1000))))
    (event,) = monitored.events("ranks")
    assert event["ranks"] == list(range(64))


ALERT = Alert("ranks_diverged", "ranks differ", "rank 1 [red]is at[/red] 512", (1, 3))


def test_an_alert_is_one_event_with_its_ranks_and_one_line_on_the_terminal(monitored: Monitored) -> None:
    monitored.monitor.alert(ALERT, 40)
    (event,) = monitored.events("alert")
    assert (event["alert"], event["step"], event["ranks"]) == ("ranks_diverged", 40, [1, 3])
    assert (event["title"], event["text"]) == (ALERT.title, ALERT.text)
    assert monitored.screen() == "alert at step 40: ranks differ: rank 1 [red]is at[/red] 512\n"
    assert monitored.notices == []


class Zero(SimpleNamespace):
    """The attributes of a Trainer that the monitor reads."""

    is_global_zero = True
    log_every_n_steps = 1
    current_epoch = 0


class Scaler:
    def __init__(self, scale: float) -> None:
        self.scale = scale

    def get_scale(self) -> float:
        return self.scale


def test_a_step_of_a_trainer_becomes_an_event_and_a_broken_scale_an_alert_once(monitored: Monitored) -> None:
    scaler = Scaler(1024.0)
    strategy = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=scaler))
    trainer = Zero(strategy=strategy, global_step=0, precision="16-mixed")
    watch = monitored.monitor
    watch.on_train_start(trainer, None)
    for step, scale in enumerate((1024.0, float("inf"), float("inf"), 512.0), start=1):
        trainer.global_step, scaler.scale = step, scale
        watch.on_train_batch_start(trainer, None, None, step)
        watch.on_train_batch_end(trainer, None, None, None, step)
    assert [(e["step"], e["loss_scale"]) for e in monitored.events("ranks")] == [
        (1, [1024.0]), (2, ["inf"]), (3, ["inf"]), (4, [512.0]),
    ]  # fmt: skip
    assert [(e["step"], e["alert"], e["ranks"]) for e in monitored.events("alert")] == [(2, "scale_not_finite", [0])]
    assert monitored.screen().startswith("alert at step 2: the loss scale is not finite: ")


def test_the_events_are_the_users_alone(monitored: Monitored, tmp_path: Path) -> None:
    monitored.monitor.observe(Gathered(1, 0, (RankSample(0),)))
    assert stat.S_IMODE((tmp_path / "events.jsonl").stat().st_mode) == 0o600


def _steps(slow: float, usual: float = 0.02) -> tuple[RankSample, ...]:
    return tuple(RankSample(n, step_seconds=0.1, own_seconds=slow if n == 2 else usual) for n in range(4))


def test_the_end_of_a_run_names_the_rank_that_cost_more_than_its_share(monitored: Monitored) -> None:
    # Slow in the warm-up, which does not count, and later repeatedly.
    monitored.monitor.observe(Gathered(10, 0, _steps(9.0)))
    for step in range(20, 80, 10):
        monitored.monitor.observe(Gathered(step, 0, _steps(0.05)))
    monitored.monitor.finish(Zero(callbacks=[]))
    (event,) = monitored.events("straggler")
    assert (event["ranks"], event["steps"]) == ([2], 60)
    assert event["own_seconds"] == {"0": 0.02, "1": 0.02, "2": 0.05, "3": 0.02}
    assert monitored.screen() == (
        "straggler over 60 steps: rank 2 needs 50 ms a step for data and forward pass, 2.5 times the others; all ranks "
        "wait for it during 30% of each step\n"
    )


@pytest.mark.parametrize(
    ("slow", "until", "options"),
    [
        pytest.param((0.05,) * 6, 50, {}, id="too few steps"),
        pytest.param((0.02,) * 6, 80, {}, id="no rank is slower"),
        pytest.param((0.05, 0.02, 0.02, 0.02, 0.02, 0.02), 80, {}, id="slow once"),
        pytest.param((0.05,) * 6, 80, {"slow_share": 0.4}, id="less than the set share"),
        pytest.param((0.05,) * 6, 80, {"slow_factor": 3.0}, id="not that many times the others"),
    ],
)
def test_no_straggler_is_reported_within_the_limits(
    tmp_path: Path, slow: tuple[float, ...], until: int, options: dict[str, Any]
) -> None:
    monitored = Monitored(tmp_path, **options)
    monitored.monitor.observe(Gathered(10, 0, _steps(0.02)))
    for own, step in zip(slow, range(20, until, 10), strict=False):
        monitored.monitor.observe(Gathered(step, 0, _steps(own)))
    monitored.monitor.finish(Zero(callbacks=[]))
    assert monitored.events("straggler") == []
    assert monitored.screen() == ""


def test_a_run_without_a_sample_reports_nothing(monitored: Monitored) -> None:
    monitored.monitor.finish(Zero(callbacks=[]))
    assert monitored.screen() == ""
