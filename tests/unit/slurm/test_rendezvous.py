"""Nodes that find each other: real sockets, one thread for each node."""

from __future__ import annotations

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from slurm.interfaces import find_addresses
from slurm.rendezvous import PortReservation, RendezvousError, host_rendezvous, join_rendezvous

# Threads and sockets.
pytestmark = pytest.mark.slow


def test_every_node_gets_an_address_that_answers_and_the_port(tmp_path: Path) -> None:
    file = tmp_path / "rendezvous.json"
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(join_rendezvous, file, node, 30) for node in (1, 2, 3)]
        first = pool.submit(host_rendezvous, file, 4, 1234, ["no-such-host.invalid", "localhost"], 30)
        places = [other.result() for other in others]
        assert first.result().port == 1234
    for place in places:
        # The name that does not resolve was skipped.
        assert place.host in ("localhost", *find_addresses())
        assert place.port == 1234
    assert not file.exists(), "its token is of no more use"


def test_the_error_lists_missing_nodes_and_ignores_connections_without_the_token(tmp_path: Path) -> None:
    file = tmp_path / "rendezvous.json"

    def knock() -> int:
        while not file.exists():
            pass
        mode = file.stat().st_mode & 0o777
        with socket.create_connection(("127.0.0.1", json.loads(file.read_text())["answers"])) as connection:
            # Without the token that is published.
            connection.sendall(b"guess 1\n")
        return mode

    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(host_rendezvous, file, 3, 1234, ["localhost"], 0.5)
        pool.submit(join_rendezvous, file, 2, 30)
        assert pool.submit(knock).result() == 0o600, "what is published is the user's alone"
        with pytest.raises(RendezvousError, match=r"node 1 of 3 did not join within 0.5 s") as raised:
            first.result()
        assert raised.value.missing == (1,)


def test_a_folder_that_is_not_shared_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RendezvousError, match="check that the nodes share that folder"):
        join_rendezvous(tmp_path / "rendezvous.json", 1, 0.1)


def test_only_our_server_gets_a_reserved_port() -> None:
    reserved = PortReservation()
    try:
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("", reserved.port))
        store = TCPStore(
            "localhost", reserved.port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20)
        )
        store.set("a", "b")
        assert TCPStore("localhost", reserved.port, is_master=False, timeout=timedelta(seconds=20)).get("a") == b"b"
    finally:
        reserved.close()


def test_addresses_have_no_loopback() -> None:
    found = find_addresses()
    assert not any(address.startswith(("127.", "fe80:")) or address == "::1" for address in found)
    assert set(found.values()) <= {name for _, name in socket.if_nameindex()}
