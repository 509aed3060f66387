"""Nodes that may join and leave, over torchelastic's rendezvous and a real store, in threads."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import PrefixStore, TCPStore
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.api import RendezvousStoreInfo
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

from launcher.agent.fixed_rendezvous import FixedRendezvous, NumberedNode
from launcher.agent.rendezvous import FreshStoreRendezvous, OneStoreRendezvous, make_rendezvous
from launcher.config.launch_options import LaunchOptions

TIMEOUT = 60


def _ranks(numbers: Sequence[int | None]) -> list[int]:
    """The rank of each node; torchelastic, which orders by process id and age, would give 0, 1, 2, ..."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    nodes: list[OneStoreRendezvous] = []
    for number in numbers:
        client = TCPStore("127.0.0.1", server.port, wait_for_workers=False, timeout=timedelta(seconds=TIMEOUT))
        parameters = RendezvousParameters("c10d", "", "run", len(numbers), len(numbers), "127.0.0.1",
                                          join_timeout=TIMEOUT)  # fmt: skip
        inner = create_handler(client, C10dRendezvousBackend(client, "run"), parameters)
        options = LaunchOptions(min_nodes=1, max_nodes=4, node_rank=number)
        nodes.append(OneStoreRendezvous(inner, options))
    with ThreadPoolExecutor(len(nodes)) as pool:
        infos = list(pool.map(lambda node: node.next_rendezvous(), nodes, timeout=TIMEOUT))
    for node in nodes:
        node.shutdown()
    return [info.rank for info in infos]


@pytest.mark.slow
def test_ranks_follow_the_numbers_of_the_nodes() -> None:
    # At the same time: torchelastic looks once a second whether all nodes are there.
    with ThreadPoolExecutor(2) as pool:
        some, all_with_one_twice = pool.map(_ranks, ([None, 3, None, 1], [1, 1, 0]))
    assert some == [2, 1, 3, 0]
    assert all_with_one_twice == [1, 2, 0]


def test_each_attempt_of_plain_code_has_an_empty_store() -> None:
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    nodes: list[FreshStoreRendezvous] = []
    for number in range(2):
        client = TCPStore("127.0.0.1", server.port, wait_for_workers=False, timeout=timedelta(seconds=TIMEOUT))
        address = RendezvousStoreInfo("127.0.0.1", server.port)
        inner = FixedRendezvous(PrefixStore("run", client), address, NumberedNode(number, 2), TIMEOUT)
        nodes.append(FreshStoreRendezvous(inner, LaunchOptions(min_nodes=2, max_nodes=2, node_rank=number)))
    for attempt in range(3):
        with ThreadPoolExecutor(len(nodes)) as pool:
            infos = list(pool.map(lambda node: node.next_rendezvous(), nodes, timeout=TIMEOUT))
        given = [info.bootstrap_store_info for info in infos if info.bootstrap_store_info is not None]
        (address,) = {(each.master_addr, each.master_port) for each in given}
        assert (address[1] == server.port) == (attempt == 0), "a port that the user has given is used first"
        ranks = TCPStore(address[0], address[1], is_master=False, wait_for_workers=False)
        assert not ranks.check(["default_pg"]), "a key of the attempt before"
        ranks.set("default_pg", "0")
    assert nodes[0].use_agent_store
    for node in nodes:
        node.shutdown()


def test_a_single_node_waits_for_no_other_node() -> None:
    node = make_rendezvous(LaunchOptions())
    assert isinstance(node, FixedRendezvous), "torchelastic's would wait for a last call in every attempt"
    addresses: set[tuple[str, int]] = set()
    for _ in range(2):
        info = node.next_rendezvous()
        assert (info.rank, info.world_size, node.num_nodes_waiting()) == (0, 1, 0)
        assert info.bootstrap_store_info is not None
        addresses.add((info.bootstrap_store_info.master_addr, info.bootstrap_store_info.master_port))
    ((host, port),) = addresses
    ranks = TCPStore(host, port, is_master=False, wait_for_workers=False)
    ranks.set("launcher/run_name", "name")
    assert node.get_run_id() != make_rendezvous(LaunchOptions()).get_run_id()
    assert make_rendezvous(LaunchOptions(run_id="mine")).get_run_id() == "mine"
    node.shutdown()
