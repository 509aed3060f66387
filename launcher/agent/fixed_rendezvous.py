"""The rendezvous of a fixed number of numbered nodes: each needs as few store operations among a thousand as among two.

torchelastic's own rendezvous keeps all nodes in one record that each of them rewrites until its own change has won: the
operations grow with the square of the nodes. Where every node has a number and all must come, none of that is needed:

- each node writes a token under its number; node 0, which serves the store, waits for all of them;
- it calls, and all that still live answer: a node that came and died while the others were waited for is found;
- it gives its verdict: begin, call again once the missing node is back, or give up.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

from torch.distributed import PrefixStore, Store
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.api import RendezvousStoreInfo

from launcher.core.errors import TopologyError

_CLOSED = "launcher/closed"
_ROUND = "launcher/round"
# Seconds between two looks whether the run was ended, and between two whether what is waited for has come.
_LOOK_EVERY = 2.0
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.005, 0.2
# Seconds in which a node that lives answers a call, and beyond its own limit waits for node 0's verdict.
_ANSWER_WITHIN = 15.0


class NodesMissingError(RendezvousTimeoutError):
    """Some nodes never came.

    Args:
        nodes: their numbers.
        timeout: seconds in which they should have.
    """

    def __init__(self, nodes: Sequence[int], timeout: float) -> None:
        named = ", ".join(map(str, nodes[:8])) + (f" and {len(nodes) - 8} more" if len(nodes) > 8 else "")
        super().__init__(f"node{'s' if len(nodes) > 1 else ''} {named} never came within {timeout:g} s")
        self.nodes = tuple(nodes)


class FixedRendezvous(RendezvousHandler):
    """One node's side.

    Args:
        store: a TCPStore that all nodes reach, and node 0 serves.
        host: its host.
        port: its port.
        node: this node's number.
        nodes: how many there are.
        timeout: seconds to wait for the others.
        look_every: seconds between two looks whether the run was ended.
        answer_within: seconds in which a living node answers.
    """

    def __init__(
        self,
        store: Store,
        host: str,
        port: int,
        node: int,
        nodes: int,
        timeout: float,
        *,
        look_every: float = _LOOK_EVERY,
        answer_within: float = _ANSWER_WITHIN,
    ) -> None:
        self._store: Any = store
        self._shared = store
        self._address = RendezvousStoreInfo(host, port)
        self._node = node
        self._nodes = nodes
        self._timeout = timeout
        self._look_every = look_every
        self._answer_within = answer_within
        self._token = secrets.token_hex(8)
        self._round = 0
        self._is_double = False

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for all nodes.

        Raises:
            NodesMissingError: this is node 0, and others never came.
            RendezvousTimeoutError: on the others; says which never came.
            RendezvousClosedError: another node has ended the run.
            RendezvousConnectionError: the store is gone, and with it node 0.
            TopologyError: another node has the same number.
        """
        number = self._call(lambda: self._store.add(_ROUND, 0)) + 1
        rendezvous = f"launcher/rendezvous/{number}"
        self._check_open()
        self._announce(rendezvous)
        self._call(lambda: self._store.add(f"{rendezvous}/arrived", 1))
        if self._node == 0:
            self._lead(rendezvous)
            self._call(lambda: self._store.add(_ROUND, 1))
        else:
            self._follow(rendezvous)
        self._round = number
        attempt = PrefixStore(f"launcher/attempt/{number}", self._shared)
        return RendezvousInfo(attempt, self._node, self._nodes, self._address)

    def _announce(self, rendezvous: str) -> None:
        self._call(lambda: self._store.set(_node_key(rendezvous, self._node), self._token))

    def _lead(self, rendezvous: str) -> None:
        deadline = time.monotonic() + self._timeout
        everybody = [_node_key(rendezvous, node) for node in range(self._nodes)]
        call = 0
        while True:
            if not self._await(everybody, rendezvous, deadline):
                self._give_up(rendezvous, call, self._missing(everybody))
            self._call(lambda call=call: self._store.set(f"{rendezvous}/call/{call}", ""))
            answers = [f"{rendezvous}/here/{call}/{node}" for node in range(1, self._nodes)]
            if self._await(answers, rendezvous, time.monotonic() + self._answer_within):
                self._decide(rendezvous, call, "begin")
                return
            for node in self._missing(answers, first=1):
                self._call(lambda node=node: self._store.delete_key(_node_key(rendezvous, node)))
            self._decide(rendezvous, call, "again")
            call += 1

    def _follow(self, rendezvous: str) -> None:
        deadline = time.monotonic() + self._timeout + 2 * self._answer_within
        call = 0
        while True:
            keys = (f"{rendezvous}/call/{call}", f"{rendezvous}/verdict/{call}")
            if not self._await([keys[0]], rendezvous, deadline):
                raise RendezvousTimeoutError(f"node 0 never called node {self._node}")
            self._call(lambda call=call: self._store.set(f"{rendezvous}/here/{call}/{self._node}", ""))
            if not self._await([keys[1]], rendezvous, deadline):
                raise RendezvousTimeoutError(f"node 0 never answered node {self._node}")
            verdict = json.loads(self._call(lambda key=keys[1]: self._store.get(key)))
            if verdict == "begin":
                return
            if verdict != "again":
                raise RendezvousTimeoutError(verdict)
            # Node 0 may have taken this one for dead.
            self._announce(rendezvous)
            call += 1

    def _give_up(self, rendezvous: str, call: int, missing: Sequence[int]) -> None:
        error = NodesMissingError(missing, self._timeout)
        self._decide(rendezvous, call, str(error))
        self._call(lambda: self._store.set(f"{rendezvous}/call/{call}", ""))
        raise error

    def _decide(self, rendezvous: str, call: int, verdict: str) -> None:
        self._call(lambda: self._store.set(f"{rendezvous}/verdict/{call}", json.dumps(verdict)))

    def _missing(self, keys: Sequence[str], first: int = 0) -> list[int]:
        """Numbers of the nodes whose key is not there; the keys begin with that of node `first`."""
        return [
            node for node, key in enumerate(keys, start=first)
            if not self._call(lambda key=key: self._store.check([key]))
        ]  # fmt: skip

    def _await(self, keys: Sequence[str], rendezvous: str, deadline: float) -> bool:
        """Wait until all keys are there; False if they are not in time."""
        # Not c10d's own wait: it holds off Ctrl-C, and writes warnings of its own where it runs out of time.
        pause, looked = _SHORTEST_PAUSE, time.monotonic()
        while not self._call(lambda: self._store.check(list(keys))):
            now = time.monotonic()
            if now >= deadline:
                return False
            if now >= looked + self._look_every:
                looked = now
                self._look(rendezvous)
            time.sleep(min(pause, deadline - now))
            pause = min(2 * pause, _LONGEST_PAUSE)
        return True

    def _look(self, rendezvous: str) -> None:
        """The run may be over, or somebody else have this node's number."""
        self._check_open()
        key = _node_key(rendezvous, self._node)
        # Where the key is missing c10d answers with what was expected.
        holder = self._call(lambda: self._store.compare_set(key, self._token, self._token)).decode()
        if holder != self._token:
            self._is_double = True
            raise TopologyError(f"--node-rank {self._node} was given on two nodes; each node needs a number of its own")

    def _check_open(self) -> None:
        if self.is_closed():
            raise RendezvousClosedError

    def num_nodes_waiting(self) -> int:
        """Nodes that have come to the next rendezvous: the others should too."""
        return self._call(lambda: self._store.add(f"launcher/rendezvous/{self._round + 1}/arrived", 0))

    def is_closed(self) -> bool:
        """Whether a node has ended the run."""
        return self._call(lambda: self._store.check([_CLOSED]))

    def set_closed(self) -> None:
        """End the run for all nodes."""
        self._call(lambda: self._store.set(_CLOSED, "1"))

    def shutdown(self) -> bool:
        """Leave; the others cannot go on without this node."""
        if not self._is_double:
            try:
                self.set_closed()
            except RendezvousConnectionError:
                return False
        return True

    @property
    def use_agent_store(self) -> bool:
        """The ranks meet at the store that the agents use."""
        return True

    def get_backend(self) -> str:
        """Name of the backend."""
        return "c10d"

    def get_run_id(self) -> str:
        """The rendezvous' name."""
        return "launcher"

    def _call(self, operation: Callable[[], Any]) -> Any:
        try:
            return operation()
        except (RuntimeError, ValueError) as error:
            raise RendezvousConnectionError(f"the store of node 0 does not answer: {error}") from error


def _node_key(rendezvous: str, node: int) -> str:
    return f"{rendezvous}/node/{node}"
