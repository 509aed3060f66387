"""Nodes that may come and go, over torchelastic's own rendezvous and a real store, in threads."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

from launcher.agent.rendezvous import OneStoreRendezvous
from launcher.config.launch_options import LaunchOptions

WITHIN = 60


def _ranks(numbers: Sequence[int | None]) -> list[int]:
    """What rank each gets; torchelastic, which orders by process id and by age in it, gives them 0, 1, 2, ..."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    nodes: list[OneStoreRendezvous] = []
    for number in numbers:
        client = TCPStore("127.0.0.1", server.port, wait_for_workers=False, timeout=timedelta(seconds=WITHIN))
        parameters = RendezvousParameters("c10d", "", "run", len(numbers), len(numbers), "127.0.0.1",
                                          join_timeout=WITHIN)  # fmt: skip
        inner = create_handler(client, C10dRendezvousBackend(client, "run"), parameters)
        options = LaunchOptions(min_nodes=1, max_nodes=4, node_rank=number)
        nodes.append(OneStoreRendezvous(inner, options))
    with ThreadPoolExecutor(len(nodes)) as pool:
        met = list(pool.map(lambda node: node.next_rendezvous(), nodes, timeout=WITHIN))
    for node in nodes:
        node.shutdown()
    return [info.rank for info in met]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("numbers", "ranks"),
    [([None, 3, None, 1], [2, 1, 3, 0]), ([1, 1, 0], [1, 2, 0])],
)
def test_ranks_follow_the_numbers_that_nodes_were_given(numbers: list[int | None], ranks: list[int]) -> None:
    assert _ranks(numbers) == ranks
