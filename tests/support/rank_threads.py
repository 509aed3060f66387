"""Ranks as threads of one process, each with its own client of one real TCPStore."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from torch.distributed import PrefixStore, TCPStore

from launcher.agreement.facts import Agreement, RankFacts
from launcher.hardware.devices import Device, Hardware

T = TypeVar("T")
H100 = Device("cuda", 0, "NVIDIA H100", 80 * 2**30, ("fp32", "fp64", "fp16", "bf16"))
V100 = Device("cuda", 0, "Tesla V100", 16 * 2**30, ("fp32", "fp64", "fp16"))
CPU = Device("cpu", 0, "EPYC", 2**36, ("fp32", "fp64"))
VERSIONS = {"torch": "2.13.0", "lightning": "2.6.6", "deepspeed": "0.19.8", "python": "3.11.7"}


def facts(rank: int, device: Device = CPU, versions: dict[str, str | None] | None = None, **known: Any) -> RankFacts:
    """The facts of a rank on a separate node; rank zero is on node0."""
    place = {"local_rank": 0, "local_world_size": 1, "node_rank": rank, "host": f"node{rank}"}
    hardware = Hardware(device, 1, {**VERSIONS, **(versions or {})})
    return RankFacts(rank, **{**place, "hardware": hardware, "config_digest": "same", **known})


def ranks(*devices: Device, **traits: Any) -> Agreement:
    """The agreement of ranks with these devices."""
    return Agreement(tuple(facts(n, device, traits=traits) for n, device in enumerate(devices)))


class Server:
    """A store on a free port.

    Its clients are reused by later tests, because opening one can be slow (name lookups).
    """

    def __init__(self) -> None:
        self._store: TCPStore | None = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._port: int = self._store.port
        self._clients: list[TCPStore] = []

    def client(self, number: int) -> TCPStore:
        """A new connection, as every rank has."""
        while len(self._clients) <= number:
            self._clients.append(TCPStore("127.0.0.1", self._port, is_master=False, wait_for_workers=False))
        return self._clients[number]

    def end(self) -> None:
        """Close the server, as if the host of the store had failed."""
        self._clients.clear()
        self._store = None


class Client(PrefixStore):
    """One rank's connection; a clone is the rendezvous's next connection, which is reused too."""

    def __init__(self, prefix: str, connection: TCPStore, rendezvous: LocalRendezvous) -> None:
        super().__init__(prefix, connection)
        self._rendezvous = rendezvous

    def clone(self) -> Client:
        """Another connection with the same content."""
        return self._rendezvous.client()


class LocalRendezvous:
    """The part of a server that the ranks of one test share."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._prefix = secrets.token_hex(4)
        self._given = 0
        self._one_at_a_time = threading.Lock()

    def client(self) -> Client:
        """The next unused connection."""
        with self._one_at_a_time:
            self._given += 1
            return Client(self._prefix, self._server.client(self._given - 1), self)


class Spy:
    """A real store that records its operations and calls back before each."""

    def __init__(self, store: Any, before: Callable[[str, Any], None] = lambda name, key: None) -> None:
        self._store = store
        self._before = before
        self.operations: list[str] = []

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._store, name)

        def observed(*arguments: Any) -> Any:
            self.operations.append(name)
            self._before(name, arguments[0] if arguments else None)
            answer = call(*arguments)
            return Spy(answer, self._before) if name == "clone" else answer

        return observed


def outcome(body: Callable[[], T]) -> T | Exception:
    """The body's result or exception."""
    try:
        return body()
    except Exception as error:  # noqa: BLE001 -- the test looks at it
        return error


def run_ranks(bodies: Sequence[Callable[[], T]], timeout: float = 20) -> list[Any]:
    """Run every body in a separate thread; returns their results or exceptions."""
    with ThreadPoolExecutor(len(bodies)) as pool:
        futures = [pool.submit(outcome, body) for body in bodies]
        return [future.result(timeout) for future in futures]


def all_set(events: Sequence[threading.Event], timeout: float = 10) -> bool:
    """Wait for all events."""
    return all(event.wait(timeout) for event in events)
