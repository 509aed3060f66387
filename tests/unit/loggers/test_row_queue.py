"""`launcher.loggers.row_queue`: a slow or broken W&B costs rows, which are counted, and never a step."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from launcher.loggers.row_queue import RowQueue
from launcher.loggers.wandb_tracker import log_row

LONG = 60.0


class Gate:
    """A write that blocks until the test releases it."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.open = threading.Event()

    def __call__(self) -> None:
        self.entered.set()
        assert self.open.wait(LONG)


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate()
    yield made
    made.open.set()


def writers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "launcher-row-queue"]


def stalled(capacity: int, gate: Gate) -> RowQueue:
    """A queue whose thread blocks in its first write."""
    writer = RowQueue(capacity)
    assert writer.put(gate)
    assert gate.entered.wait(LONG)
    return writer


def test_rows_are_written_in_order_by_a_background_thread() -> None:
    writer = RowQueue()
    seen: list[tuple[int, bool]] = []
    main = threading.get_ident()
    for row in range(20):
        assert writer.put(lambda row=row: seen.append((row, threading.get_ident() == main)))
    assert writer.flush(LONG)
    assert seen == [(row, False) for row in range(20)]
    assert writer.close(LONG) == 0


def test_an_unused_queue_has_no_thread() -> None:
    before = len(writers())
    writer = RowQueue()
    assert writer.flush(0)
    assert writer.close(0) == 0
    assert len(writers()) == before


@pytest.mark.case(41)
@pytest.mark.parametrize("capacity", [0, -1])
def test_a_capacity_below_1_raises(capacity: int) -> None:
    with pytest.raises(ValueError, match=f"capacity={capacity}"):
        RowQueue(capacity)


def test_a_stall_drops_exactly_what_the_queue_does_not_hold(gate: Gate) -> None:
    writer = stalled(4, gate)
    written: list[int] = []
    taken = [writer.put(lambda row=row: written.append(row)) for row in range(10)]
    assert taken == [True] * 4 + [False] * 6
    assert writer.dropped == 6
    assert not writer.flush(0)
    gate.open.set()
    assert writer.flush(LONG)
    assert written == [0, 1, 2, 3]
    assert writer.put(lambda: written.append(10)), "there is place again"
    assert writer.close(LONG) == 6
    assert written[-1] == 10


@pytest.mark.case(41)
def test_the_end_does_not_wait_for_a_stall_and_counts_the_dropped_rows(gate: Gate) -> None:
    writer = stalled(4, gate)
    written: list[int] = []
    for row in range(6):
        writer.put(lambda row=row: written.append(row))
    assert writer.close(0) == 2 + 4
    assert writer.close(0) == 2 + 4, "nothing is left to drop"
    gate.open.set()
    # The running write succeeded, and later ones were dropped.
    assert writer.flush(LONG)
    assert (written, writer.dropped) == ([], 6)


@pytest.mark.case(41)
def test_writes_that_raise_are_counted_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> None:
        raise ConnectionError("no route")

    writer = RowQueue()
    written: list[int] = []
    for _ in range(3):
        writer.put(broken)
        writer.put(lambda: written.append(1))
    assert writer.close(LONG) == 3
    assert written == [1, 1, 1]
    assert caplog.messages == ["W&B did not accept a row: ConnectionError: no route; training continues"]


def test_after_its_end_a_writer_can_be_used_again() -> None:
    writer = RowQueue()
    written: list[int] = []
    for row in range(3):
        writer.put(lambda row=row: written.append(row))
        assert writer.close(LONG) == 0
    assert written == [0, 1, 2]


def test_a_later_training_is_not_delayed_by_a_stall(gate: Gate) -> None:
    writer = stalled(2, gate)
    assert writer.close(0) == 0
    written: list[int] = []
    for row in range(2):
        writer.put(lambda row=row: written.append(row))
    gate.open.set()
    assert writer.flush(LONG)
    assert written == [0, 1]


def test_the_thread_is_a_daemon_and_ends_with_the_queue() -> None:
    writer = RowQueue()
    assert writer.put(lambda: None)
    (thread,) = [t for t in writers() if t is writer._thread]
    assert thread.daemon
    writer.close(LONG)
    thread.join(LONG)
    assert not thread.is_alive()


class Recorder:
    def __init__(self, current: object) -> None:
        self.run = SimpleNamespace(step=current)
        self.rows: list[tuple[dict[str, object], int]] = []

    def log(self, row: dict[str, object], step: int, commit: bool) -> None:
        assert commit, "a row that stays open gets the next one's values"
        self.rows.append((row, step))


@pytest.mark.parametrize(
    ("current", "step", "at"), [(0, 50, 50), (50, 50, 50), (51, 50, 52), (200, 50, 201), (None, 50, 50), ("9", 50, 50)]
)
def test_a_row_has_its_true_step_and_a_step_that_wandb_takes(current: object, step: int, at: int) -> None:
    wandb = Recorder(current)
    log_row(wandb, {"amp/loss_scale": 8.0}, step)
    assert wandb.rows == [({"amp/loss_scale": 8.0, "trainer/global_step": step}, at)]


def test_a_wandb_run_without_a_step_gets_the_true_one() -> None:
    wandb = Recorder(0)
    del wandb.run.step
    log_row(wandb, {}, 7)
    assert wandb.rows == [({"trainer/global_step": 7}, 7)]


def test_with_other_threads_wandb_counts_the_rows() -> None:
    calls: list[tuple[dict[str, object], dict[str, object]]] = []
    wandb = SimpleNamespace(run=SimpleNamespace(step=99), log=lambda row, **how: calls.append((row, how)))
    log_row(wandb, {"amp/loss_scale": 8.0}, 7, at_next=True)
    assert calls == [({"amp/loss_scale": 8.0, "trainer/global_step": 7}, {"commit": True})]
