"""The attempts of a job, and when it is no longer requeued."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slurm.attempts import SlurmAttempt, count_fruitless, read_attempts, read_saved_step, record_attempt


def _attempts(*steps: int, job: str = "7") -> list[SlurmAttempt]:
    return [SlurmAttempt(job, number, step, 0.0, "n1") for number, step in enumerate(steps)]


@pytest.mark.parametrize(
    ("starts", "now", "count"),
    [((), 0, 0), ((0,), 0, 1), ((0,), 5, 0), ((0, 0), 0, 2), ((0, 5, 5), 5, 2), ((0, 0, 5), 9, 0), ((0, 5, 5, 5), 5, 3),
     ((5, 5), 3, 2)],
)  # fmt: skip
def test_attempts_in_a_row_that_saved_nothing_new(starts: tuple[int, ...], now: int, count: int) -> None:
    assert count_fruitless(_attempts(*starts), "7", now) == count


def test_another_submission_is_counted_from_zero() -> None:
    assert count_fruitless([*_attempts(0, 0, 0), *_attempts(0, job="8")], "8", 0) == 1


def test_attempts_are_recorded_and_read(tmp_path: Path) -> None:
    assert read_attempts(tmp_path) == []
    record_attempt(tmp_path, "7", 0, 0, "n1")
    with (tmp_path / "attempts.jsonl").open("a") as file:
        file.write('{"job_id": "7", "numb\n[]\n')
    record_attempt(tmp_path, "7", 1, 5, "n2")
    assert [(a.job_id, a.number, a.step, a.host) for a in read_attempts(tmp_path)] == [
        ("7", 0, 0, "n1"),
        ("7", 1, 5, "n2"),
    ]
    assert (tmp_path / "attempts.jsonl").stat().st_mode & 0o777 == 0o600


def test_the_saved_step_is_that_of_the_newest_manifest(tmp_path: Path) -> None:
    assert read_saved_step(tmp_path) == 0
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name, content in {"a": json.dumps({"step": 5}), "b": json.dumps({"step": 12}), "c": '{"st', "d": "[]"}.items():
        (folder / f"{name}.ckpt.manifest").write_text(content)
    assert read_saved_step(tmp_path) == 12
