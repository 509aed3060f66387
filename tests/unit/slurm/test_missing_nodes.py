"""`read_missing_nodes`: from the last event of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slurm.attempts import read_missing_nodes

_MISSING = {"time": 100.0, "rank": 0, "kind": "nodes_missing", "nodes": [1, 3]}


def _write(run: Path, *lines: str) -> None:
    (run / "events.jsonl").write_text("".join(line + "\n" for line in lines))


def test_the_last_event_lists_the_nodes(tmp_path: Path) -> None:
    long = json.dumps({"time": 1.0, "kind": "step", "text": "x" * 100_000})
    _write(tmp_path, long, json.dumps(_MISSING))
    assert read_missing_nodes(tmp_path, since=99.0) == (1, 3)


def test_an_event_of_an_earlier_attempt_does_not_count(tmp_path: Path) -> None:
    _write(tmp_path, json.dumps(_MISSING))
    assert read_missing_nodes(tmp_path, since=101.0) == ()
    _write(tmp_path, json.dumps(_MISSING), json.dumps({"time": 102.0, "kind": "run_started"}))
    assert read_missing_nodes(tmp_path, since=99.0) == ()


@pytest.mark.parametrize(
    "event", ["", [], 3, {**_MISSING, "nodes": ["a"]}, {**_MISSING, "time": None}, {"kind": "nodes_missing"}]
)
def test_an_unreadable_event_gives_no_nodes(tmp_path: Path, event: object) -> None:
    _write(tmp_path, json.dumps(event))
    assert read_missing_nodes(tmp_path, since=0.0) == ()
    _write(tmp_path, json.dumps(_MISSING)[:-2])
    assert read_missing_nodes(tmp_path, since=0.0) == ()


def test_a_run_without_events_gives_no_nodes(tmp_path: Path) -> None:
    assert read_missing_nodes(tmp_path, since=0.0) == ()
