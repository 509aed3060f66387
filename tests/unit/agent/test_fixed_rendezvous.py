"""Numbered nodes over a real TCPStore, in threads: all of them join, or the missing ones are reported."""

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
from torch.distributed.elastic.rendezvous.api import RendezvousStoreInfo

from launcher.agent.fixed_rendezvous import FixedRendezvous, NodesMissingError, NumberedNode
from launcher.core.errors import TopologyError

LONG = 120.0


class CountingStore:
    """A store that records its operations and calls back for each."""

    def __init__(self, store: Any, observe: Callable[[str, Any], None] = lambda *_: None) -> None:
        self._store = store
        self._observe = observe
        self.operations: list[str] = []

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)

        def call(*arguments: Any) -> Any:
            self.operations.append(name)
            self._observe(name, arguments[0])
            return method(*arguments)

        return call


class Nodes:
    """Makes nodes that join at one server, each with its own client."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.stores: list[CountingStore] = []

    def node(
        self,
        number: int,
        timeout: float = LONG,
        observe: Callable[[str, Any], None] = lambda *_: None,
        **limits: float,
    ) -> FixedRendezvous:
        client = TCPStore("127.0.0.1", self.server.port, wait_for_workers=False, timeout=timedelta(seconds=LONG))
        own = FixedRendezvous(
            PrefixStore("run", client),
            RendezvousStoreInfo("host", 7),
            NumberedNode(number, self.count),
            timeout,
            **{"check_interval": 0.05, **limits},
        )
        own._store = CountingStore(own._store, observe)
        self.stores.append(own._store)
        return own

    @staticmethod
    def meet(nodes: Sequence[FixedRendezvous]) -> list[Future[RendezvousInfo]]:
        with ThreadPoolExecutor(len(nodes)) as pool:
            return [pool.submit(node.next_rendezvous) for node in nodes]


def _once_it_waits(event: threading.Event) -> Callable[[str, Any], None]:
    """Set the event when a node has announced itself and waits for node 0's first call."""

    def check(name: str, key: Any) -> None:
        if name == "check" and key == ["launcher/rendezvous/1/call/0"]:
            event.set()

    return check


def test_all_nodes_join_with_their_numbers_and_a_new_store_in_each_round() -> None:
    nodes = Nodes(3)
    handlers = [nodes.node(number) for number in range(3)]
    for round_ in range(2):
        infos = [future.result() for future in nodes.meet(handlers)]
        assert [(info.rank, info.world_size) for info in infos] == [(0, 3), (1, 3), (2, 3)]
        address = infos[1].bootstrap_store_info
        assert (address.master_addr, address.master_port) == ("host", 7)
        assert not infos[0].store.check(["mark"]), f"round {round_} has a new store"
        infos[0].store.set("mark", "")
        assert infos[2].store.check(["mark"]), "all nodes use the same store"
        assert [handler.num_nodes_waiting() for handler in handlers] == [0, 0, 0]


@pytest.mark.parametrize("count", [2, 12])
def test_the_number_of_store_operations_does_not_depend_on_the_number_of_nodes(count: int) -> None:
    nodes = Nodes(count)
    handlers = [nodes.node(number, check_interval=LONG) for number in range(count)]
    for future in nodes.meet(handlers):
        future.result()
    # Without the polls, whose number depends on the time.
    counts = [sum(name != "check" for name in store.operations) for store in nodes.stores]
    assert counts == [6, *[5] * (count - 1)]


def test_all_nodes_report_the_missing_nodes() -> None:
    nodes = Nodes(4)
    zero, two = (future.exception() for future in nodes.meet([nodes.node(0, timeout=0.3), nodes.node(2)]))
    assert str(zero) == str(two) == "nodes 1, 3 did not join within 0.3 s"
    assert isinstance(zero, NodesMissingError)
    assert zero.nodes == (1, 3)


def test_a_node_that_joins_again_is_noticed_and_all_nodes_meet_again() -> None:
    nodes = Nodes(2)
    old = [nodes.node(0), nodes.node(1)]
    for future in nodes.meet(old):
        future.result()
    seen = threading.Event()
    again = nodes.node(1, observe=lambda _, key: seen.set() if "arrived" in str(key) else None)
    with ThreadPoolExecutor(2) as pool:
        second = pool.submit(again.next_rendezvous)
        assert seen.wait(LONG)
        while not old[0].num_nodes_waiting():
            pass
        first = pool.submit(old[0].next_rendezvous)
        assert (first.result(LONG).rank, second.result(LONG).rank) == (0, 1)


def test_a_node_that_joined_and_failed_does_not_count_until_it_is_back() -> None:
    nodes = Nodes(3)
    dead = nodes.node(1)
    # The key that a node leaves if it is killed while node 0 waits for others.
    dead._announce("launcher/rendezvous/1")
    called = threading.Event()
    zero = nodes.node(0, answer_timeout=0.2, observe=lambda name, _: called.set() if name == "delete_key" else None)
    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(zero.next_rendezvous), pool.submit(nodes.node(2).next_rendezvous)]
        assert called.wait(LONG), "node 0 finds that a node does not answer"
        # On a busy machine slow threads must not count as failed again.
        zero._answer_timeout = LONG
        futures.append(pool.submit(nodes.node(1).next_rendezvous))
        assert [future.result(LONG).rank for future in futures] == [0, 2, 1]


def test_two_nodes_with_the_same_number_are_rejected_and_the_run_stays_open() -> None:
    nodes = Nodes(3)
    announced = threading.Event()
    one = nodes.node(1, observe=_once_it_waits(announced))
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(one.next_rendezvous)
        assert announced.wait(LONG)
        nodes.node(1)._announce("launcher/rendezvous/1")
        with pytest.raises(TopologyError, match="--node-rank 1 was given on two nodes"):
            future.result(LONG)
    one.shutdown()
    assert not nodes.node(2).is_closed()


def test_a_node_that_leaves_ends_the_run_for_the_others() -> None:
    nodes = Nodes(3)
    waiting = threading.Event()
    one = nodes.node(1, observe=_once_it_waits(waiting))
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(one.next_rendezvous)
        assert waiting.wait(LONG)
        assert nodes.node(2).shutdown()
        with pytest.raises(RendezvousClosedError):
            future.result(LONG)
    with pytest.raises(RendezvousClosedError):
        nodes.node(0).next_rendezvous()


def test_a_store_that_does_not_answer_is_a_connection_error() -> None:
    class FailedStore:
        def __getattr__(self, name: str) -> Any:
            def call(*_: Any) -> Any:
                raise RuntimeError("Connection reset by peer")

            return call

    nodes = Nodes(2)
    node = nodes.node(1)
    node._store = FailedStore()
    for ask in (node.next_rendezvous, node.num_nodes_waiting, node.is_closed, node.set_closed):
        with pytest.raises(RendezvousConnectionError, match="does not answer: Connection reset by peer"):
            ask()
    assert node.shutdown() is False
