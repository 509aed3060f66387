"""`launcher.training.stop.agreement.StopAgreement` over a real TCPStore: all ranks stop at the same gate."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch.distributed import TCPStore

import launcher.training.stop.agreement
from launcher.training.stop.agreement import StopAgreement
from tests.support.rank_threads import LocalRendezvous, Server, Spy, run_ranks


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.end()


def watchers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "launcher-stop-watch"]


@pytest.fixture
def agreements(server: Server) -> Iterator[Callable[[int], list[StopAgreement]]]:
    """Started agreements of a number of ranks; their threads end with the test."""
    made: list[StopAgreement] = []

    def make(world: int) -> list[StopAgreement]:
        rendezvous = LocalRendezvous(server)
        made.extend(StopAgreement(rendezvous.client(), rank, world) for rank in range(world))
        for agreement in made:
            agreement.start()
        return made

    yield make
    for agreement in made:
        agreement.close()
    for thread in watchers():
        thread.join(5)
    assert not watchers(), "a listening thread outlived close()"


def dice(*seed: object) -> random.Random:
    return random.Random(str(seed))  # noqa: S311 -- for timing, no secret


def gates_passed(agreement: StopAgreement) -> int:
    """Number of gates before the one that stops."""
    give_up = time.monotonic() + 10
    passed = 0
    while not agreement.gate():
        passed += 1
        if time.monotonic() > give_up:
            raise TimeoutError(f"no rank stopped within {passed} gates")
    return passed


def train(
    agreement: StopAgreement, together: threading.Barrier, chance: random.Random, at_step: Callable[[int], None]
) -> int:
    """Steps with a collective in each, as in training: a rank that continues alone breaks the others' collective."""
    give_up = time.monotonic() + 15
    step = 0
    while time.monotonic() < give_up:
        together.wait(10)
        sum(range(chance.randrange(3000)))
        step += 1
        at_step(step)
        if agreement.gate():
            return step
    raise TimeoutError(f"no rank stopped within {step} steps")


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("world", [2, 4])
def test_all_ranks_stop_at_the_same_gate(
    agreements: Callable[[int], list[StopAgreement]], world: int, seed: int
) -> None:
    chance = dice(world, seed)
    asked, step_of_request = chance.randrange(world), chance.randrange(1, 60)
    now = threading.Event()
    ranks = agreements(world)
    together = threading.Barrier(world)

    def at_step(step: int) -> None:
        if step == step_of_request:
            now.set()

    def ask() -> None:
        assert now.wait(10)
        ranks[asked].request(signal.SIGINT)

    bodies = [
        lambda own=own, rank=rank: train(own, together, dice(seed, rank), at_step) for rank, own in enumerate(ranks)
    ]
    stopped = run_ranks([*bodies, ask])[:world]
    assert len(set(stopped)) == 1, stopped
    assert stopped[0] >= step_of_request
    assert {own.signal_number for own in ranks} == {signal.SIGINT}


def test_simultaneous_requests_stop_at_one_gate(agreements: Callable[[int], list[StopAgreement]]) -> None:
    ranks = agreements(3)
    together, now = threading.Barrier(3), threading.Event()

    def ask(own: StopAgreement) -> None:
        assert now.wait(10)
        own.request(signal.SIGTERM)

    bodies = [
        lambda own=own, rank=rank: train(own, together, dice(rank), lambda step: now.set() if step == 20 else None)
        for rank, own in enumerate(ranks)
    ]
    stopped = run_ranks([*bodies, *(lambda own=own: ask(own) for own in ranks)])[:3]
    assert len(set(stopped)) == 1, stopped
    assert {own.signal_number for own in ranks} == {signal.SIGTERM}


def test_rank_that_is_ahead_waits_for_the_others(
    agreements: Callable[[int], list[StopAgreement]],
) -> None:
    ahead, behind = agreements(2)
    assert [ahead.gate() for _ in range(3)] == [False] * 3
    assert behind.gate() is False
    behind.request(signal.SIGINT)
    further_ahead, further_behind = run_ranks([lambda: gates_passed(ahead), lambda: gates_passed(behind)])
    assert 3 + further_ahead == 1 + further_behind


