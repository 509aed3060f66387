"""`launcher.core.events`: one JSON line per event, whoever writes and whatever is in it."""

from __future__ import annotations

import json
import math
import resource
import stat
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.core.events import EventLog, read_events

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def test_an_event_is_one_line_with_time_rank_and_kind(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    EventLog(path, 3, clock=lambda: 12.3456789).write("step", step=7, metrics={"loss": 0.5})
    assert json.loads(path.read_text()) == {
        "time": 12.345679,
        "rank": 3,
        "kind": "step",
        "step": 7,
        "metrics": {"loss": 0.5},
    }
    assert path.read_text().count("\n") == 1


def test_events_are_read_back_in_their_order(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "e", 0)
    for step in range(5):
        log.write("step", step=step)
    assert [event["step"] for event in read_events(tmp_path / "e")] == list(range(5))


def test_only_the_owner_can_read_the_file(tmp_path: Path) -> None:
    EventLog(tmp_path / "e", 0).write("x")
    assert stat.S_IMODE((tmp_path / "e").stat().st_mode) == 0o600


def test_a_later_attempt_appends(tmp_path: Path) -> None:
    EventLog(tmp_path / "e", 0).write("first")
    EventLog(tmp_path / "e", 0).write("second")
    assert [event["kind"] for event in read_events(tmp_path / "e")] == ["first", "second"]


@pytest.mark.parametrize(("value", "text"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
@pytest.mark.parametrize("wrap", [lambda v: v, lambda v: {"a": v}, lambda v: [v], lambda v: ({"a": [v]},)])
def test_nan_and_inf_become_text_at_any_depth(tmp_path: Path, value: float, text: str, wrap: Any) -> None:
    EventLog(tmp_path / "e", 0).write("x", it=wrap(value))
    (event,) = read_events(tmp_path / "e")
    assert event["it"] == json.loads(json.dumps(wrap(text)))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    json.loads((tmp_path / "e").read_text(), parse_constant=refuse)


def test_values_unknown_to_json_are_written_as_text(tmp_path: Path) -> None:
    EventLog(tmp_path / "e", 0).write("x", checkpoint=Path("/runs/a.ckpt"), numbers={1: 2})
    (event,) = read_events(tmp_path / "e")
    assert (event["checkpoint"], event["numbers"]) == ("/runs/a.ckpt", {"1": 2})


@settings(deadline=None)
@given(st.text(min_size=1, max_size=10), st.dictionaries(st.sampled_from(["a", "step", "text"]), JSON))
def test_any_event_is_one_line_and_is_read_back_unchanged(kind: str, fields: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "events.jsonl")
        log = EventLog(path, 0, clock=lambda: 1.0)
        log.write(kind, **fields)
        log.write("after")
        events = list(read_events(path))
    assert log.lost == 0
    assert events == [{"time": 1.0, "rank": 0, "kind": kind, **fields}, {"time": 1.0, "rank": 0, "kind": "after"}]


def test_lines_of_concurrent_ranks_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "e"
    together = threading.Barrier(4)

    def speak(rank: int) -> None:
        log = EventLog(path, rank)
        together.wait(10)
        for step in range(100):
            log.write("step", step=step, text="x" * 500)

    threads = [threading.Thread(target=speak, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    events = list(read_events(path))
    assert len(events) == 400
    assert all([e["step"] for e in events if e["rank"] == rank] == list(range(100)) for rank in range(4))


def test_events_that_cannot_be_written_are_counted_and_raise_nothing(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "no-such-folder" / "e", 0)
    log.write("x")
    log.write("y")
    assert log.lost == 2
    full = EventLog(Path("/dev/full"), 0)
    full.write("x")
    assert full.lost == 1


def test_an_incomplete_line_does_not_damage_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "e"
    log = EventLog(path, 0)
    log.write("first")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, hard))
    try:
        log.write("cut", text="x" * 200)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log.write("after")
    assert log.lost == 1
    assert [event["kind"] for event in read_events(path)] == ["first", "after"]


def test_incomplete_and_foreign_lines_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "e"
    EventLog(path, 0).write("whole")
    with path.open("ab") as file:
        file.write(b'\n[1]\n"text"\n{"no": "event"}\n\xff\xfe\n{"kind":"cut of')
    assert [event["kind"] for event in read_events(path)] == ["whole"]
