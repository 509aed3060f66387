from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from launcher.agent.hang_verdict import HangRules, HangVerdict
from launcher.agent.hang_watch import HangOver, HangWatch
from launcher.agent.node_exchange import NodeExchange
from launcher.agent.rank_inspector import RankInspector
from launcher.agent.state_request import RankProcess
from launcher.process.heartbeat import HeartbeatWriter
from launcher.process.phases import Phase
from launcher.process.rank_status import beat_path


class Clock:
    """CLOCK_MONOTONIC of all processes of a test."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Rank:
    """A rank that has trained some steps, then waits in one; its process only sleeps, and writes no stacks."""

    def __init__(self, folder: Path, number: int, clock: Clock) -> None:
        self._process = subprocess.Popen(["sleep", "1000"])
        self._heart = HeartbeatWriter(beat_path(folder, number), clock)
        self.number, self._clock = number, clock
        self.step(5)

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self._heart.enter_phase(Phase.STEP)
            self._clock.now += 0.01
            self._heart.beat(self._heart.step + 1)
            self._heart.enter_phase(Phase.BETWEEN_STEPS)
        self._heart.enter_phase(Phase.STEP)

    def stop(self) -> None:
        os.kill(self._process.pid, signal.SIGSTOP)
        os.waitpid(self._process.pid, os.WUNTRACED)

    def end(self) -> None:
        self._process.kill()
        self._process.wait()

    @property
    def process(self) -> dict[int, RankProcess]:
        return {self.number: RankProcess(self._process.pid, None)}


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ranks(tmp_path: Path, clock: Clock) -> Iterator[list[Rank]]:
    started = [Rank(tmp_path, number, clock) for number in range(2)]
    yield started
    for rank in started:
        rank.end()


Found = list[HangVerdict | HangOver]


def _watch(watch: HangWatch, clock: Clock, ranks: list[Rank], seconds: float) -> Found:
    """All findings of the watch in this time."""
    found: Found = []
    end = clock.now + seconds
    while clock.now < end:
        found.append(watch.look({n: process for rank in ranks for n, process in rank.process.items()}))  # type: ignore[arg-type]
        clock.now += 0.2
    return [each for each in found if each is not None]


def test_a_stopped_rank_is_reported_once_and_its_end_too(tmp_path: Path, clock: Clock, ranks: list[Rank]) -> None:
    watch = HangWatch(RankInspector(tmp_path), None, HangRules(), clock)
    ranks[1].stop()
    assert _watch(watch, clock, ranks, 13.0) == []
    (verdict,) = _watch(watch, clock, ranks, 60.0)
    assert isinstance(verdict, HangVerdict)
    assert (verdict.named, verdict.seconds < 16.0) == ([1], True)
    ranks[0].step()
    assert _watch(watch, clock, ranks, 1.0) == [], "rank 1 is still stopped"
    ranks[1].step()
    (over,) = _watch(watch, clock, ranks, 1.0)
    assert isinstance(over, HangOver)
    assert 70.0 < over.seconds < 76.0


def test_a_phase_that_took_long_once_is_given_twice_that_time(tmp_path: Path, clock: Clock, ranks: list[Rank]) -> None:
    watch = HangWatch(RankInspector(tmp_path), None, HangRules(), clock)
    (verdict,) = _watch(watch, clock, ranks, 30.0)
    assert isinstance(verdict, HangVerdict)
    assert verdict.behind == {}, "both ranks look the same"
    for rank in ranks:
        rank.step()
    assert [type(each) for each in _watch(watch, clock, ranks, 58.0)] == [HangOver]
    assert [type(each) for each in _watch(watch, clock, ranks, 10.0)] == [HangVerdict]


def test_nothing_is_reported_after_the_agent_was_stopped_itself(
    tmp_path: Path, clock: Clock, ranks: list[Rank]
) -> None:
    watch = HangWatch(RankInspector(tmp_path), None, HangRules(), clock)
    assert _watch(watch, clock, ranks, 5.0) == []
    clock.now += 3600.0
    assert _watch(watch, clock, ranks, 5.0) == []
    for rank in ranks:
        rank.step()
    assert _watch(watch, clock, ranks, 10.0) == []


def test_one_of_several_nodes_reports_the_rank_of_another_one(tmp_path: Path, clock: Clock, ranks: list[Rank]) -> None:
    store = dist.HashStore()
    inspector = RankInspector(tmp_path)
    watches = [HangWatch(inspector, NodeExchange(store, node, 2), HangRules(), clock) for node in range(2)]
    ranks[1].stop()
    found: list[Found] = [[], []]
    while clock.now < 1040.0:
        for node in range(2):
            result = watches[node].look(ranks[node].process)
            found[node] += [] if result is None else [result]
        clock.now += 0.2
    assert [[type(each) for each in of_node] for of_node in found] == [[HangVerdict], []]
    assert found[0][0].behind == {1: "stopped by a signal (SIGSTOP)"}  # type: ignore[union-attr]


def test_a_node_that_does_not_answer_is_named(tmp_path: Path, clock: Clock, ranks: list[Rank]) -> None:
    exchange = NodeExchange(dist.HashStore(), 0, 2)
    watch = HangWatch(RankInspector(tmp_path), exchange, HangRules(), clock)
    (verdict,) = _watch(watch, clock, ranks, 60.0)
    assert isinstance(verdict, HangVerdict)
    assert verdict.silent_nodes == (1,)