def test_single_rank_that_waits_is_answered_at_once() -> None:
    """A signal's handler runs at once and the request follows: the gate may be reached in between."""
    alone = StopAgreement(None, 0, 1)
    alone.expect()
    waits = threading.Event()
    wait_for = alone._changed.wait_for

    def waiting(*args: Any) -> bool:
        waits.set()
        return wait_for(*args)

    alone._changed.wait_for = waiting  # type: ignore[method-assign]

    def ask() -> None:
        assert waits.wait(10)
        alone.request(signal.SIGINT)

    stopped, _ = run_ranks([alone.gate, ask])
    assert stopped is True


def test_gate_stays_closed_after_the_stop(agreements: Callable[[int], list[StopAgreement]]) -> None:
    one, other = agreements(2)
    one.request(signal.SIGINT)
    run_ranks([lambda: gates_passed(one), lambda: gates_passed(other)])
    assert [one.gate(), other.gate(), one.gate()] == [True] * 3


def test_single_rank_needs_no_store_and_no_thread() -> None:
    alone = StopAgreement(None, 0, 1)
    alone.start()
    assert not watchers()
    assert [alone.gate() for _ in range(5)] == [False] * 5
    alone.request(signal.SIGINT)
    assert alone.gate() is True
    assert alone.signal_number == signal.SIGINT
    alone.close()


def test_no_rank_stops_without_a_request(agreements: Callable[[int], list[StopAgreement]]) -> None:
    ranks = agreements(2)
    assert not any(own.gate() for own in ranks for _ in range(50))


def test_close_ends_the_thread_and_stops_no_rank(
    agreements: Callable[[int], list[StopAgreement]],
) -> None:
    one, other = agreements(2)
    assert len(watchers()) == 2
    one.close()
    other.close()
    for thread in watchers():
        thread.join(5)
    assert not watchers()
    assert one.gate() is False


def reporting_store(rendezvous: LocalRendezvous, rank: int) -> tuple[Spy, threading.Event]:
    """A store, and an event that is set after its rank has reported its gates."""
    event = threading.Event()
    return Spy(
        rendezvous.client(), lambda name, key: event.set() if (name, key) == ("wait", ["stop/at"]) else None
    ), event


@pytest.mark.parametrize("other_is_late", [True, False])
def test_rank_without_an_answer_times_out_at_one_gate(
    server: Server, monkeypatch: pytest.MonkeyPatch, other_is_late: bool
) -> None:
    # Longer than the test's timeout: a gate must not wait for it.
    monkeypatch.setattr(launcher.training.stop.agreement, "_ANSWER_TIMEOUT", 3600)
    rendezvous = LocalRendezvous(server)
    store, reported = reporting_store(rendezvous, 0)
    alone = StopAgreement(store, 0, 2)
    alone.start()
    alone.request(signal.SIGINT)
    assert reported.wait(10)
    monkeypatch.setattr(launcher.training.stop.agreement, "_ANSWER_TIMEOUT", 0.2)
    began = time.monotonic()
    assert alone.gate() is False
    assert time.monotonic() - began > 0.15
    monkeypatch.setattr(launcher.training.stop.agreement, "_ANSWER_TIMEOUT", 3600)
    assert [alone.gate() for _ in range(4)] == [False] * 4
    if other_is_late:
        late = StopAgreement(rendezvous.client(), 1, 2)
        late.start()
        late.expect()
        assert [late.gate() for _ in range(9)] == [False] * 9
        late.close()
    alone.close()


def test_lost_store_does_not_block_a_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher.training.stop.agreement, "_ANSWER_TIMEOUT", 3600)
    own, listens = Server(), threading.Event()
    store = Spy(LocalRendezvous(own).client(), lambda name, key: listens.set() if name == "wait" else None)
    agreement = StopAgreement(store, 0, 2)
    agreement.start()
    assert listens.wait(10)
    agreement.expect()
    own.end()
    assert agreement.gate() is False
    agreement.close()


