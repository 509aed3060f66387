"""Numbered nodes over a real TCPStore, in threads: they all meet, or it is told who is missing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from torch.distributed import PrefixStore, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousInfo,
)

from launcher.agent.fixed_rendezvous import FixedRendezvous, NodesMissingError
from launcher.core.errors import TopologyError

LONG = 120.0


class Spy:
    """A store that counts what is asked of it, and tells of each."""

    def __init__(self, store: Any, heard: Callable[[str, Any], None] = lambda *_: None) -> None:
        self._store = store
        self._heard = heard
        self.operations: list[str] = []

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)

        def call(*arguments: Any) -> Any:
            self.operations.append(name)
            self._heard(name, arguments[0])
            return method(*arguments)

        return call


class Nodes:
    """Makes nodes that meet at one server, each with a client of its own."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.spies: list[Spy] = []

    def node(
        self, number: int, timeout: float = LONG, heard: Callable[[str, Any], None] = lambda *_: None, **limits: float
    ) -> FixedRendezvous:
        client = TCPStore("127.0.0.1", self.server.port, wait_for_workers=False, timeout=timedelta(seconds=LONG))
        own = FixedRendezvous(
            PrefixStore("run", client), "host", 7, number, self.count, timeout, **{"look_every": 0.05, **limits}
        )
        own._store = Spy(own._store, heard)
        self.spies.append(own._store)
        return own

    @staticmethod
    def meet(nodes: Sequence[FixedRendezvous]) -> list[Future[RendezvousInfo]]:
        with ThreadPoolExecutor(len(nodes)) as pool:
            return [pool.submit(node.next_rendezvous) for node in nodes]


def _once_it_waits(event: threading.Event) -> Callable[[str, Any], None]:
    """Says when a node has announced itself and waits for node 0's first call."""

    def hear(name: str, key: Any) -> None:
        if name == "check" and key == ["launcher/rendezvous/1/call/0"]:
            event.set()

    return hear


def test_all_nodes_meet_with_their_numbers_and_a_store_that_is_new_in_each_round() -> None:
    nodes = Nodes(3)
    handlers = [nodes.node(number) for number in range(3)]
    for round_ in range(2):
        infos = [future.result() for future in nodes.meet(handlers)]
        assert [(info.rank, info.world_size) for info in infos] == [(0, 3), (1, 3), (2, 3)]
        address = infos[1].bootstrap_store_info
        assert (address.master_addr, address.master_port) == ("host", 7)
        assert not infos[0].store.check(["mark"]), f"round {round_} has a store of its own"
        infos[0].store.set("mark", "")
        assert infos[2].store.check(["mark"]), "which is the same for all nodes"
        assert [handler.num_nodes_waiting() for handler in handlers] == [0, 0, 0]


@pytest.mark.parametrize("count", [2, 12])
def test_a_node_needs_the_same_few_store_operations_among_any_number(count: int) -> None:
    nodes = Nodes(count)
    handlers = [nodes.node(number, look_every=LONG) for number in range(count)]
    for future in nodes.meet(handlers):
        future.result()
    # Beside those by which it waits: how many these are is a matter of time.
    counts = [sum(name != "check" for name in spy.operations) for spy in nodes.spies]
    assert counts == [6, *[5] * (count - 1)]


def test_the_missing_node_is_named_to_all() -> None:
    nodes = Nodes(4)
    zero, two = (future.exception() for future in nodes.meet([nodes.node(0, timeout=0.3), nodes.node(2)]))
    assert str(zero) == str(two) == "nodes 1, 3 never came within 0.3 s"
    assert isinstance(zero, NodesMissingError)
    assert zero.nodes == (1, 3)


def test_a_node_that_comes_again_is_seen_by_those_that_train_and_all_meet_anew() -> None:
    nodes = Nodes(2)
    old = [nodes.node(0), nodes.node(1)]
    for future in nodes.meet(old):
        future.result()
    seen = threading.Event()
    again = nodes.node(1, heard=lambda _, key: seen.set() if "arrived" in str(key) else None)
    with ThreadPoolExecutor(2) as pool:
        second = pool.submit(again.next_rendezvous)
        assert seen.wait(LONG)
        while not old[0].num_nodes_waiting():
            pass
        first = pool.submit(old[0].next_rendezvous)
        assert (first.result(LONG).rank, second.result(LONG).rank) == (0, 1)


def test_a_node_that_came_and_died_does_not_count_until_it_is_back() -> None:
    nodes = Nodes(3)
    dead = nodes.node(1)
    # What a node that is killed while the others are waited for leaves behind.
    dead._announce("launcher/rendezvous/1")
    called = threading.Event()
    zero = nodes.node(0, answer_within=0.2, heard=lambda name, _: called.set() if name == "delete_key" else None)
    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(zero.next_rendezvous), pool.submit(nodes.node(2).next_rendezvous)]
        assert called.wait(LONG), "node 0 finds that one does not answer"
        # Slow threads of a loaded machine must not be taken for dead for ever.
        zero._answer_within = LONG
        futures.append(pool.submit(nodes.node(1).next_rendezvous))
        assert [future.result(LONG).rank for future in futures] == [0, 2, 1]


def test_two_nodes_of_one_number_are_told_at_once_and_the_run_stays_open() -> None:
    nodes = Nodes(3)
    announced = threading.Event()
    one = nodes.node(
        1,
        heard=lambda name, key: (
            announced.set() if name == "check" and str(key).startswith("['launcher/rendezvous/1/call") else None
        ),
    )
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(one.next_rendezvous)
        assert announced.wait(LONG)
        nodes.node(1)._announce("launcher/rendezvous/1")
        with pytest.raises(TopologyError, match="--node-rank 1 was given on two nodes"):
            future.result(LONG)
    one.shutdown()
    assert not nodes.node(2).is_closed()


def test_a_node_that_leaves_ends_the_waiting_of_the_others() -> None:
    nodes = Nodes(3)
    waiting = threading.Event()
    one = nodes.node(
        1,
        heard=lambda name, key: (
            waiting.set() if name == "check" and str(key).startswith("['launcher/rendezvous/1/call") else None
        ),
    )
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(one.next_rendezvous)
        assert waiting.wait(LONG)
        assert nodes.node(2).shutdown()
        with pytest.raises(RendezvousClosedError):
            future.result(LONG)
    with pytest.raises(RendezvousClosedError):
        nodes.node(0).next_rendezvous()


def test_a_store_that_is_gone_is_told_as_that() -> None:
    class Gone:
        def __getattr__(self, name: str) -> Any:
            def call(*_: Any) -> Any:
                raise RuntimeError("Connection reset by peer")

            return call

    nodes = Nodes(2)
    node = nodes.node(1)
    node._store = Gone()
    for ask in (node.next_rendezvous, node.num_nodes_waiting, node.is_closed, node.set_closed):
        with pytest.raises(RendezvousConnectionError, match="does not answer: Connection reset by peer"):
            ask()
    assert node.shutdown() is False
