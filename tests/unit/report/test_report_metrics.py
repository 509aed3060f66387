"""Every metric that was logged, whatever logged it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from launcher.report.history import read_history
from launcher.report.metrics import (
    Metric,
    collect_metrics,
    find_loss,
    find_validation_loss,
    summarize_metric,
    to_metric_values,
)
from tests.support.made_run import START


def _events(*entries: tuple[str, int, dict[str, float]]) -> dict[str, Metric]:
    events = [
        {"time": START + i, "rank": 0, "kind": kind, "step": step, "metrics": metrics}
        for i, (kind, step, metrics) in enumerate(entries)
    ]
    return collect_metrics(read_history(events))


def _points(metric: Metric) -> list[tuple[float, float]]:
    return [(s, v) for line in metric.lines for s, v in zip(line.steps.tolist(), line.values.tolist(), strict=True)]


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["acc", "train_loss"], "train_loss"),
        (["my_loss", "loss"], "loss"),
        (["val_loss", "my_loss"], "my_loss"),
        (["acc", "f1"], "acc"),
        ([], None),
    ],
)
def test_the_loss_is_found_by_name(names: list[str], wanted: str | None) -> None:
    metrics = dict.fromkeys(names, 1.0)
    found = _events(("step", 1, metrics), ("validation", 1, {**metrics, "val_loss": 2.0}))
    assert find_loss(found) == (wanted or "val_loss")
    assert find_validation_loss(found) == ("val_loss" if names else None)


def test_a_metric_has_the_values_of_the_events_in_which_it_changes() -> None:
    # Lightning repeats the last value of a validation and of an epoch at each logging interval.
    metrics = _events(
        ("step", 10, {"train_loss": 4.0}),
        ("step", 20, {"train_loss": 3.0}),
        ("validation", 20, {"train_loss": 3.0, "val_loss": 5.0}),
        ("epoch", 20, {"train_loss": 3.0, "val_loss": 5.0, "train_acc": 0.1}),
        ("step", 30, {"train_loss": 2.0, "val_loss": 5.0, "train_acc": 0.1}),
        ("step", 40, {"train_loss": 2.0, "val_loss": 5.0, "train_acc": 0.1}),
        ("validation", 40, {"train_loss": 2.0, "val_loss": 4.0, "train_acc": 0.1}),
        ("epoch", 40, {"train_loss": 2.0, "val_loss": 4.0, "train_acc": 0.2}),
        ("finished", 40, {"train_loss": 2.0, "val_loss": 4.0, "train_acc": 0.2, "total": 7.0}),
    )
    assert list(metrics) == ["train_loss", "val_loss", "train_acc", "total"]
    assert {name: metric.source for name, metric in metrics.items()} == {
        "train_loss": "step", "val_loss": "validation", "train_acc": "epoch", "total": "end",
    }  # fmt: skip
    assert _points(metrics["train_loss"]) == [(10, 4), (20, 3), (30, 2), (40, 2)]
    assert _points(metrics["val_loss"]) == [(20, 5), (40, 4)]
    assert _points(metrics["train_acc"]) == [(20, 0.1), (40, 0.2)]
    assert _points(metrics["total"]) == [(40, 7)]


def test_the_end_between_two_logging_intervals_is_the_last_value() -> None:
    metrics = _events(
        ("step", 10, {"train_loss": 4.0}),
        ("step", 20, {"train_loss": 3.0}),
        ("validation", 24, {"train_loss": 2.5, "val_loss": 5.0}),
        ("finished", 24, {"train_loss": 2.5, "val_loss": 5.0}),
    )
    assert _points(metrics["train_loss"]) == [(10, 4.0), (20, 3.0), (24, 2.5)]
    assert _points(metrics["val_loss"]) == [(24, 5.0)]


# Logging intervals of 50, 10, 7 and 1 steps of a training with 96 steps and a validation every 32; 0 for none.
@pytest.mark.parametrize("interval", [0, 50, 10, 7, 1])
@pytest.mark.parametrize("end", [5, 40, 96])
def test_every_value_that_any_event_has_is_shown_and_counted(interval: int, end: int) -> None:
    def loss(step: int) -> float:
        return 4.0 - step / 32

    entries: list[tuple[str, int, dict[str, float]]] = [("first_step", 1, {"loss": loss(1)})]
    last: dict[str, float] = {}
    for step in range(2, end + 1):
        if interval and step % interval == 0:
            entries.append(("step", step, {"loss": loss(step), **last}))
        if step % 32 == 0:
            last = {"val_loss": 5.0 - step / 32}
            entries.append(("validation", step, {"loss": loss(step), **last}))
            last["acc"] = step / 32
            entries.append(("epoch", step, {"loss": loss(step), **last}))
    metrics = _events(*entries)
    known = sorted({step for _, step, _ in entries})
    assert _points(metrics["loss"]) == [(step, loss(step)) for step in known]
    summary = summarize_metric(metrics["loss"])
    assert summary is not None
    assert (summary.count, summary.last) == (len(known), (loss(known[-1]), known[-1]))
    validated = [step for step in known if step % 32 == 0]
    for name, value in (("val_loss", lambda step: 5.0 - step / 32), ("acc", lambda step: step / 32)):
        points = _points(metrics[name]) if name in metrics else []
        assert points == [(step, value(step)) for step in validated], "no point for a repeated value"
    assert find_loss(metrics) == "loss"


def test_a_short_run_has_the_metrics_of_its_validations_and_epochs() -> None:
    metrics = _events(
        ("validation", 8, {"loss": 3.0, "val_loss": 2.0}),
        ("epoch", 8, {"val_loss": 2.0, "acc": 0.5}),
        ("validation", 16, {"loss": 2.5, "val_loss": 1.0, "acc": 0.5}),
    )
    assert [(m.name, m.source, len(_points(m))) for m in metrics.values()] == [
        ("loss", "validation", 2), ("val_loss", "validation", 2), ("acc", "epoch", 1)
    ]  # fmt: skip
    assert (find_loss(metrics), find_validation_loss(metrics)) == ("loss", "val_loss")


@pytest.mark.parametrize("value", [1.0, math.nan, math.inf])
def test_a_constant_metric_keeps_its_values(value: float) -> None:
    steps = [("step", step, {"x": value}) for step in (1, 2, 3)]
    validations = [("validation", step, {"x": value, "y": value}) for step in (1, 2, 3)]
    metrics = _events(*[entry for pair in zip(steps, validations, strict=True) for entry in pair])
    assert [(m.name, m.source, len(_points(m))) for m in metrics.values()] == [("x", "step", 3), ("y", "validation", 3)]


def test_each_attempt_has_its_own_line_and_evaluations_count() -> None:
    def event(time: float, kind: str, **fields: Any) -> dict[str, Any]:
        return {"time": START + time, "rank": 0, "kind": kind, **fields}

    history = read_history(
        [
            event(0, "run_started"),
            event(1, "step", step=1, metrics={"a": 1.0}),
            event(2, "run_started"),
            event(3, "step", step=1, metrics={"a": 2.0, "b": 3.0}),
            event(90, "evaluated", command="test", metrics=[{"test_acc": 0.5}, {"test_acc/dataloader_idx_1": 0.6}]),
        ]
    )
    metrics = collect_metrics(history)
    assert [len(line.steps) for line in metrics["a"].lines] == [1, 1]
    assert [len(line.steps) for line in metrics["b"].lines] == [0, 1]
    assert (metrics["test_acc"].source, _points(metrics["test_acc/dataloader_idx_1"])) == ("evaluation", [(1, 0.6)])
    assert history.attempts[-1].seconds == 1, "an evaluation is no part of the training"


def test_the_name_of_a_metric_logged_by_step_and_by_epoch_has_no_third_plot() -> None:
    metrics = _events(
        ("step", 10, {"loss_step": 4.0}),
        ("validation", 10, {"loss_step": 4.0, "loss": 4.0}),
        ("epoch", 10, {"loss_step": 4.0, "loss_epoch": 5.0}),
    )
    assert {name: metric.source for name, metric in metrics.items()} == {"loss_step": "step", "loss_epoch": "epoch"}


def test_a_metric_is_summarized_with_its_steps() -> None:
    values = (3.0, math.nan, 1.0, 9.0, math.inf)
    (metric,) = _events(*[("step", 10 * i, {"x": value}) for i, value in enumerate(values)]).values()
    summary = summarize_metric(metric)
    assert summary is not None
    assert (summary.count, summary.lowest, summary.highest, summary.last) == (5, (1, 20), (9, 30), (math.inf, 40))
    assert to_metric_values(metric) == {
        "logged_at": "step", "count": 5, "last": None, "last_step": 40, "lowest": 1.0, "lowest_step": 20,
        "highest": 9.0, "highest_step": 30,
    }  # fmt: skip
