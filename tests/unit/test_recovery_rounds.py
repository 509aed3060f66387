"""The benchmark of recovery tells new steps from steps that are done again, and from the one that was running."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.recovery import trace
from tests.benchmarks.recovery.rounds import differences, recovery
from tests.benchmarks.recovery.trace import Line

KILLED = 10.0


def line(when: float, pid: int, attempt: int, batch: int, *, finished: bool = True) -> Line:
    return Line(when, pid, attempt, 0, batch, finished, (0.5).hex())


def old(last: int, pid: int, until: float = KILLED) -> list[Line]:
    return [line(until - 0.1 * (last - batch), pid, 1, batch) for batch in range(last + 1)]


@pytest.mark.parametrize(
    ("survivor", "replaced", "expected"),
    [
        # The survivor stays, and the step that was running is the first new one.
        ([line(10.2, 1, 2, 4)], [line(10.3, 3, 1, 4)], (0.2, 0)),
        # The running step ended on the survivor just after the kill: it was not lost.
        ([line(10.01, 1, 1, 4), line(10.2, 1, 2, 5)], [line(10.3, 3, 1, 5)], (0.2, 0)),
        # All ranks restart from batch 2.
        (
            [line(10 + n / 10, 4, 1, n) for n in range(2, 6)],
            [line(10 + n / 10, 3, 1, n) for n in range(2, 6)],
            (0.4, 2),
        ),
        # The first half of an accumulation ends no step.
        ([line(10.2, 1, 2, 4, finished=False), line(10.3, 1, 2, 5)], [], (0.3, 0)),
        ([], [], (None, 0)),
    ],
)
def test_time_to_the_first_new_step_and_the_steps_done_again(
    survivor: list[Line], replaced: list[Line], expected: tuple[float | None, int]
) -> None:
    seconds, again = recovery({0: old(3, 1) + survivor, 1: old(3, 2) + replaced}, KILLED)
    assert seconds == pytest.approx(expected[0])
    assert again == expected[1]


def test_another_loss_a_missing_batch_and_other_states_are_differences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, losses, weight in (
        ("expected", (1.0, 2.0), 1),
        ("same", (1.0, 2.0), 1),
        ("other", (1.0, 2.5), 2),
        ("short", (1.0,), 1),
    ):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(trace.FOLDER, str(tmp_path / name))
        for batch, loss in enumerate(losses):
            trace.append(0, 1, (0, batch), finished=True, loss=loss)
        trace.write_final(0, {"parameters": [weight], "schedulers": "unchanged"})

    def found(name: str) -> set[str]:
        return set(differences(tmp_path / name, tmp_path / "expected", {0: trace.read(tmp_path / name, 0)}))

    assert found("same") == set()
    assert found("other") == {"loss of rank 0", "parameters of rank 0"}
    assert found("short") == {"loss of rank 0"}
