"""Events become attempts, also from a damaged file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.core.events import read_events
from launcher.jobs.status import RunProgress
from launcher.report.history import read_history
from launcher.report.source import read_run
from tests.support.made_run import START, VERSIONS, MadeRun


def event(kind: str, time: float = START, rank: int = 0, **fields: Any) -> dict[str, Any]:
    return {"time": time, "rank": rank, "kind": kind, **fields}


def begun() -> Iterator[dict[str, Any]]:
    yield event(
        "run_started", restart_count=0, source="torchrun", host="n1", versions={"torch": "2.13", "deepspeed": None}
    )
    yield event("training_started", START + 4, step=0)
    yield event("first_step", START + 5, step=1)


@pytest.mark.parametrize(
    ("kind", "fields", "outcome", "detail"),
    [
        ("finished", {"step": 9}, "finished", "finished after step 9"),
        ("interrupted", {"step": 9, "signal": 15, "checkpoint": "c"}, "interrupted",
         "stopped by SIGTERM after step 9; saved a checkpoint"),
        ("interrupted", {"step": 9, "signal": 2, "checkpoint": None}, "interrupted",
         "stopped by Ctrl-C after step 9; without a checkpoint"),
        ("failed", {"host": "n1", "error": "ValueError: no"}, "failed", "rank 0 (n1): ValueError: no"),
        ("out_of_memory", {"host": "n1", "strategy": "ddp"}, "failed", "rank 0 (n1): out of memory with ddp"),
        ("step", {"step": 9, "metrics": {}}, "unknown", ""),
    ],
)  # fmt: skip
def test_the_end_of_an_attempt_is_described(kind: str, fields: dict[str, Any], outcome: str, detail: str) -> None:
    (attempt,) = read_history([*begun(), event(kind, START + 9, **fields)]).attempts
    assert (attempt.outcome, attempt.detail) == (outcome, detail)
    assert (attempt.started, attempt.first_step_time, attempt.seconds) == (START, START + 5, 9)
    assert attempt.versions == {"torch": "2.13"}


# Every way in which an attempt ends, with the step that the event has.
_ENDS: list[tuple[str, dict[str, Any]]] = [
    ("failed", {"host": "n1", "error": "KeyError: 17"}),
    ("out_of_memory", {"host": "n1", "strategy": "ddp"}),
    ("rank_failed", {"host": "n1", "exit_code": -9, "restart": False}),
    ("rank_failed", {"host": "n1", "hung": True, "restart": False}),
    ("interrupted", {"signal": 2, "checkpoint": None, "second": True}),
    ("finished", {"metrics": {}}),
    ("checkpoint", {"epoch": 0}),
    ("ranks", {"ranks": [0]}),
]


@pytest.mark.parametrize("later", [None, -1, 0, 3, 41])
@pytest.mark.parametrize(("kind", "fields"), _ENDS)
def test_the_step_is_the_highest_that_any_record_of_the_attempt_has(
    kind: str, fields: dict[str, Any], later: int | None
) -> None:
    logged = event("step", START + 6, step=40, metrics={})
    other = event("failed", START + 10, rank=1, host="n2", error="Connection closed by peer", step=later)
    events = [*begun(), logged, event(kind, START + 9, rank=1, step=42, **fields), other]
    assert (read_history(events).last_step, RunProgress(events).step) == (42, 42)
    # A later attempt starts from its checkpoint; one that does not start to train has done no step.
    again = event("run_started", START + 20, restart_count=1, source="torchrun", host="n1", versions={})
    broken = event("failed", START + 21, host="n1", error="ImportError: no", step=None)
    unreached = event("rank_failed", START + 22, host="n1", exit_code=1, step=-1)
    assert read_history([*events, again, broken, unreached]).last_step == 42
    assert RunProgress([*events, again, broken, unreached]).step == 42
    resumed = [*events, again, event("training_started", START + 24, step=30)]
    assert (read_history(resumed).last_step, RunProgress(resumed).step) == (30, 30)


def test_the_first_failed_rank_is_the_cause_and_the_agent_s_report_replaces_a_rank_s() -> None:
    lost = event("failed", START + 6, rank=0, host="n1", error="Connection closed by peer")
    later = event("failed", START + 7, rank=1, host="n2", error="the same")
    assert read_history([*begun(), lost, later]).attempts[0].failed_rank == 0
    agent = event("rank_failed", START + 8, rank=3, host="n2", exit_code=-9)
    attempt = read_history([*begun(), lost, later, agent]).attempts[0]
    assert attempt.failed_rank == 3
    assert attempt.detail == "rank 3 (n2): killed by SIGKILL"


def test_missing_nodes_do_not_make_the_attempt_before_them_longer() -> None:
    stopped = event("interrupted", START + 9, step=9, signal=15, checkpoint="c")
    (attempt,) = read_history([*begun(), stopped, event("nodes_missing", START + 9000, nodes=[1])]).attempts
    assert (attempt.outcome, attempt.seconds) == ("interrupted", 9)
    assert attempt.lines[-1].text == "node 1 did not join"


@pytest.mark.parametrize("nodes", [None, 3, "ab", [], {"a": 1}])
def test_nodes_that_are_not_a_list_are_not_named(nodes: object) -> None:
    (attempt,) = read_history([*begun(), event("nodes_missing", START + 9, nodes=nodes)]).attempts
    assert attempt.lines[-1].text == "a node did not join"


def test_a_new_start_is_a_new_attempt_and_repeated_steps_are_counted() -> None:
    events = [
        *begun(),
        event("step", START + 6, step=30, metrics={"loss": 1.0}, seconds_per_step=0.5, learning_rate=[0.1]),
        event("run_started", START + 60, restart_count=1),
        event("training_started", START + 63, step=20),
        event("step", START + 64, step=40, metrics={"loss": 0.5}, seconds_per_step=0.3),
        event("finished", START + 65, step=40, metrics={}),
    ]
    history = read_history(events)
    assert [a.number for a in history.attempts] == [1, 2]
    assert history.attempts[0].outcome == "unknown"
    assert (history.outcome, history.last_step, history.repeated_steps) == ("finished", 40, {1: 10})
    assert history.seconds_per_step == pytest.approx(0.4)
    assert history.attempts[0].steps[0].learning_rates == (0.1,)
    assert history.attempts[1].steps[0].learning_rates == ()


def test_numbers_that_are_not_finite_come_back_as_they_were(tmp_path: Path) -> None:
    run = MadeRun(tmp_path / "run")
    run.start()
    run.step(1, loss=math.nan)
    run.step(2, loss=math.inf)
    run.ranks(2, scale=[math.inf, 1.0])
    (attempt,) = read_run(run.path).history.attempts
    assert math.isnan(attempt.steps[0].metrics["loss"])
    assert attempt.steps[1].metrics["loss"] == math.inf
    assert attempt.rank_table is not None
    assert attempt.rank_table.loss_scale.tolist() == [[math.inf, 1.0]]


def test_a_rank_that_is_missing_at_an_interval_has_nan_there() -> None:
    def interval(step: int, ranks: list[int], own: list[float | None]) -> dict[str, Any]:
        return event("ranks", START + step, step=step, ranks=ranks, own_seconds=own)

    (attempt,) = read_history([*begun(), interval(1, [0, 1], [1.0, None]), interval(2, [1, 2], [3.0, 4.0])]).attempts
    table = attempt.rank_table
    assert table is not None
    assert table.ranks == (0, 1, 2)
    assert np.array_equal(table.own_seconds, [[1, np.nan, np.nan], [np.nan, 3, 4]], equal_nan=True)
    assert np.isnan(table.loss_scale).all()


UNREADABLE = [
    "this is no event",
    '{"time":1,"rank":0,"kind":"step","st',
    "[1,2]",
    '"text"',
    "[" * 100_000,
    "1" * 5000,
    '{"kind":"step"}',
    '{"time":null,"rank":0,"kind":"step","step":3,"metrics":{}}',
    '{"time":1e400,"rank":0,"kind":"step","step":3,"metrics":{}}',
    '{"time":5,"rank":0,"kind":["step"],"step":3,"metrics":{}}',
    '{"time":5,"rank":0,"kind":"step","step":"three","metrics":{}}',
    '{"time":5,"rank":0,"kind":"step","step":-3,"metrics":{}}',
    '{"time":5,"rank":0,"kind":"step","step":true,"metrics":{}}',
    '{"time":5,"rank":0,"kind":"step","step":3,"metrics":[1]}',
    '{"time":5,"rank":0,"kind":"step","step":3,"metrics":{"loss":"low"}}',
    '{"time":5,"rank":0,"kind":"ranks","step":3,"ranks":[0,1],"loss_scale":[1]}',
    '{"time":5,"rank":0,"kind":"ranks","step":3,"ranks":[0],"loss_scale":[{}]}',
    '{"time":5,"rank":0,"kind":"ranks","step":3,"ranks":[0],"own_seconds":[1%s]}' % ("0" * 400),
    '{"time":5,"rank":0,"kind":"ranks","step":3,"ranks":{}}',
    '{"time":5,"rank":0,"kind":"ranks","step":3,"ranks":[]}',
    '{"time":5,"rank":0,"kind":"planned","plan":"none"}',
    '{"time":5,"rank":0,"kind":"alert","ranks":"all"}',
    '{"time":5,"rank":0,"kind":"checkpoint"}',
    "\x00\x00\x00",
]


@pytest.mark.parametrize("line", UNREADABLE, ids=range(len(UNREADABLE)))
def test_an_unreadable_line_is_counted_and_skipped(tmp_path: Path, line: str) -> None:
    run = MadeRun(tmp_path / "run")
    run.start()
    run.step(10)
    run.append(line + "\n")
    run.step(20)
    history = read_run(run.path).history
    assert history.unreadable_lines == 1
    assert [s.step for s in history.attempts[0].steps] == [10, 20]


def test_a_file_cut_at_any_byte_is_read_up_to_there(tmp_path: Path) -> None:
    run = MadeRun(tmp_path / "run")
    run.start()
    for step in range(5):
        run.step(step)
    text = (run.path / "events.jsonl").read_bytes()
    first_step = text.index(b'"kind":"step"')
    for size in (*range(0, first_step, 97), *range(first_step, len(text), 31)):
        (run.path / "events.jsonl").write_bytes(text[:size])
        read = read_run(run.path).history
        assert sum(len(a.steps) for a in read.attempts) in (
            text[:size].count(b"[0.001]}\n"),
            text[:size].count(b"[0.001]}"),
        )


def test_an_event_of_an_unknown_kind_is_described_by_its_fields() -> None:
    events = [*begun(), event("requeued", START + 9, job=17, step=4)]
    lines = read_history(events).attempts[0].lines
    assert [line.text for line in lines] == [
        "started: ranks created by torchrun",
        "first optimizer step done",
        "requeued: job 17",
    ]
    assert lines[-1].step == 4


def test_the_caller_learns_of_unreadable_lines(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    file.write_text('{"kind":"a"}\n\nnonsense\n' + "9" * 5000 + "\n" + json.dumps({"kind": "b"}))
    unreadable: list[int] = []
    assert [e["kind"] for e in read_events(file, lambda: unreadable.append(1))] == ["a", "b"]
    assert len(unreadable) == 2


def test_versions_are_those_of_the_last_attempt_that_recorded_them() -> None:
    history = read_history([*begun(), event("run_started", START + 9)])
    assert history.versions == {"torch": "2.13"}
    assert VERSIONS["torch"] != "2.13"