@pytest.mark.parametrize("world", [2, 8])
def test_a_request_costs_each_rank_a_few_operations(server: Server, world: int) -> None:
    rendezvous = LocalRendezvous(server)
    spies = [Spy(rendezvous.client()) for _ in range(world)]
    ranks = [StopAgreement(spy, rank, world) for rank, spy in enumerate(spies)]
    for own in ranks:
        own.start()
    for own in ranks:
        own.request(signal.SIGTERM)
    run_ranks([lambda own=own: gates_passed(own) for own in ranks])
    for own in ranks:
        own.close()
    assert all(len(spy.operations) < 20 for spy in spies), [spy.operations for spy in spies]


class Late:
    """A store of a busy machine: requests and answers are delayed randomly."""

    def __init__(self, store: Any, chance: random.Random, longest: float) -> None:
        self._store, self._chance, self._longest = store, chance, longest

    def _pause(self) -> None:
        time.sleep(self._chance.choice((0, 0, 0.1, 1)) * self._longest)

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._store, name)

        def late(*arguments: Any) -> Any:
            self._pause()
            answer = call(*arguments)
            self._pause()
            return Late(answer, self._chance, self._longest) if name == "clone" else answer

        return late


@pytest.mark.parametrize("seed", range(24))
def test_all_ranks_stop_at_one_gate_or_none_does(server: Server, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    chance = dice("late", seed)
    world = chance.choice((2, 3, 5))
    # About as long as the operations take: ranks time out before, while and after the others report.
    monkeypatch.setattr(launcher.training.stop.agreement, "_ANSWER_TIMEOUT", chance.choice((0.02, 0.05, 0.1, 1.0)))
    rendezvous, collective = LocalRendezvous(server), threading.Barrier(world)
    ranks = [StopAgreement(Late(rendezvous.client(), dice(seed, n), 0.01), n, world) for n in range(world)]
    asked = {rank: chance.randrange(1, 25) for rank in chance.sample(range(world), chance.randrange(1, world + 1))}
    threads: list[threading.Thread] = []

    def train(rank: int) -> int | None:
        own = ranks[rank]
        own.start()
        for step in range(1, 60):
            # Breaks, and fails the test, if another rank has stopped.
            collective.wait(10)
            if asked.get(rank) == step:
                own.expect()
                threads.append(threading.Thread(target=own.request, args=(signal.SIGTERM,)))
                threads[-1].start()
            if own.gate():
                own.close()
                return step
        own.close()
        return None

    try:
        stopped = run_ranks([lambda rank=rank: train(rank) for rank in range(world)])
    finally:
        for thread in threads:
            thread.join(10)
    assert len(set(stopped)) == 1, stopped


@pytest.mark.parametrize("first", [0, 1])
def test_a_rank_does_not_wait_for_one_that_has_closed(
    server: Server, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    # Longer than the test's timeout.
    monkeypatch.setattr(launcher.training.stop.agreement, "_ANSWER_TIMEOUT", 3600)
    rendezvous = LocalRendezvous(server)
    store, asked = reporting_store(rendezvous, 1 - first)
    closed, left = StopAgreement(rendezvous.client(), first, 2), StopAgreement(store, 1 - first, 2)
    for agreement in (closed, left):
        agreement.start()
    closed.gate()
    closed.close()
    left.request(signal.SIGINT)
    assert asked.wait(10)
    left.gate()
    left.close()


def test_gate_does_not_use_the_store(server: Server) -> None:
    rendezvous = LocalRendezvous(server)
    spy = Spy(rendezvous.client())
    agreement = StopAgreement(spy, 0, 2)
    agreement.start()
    for _ in range(1000):
        agreement.gate()
    operations = list(spy.operations)
    agreement.close()
    for thread in watchers():
        thread.join(5)
    assert set(operations) == {"clone"}


def test_close_ends_the_listening_thread() -> None:
    # Otherwise it would wake inside the store's code while Python ends, which aborts the process.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    agreement = StopAgreement(store, rank=0, world_size=2)
    agreement.start()
    assert "launcher-stop-watch" in {thread.name for thread in threading.enumerate()}
    agreement.close()
    assert "launcher-stop-watch" not in {thread.name for thread in threading.enumerate()}
