"""`launcher status` at 80 columns."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from launcher.cli.status import describe_status, format_members, format_runs, shorten_ending
from launcher.jobs.status import RunStatus
from launcher.jobs.sweep_status import MemberStatus
from launcher.runs.goodput import KINDS, FailureCost, Ledger
from tests.unit.jobs.test_ending import ENDINGS, end

LONG = "rank 1 on gpu-node-0017.cluster.example.org: ValueError: Expected input batch_size (32) to match target (31)"


def _status(name: str = "it", **fields: Any) -> RunStatus:
    return RunStatus(name, **{"state": "failed", "step": 300, "checkpoint_step": 200, "attempts": 1, **fields})


@pytest.mark.parametrize("events", [events for events, *_ in ENDINGS])
def test_every_ending_is_one_line_of_80_columns_with_the_advice(events: list[dict[str, Any]]) -> None:
    ending = end(*events)
    status = _status(state=ending.state, detail=ending.text, reason=ending.reason, advice=ending.advice)
    lines = format_runs([status], 80)
    assert all(len(line) <= 80 for line in lines)
    if ending.reason in ("finished", "max_epochs", "max_steps"):
        assert len(lines) == 2
        return
    assert len(lines) == 3
    assert lines[2].startswith(f"  {ending.text[:38]}")
    assert ending.advice.split("; ")[0] in lines[2]
    assert f"next: {ending.advice}" in describe_status(status) or not ending.advice


def test_a_long_reason_is_cut_before_the_advice() -> None:
    shown = shorten_ending(LONG, "fix the error; then --resume auto", 78)
    assert shown == f"{LONG[:42]}\u2026; fix the error; then --resume auto"
    assert shorten_ending(LONG, "fix the error", 200) == f"{LONG}; fix the error", "a pipe has no width"
    assert shorten_ending("short", "", 78) == "short"
    assert len(shorten_ending(LONG, "a very long advice " * 9, 78)) == 78


def test_the_runs_are_aligned_and_metrics_are_left_out_where_there_is_no_room() -> None:
    metrics = {f"metric_{i}": 1 / 3 for i in range(9)}
    found = [
        _status("first", state="running", metrics=metrics),
        _status("a-run-with-a-long-name", job="slurm 123456", attempts=3, detail=LONG, advice="fix the error"),
    ]
    lines = format_runs(found, 80)
    assert lines[0] == "run                     state    step  saved  job           last metrics"
    assert lines[1].rstrip() == "first                   running   300    200                metric_0 0.3333"
    assert lines[2].rstrip() == "a-run-with-a-long-name  failed    300    200  slurm 123456"
    assert lines[3] == f"  {LONG[:62]}\u2026; fix the error"
    assert "metric_0 0.3333" in format_runs([dataclasses.replace(found[0], name="x")], 80)[1]
    assert len(format_runs(found, 100_000)[1].split("metric_")) == 7


def test_a_script_has_neither_steps_nor_checkpoints() -> None:
    script = _status("script", state="done", step=0, checkpoint_step=0, is_script=True)
    assert format_runs([script], 80) == ["run     state  step  saved", "script  done      -      -"]
    both = format_runs([script, _status("fit", state="done", metrics={"loss": 0.5})], 80)
    assert both[0].endswith("last metrics")
    assert both[1].split() == ["script", "done", "-", "-"]
    assert both[2].split() == ["fit", "done", "300", "200", "loss", "0.5"]


@pytest.mark.parametrize(
    ("width", "name", "columns"),
    [
        (120, "train/loss", "run state step saved attempts job last metrics"),
        (80, "train/loss", "run state step saved job last metrics"),
        (70, "train/loss", "run state step job last metrics"),
        (60, "train/loss", "run state step last metrics"),
        (40, "train/loss", "run state step saved attempts job"),
        (80, "a/very/long/name/of/a/metric", "run state step last metrics"),
        (80, "name/" * 20, "run state step saved attempts job"),
    ],
)
def test_columns_make_room_for_the_metrics_in_a_stated_order(width: int, name: str, columns: str) -> None:
    found = [
        _status("20261129-184622-d83be7", metrics={name: 0.12345, "other": 1.0}),
        _status("sub1", job="local 17552", attempts=2),
    ]
    head, first, _ = format_runs(found, width)
    assert head.split() == columns.split()
    assert (f"{name} 0.1235" in first) == columns.endswith("metrics")
    assert len(first) <= width or not columns.endswith("metrics")


def test_the_best_member_is_marked_and_a_failed_one_has_its_reason() -> None:
    def member(index: int, best: float | None, status: RunStatus | None) -> MemberStatus:
        return MemberStatus(index, f"s-{index}", {"model.lr": 0.1 * index}, status, "val_acc", best, best, True)

    failed = _status("s-1", detail=LONG, advice="fix the error; then --resume auto")
    lines = format_members([member(0, 0.5, _status(state="done")), member(1, 0.9, failed), member(2, None, None)], 80)
    assert lines == [
        "   state       step  last  best    settings",
        "0  done         300   0.5   0.5    lr=0.0",
        "1  failed       300   0.9   0.9 *  lr=0.1",
        f"  {LONG[:42]}\u2026; fix the error; then --resume auto",
        "2  not queued     0                lr=0.2",
        "last, best: values of val_acc; * marks the best (highest)",
    ]


def test_one_run_is_shown_with_all_that_is_known() -> None:
    status = _status(detail=LONG, advice="fix the error; then --resume auto", command="launcher fit --resume auto",
                     peak_memory=2**30, peak_memory_of="resident memory of the process (RSS)")  # fmt: skip
    assert describe_status(status) == [
        LONG,
        "next: fix the error; then --resume auto",
        "  launcher fit --resume auto",
        "peak memory of a rank: 1 GiB, resident memory of the process (RSS)",
    ]


def test_the_use_of_time_is_one_line_of_80_columns() -> None:
    day = 86_400_000_000
    micro = dict.fromkeys(KINDS, 0) | {"productive": 20 * day, "restart": day, "stopped": 3 * day}
    failures = tuple(FailureCost(n, 0.0, 1, "killed", restart=day // 20) for n in range(20))
    *_, line = describe_status(_status(goodput=Ledger(micro, failures)))
    assert line == "effective training: 95.2% (20 d 0 h of 21 d 0 h); 20 failures cost 24 h 00 min"
    assert len(line) <= 80
    assert describe_status(_status(goodput=Ledger(dict.fromkeys(KINDS, 0)))) == []
