"""The rendezvous of a fixed number of numbered nodes, which needs few store operations however many nodes there are.

torchelastic's rendezvous keeps all nodes in one record that each node rewrites until its own change succeeds, so the
number of operations grows with the square of the nodes. With numbered nodes that are all required:

- each node writes a token under its number, and node 0, which serves the store, waits for all of them;
- node 0 calls the nodes, and each answers: this finds a node that joined and failed while node 0 waited for others;
- node 0 publishes its decision: start, call again once the missing node is back, or give up.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
# Seconds between two checks whether the run has ended, and between two polls of the awaited keys.
_CHECK_INTERVAL = 2.0
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.005, 0.2
# Seconds in which a running node answers a call; other nodes wait this much longer than node 0.
_ANSWER_TIMEOUT = 15.0
# Decisions of node 0; any other text is the error for all nodes.
_START, _CALL_AGAIN = "begin", "again"


class NodesMissingError(RendezvousTimeoutError):
    """Nodes with these numbers did not join within `timeout` seconds."""

    def __init__(self, nodes: Sequence[int], timeout: float) -> None:
        named = ", ".join(map(str, nodes[:8])) + (f" and {len(nodes) - 8} more" if len(nodes) > 8 else "")
        super().__init__(f"node{'s' if len(nodes) > 1 else ''} {named} did not join within {timeout:g} s")
        self.nodes = tuple(nodes)


@dataclass(frozen=True, slots=True)
class NumberedNode:
    """One of `count` numbered nodes of the run `run_id`; node 0 serves the store."""

    number: int
    count: int
    run_id: str = "launcher"


class FixedRendezvous(RendezvousHandler):
    """One node's side.

    Args:
        store: a TCPStore that all nodes reach and node 0 serves.
        timeout: seconds to wait for the other nodes.
        check_interval: seconds between two checks whether the run has ended.
        answer_timeout: seconds in which a running node answers.
    """

    def __init__(
        self,
        store: Store,
        address: RendezvousStoreInfo,
        node: NumberedNode,
        timeout: float,
        *,
        check_interval: float = _CHECK_INTERVAL,
        answer_timeout: float = _ANSWER_TIMEOUT,
    ) -> None:
        self._store: Any = store
        self._shared = store
        self._address = address
        self._node = node
        self._timeout = timeout
        self._check_interval = check_interval
        self._answer_timeout = answer_timeout
        self._token = secrets.token_hex(8)
        self._round = 0
        self._is_duplicate = False

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for all nodes.

        Raises:
            NodesMissingError: this is node 0, and other nodes did not join.
            RendezvousTimeoutError: on the other nodes; its message has the missing nodes.
            RendezvousClosedError: another node has ended the run.
            RendezvousConnectionError: the store, and so node 0, does not answer.
            TopologyError: another node has the same number.
        """
        number = self._call(lambda: self._store.add(_ROUND, 0)) + 1
        rendezvous = f"launcher/rendezvous/{number}"
        self._raise_if_closed()
        self._announce(rendezvous)
        self._call(lambda: self._store.add(f"{rendezvous}/arrived", 1))
        if self._node.number == 0:
            self._lead(rendezvous)
            self._call(lambda: self._store.add(_ROUND, 1))
        else:
            self._follow(rendezvous)
        self._round = number
        attempt = PrefixStore(f"launcher/attempt/{number}", self._shared)
        return RendezvousInfo(attempt, self._node.number, self._node.count, self._address)

    def _announce(self, rendezvous: str) -> None:
        self._call(lambda: self._store.set(_node_key(rendezvous, self._node.number), self._token))

    def _lead(self, rendezvous: str) -> None:
        """Node 0: wait for all nodes, call them, and decide."""
        deadline = time.monotonic() + self._timeout
        all_nodes = [_node_key(rendezvous, node) for node in range(self._node.count)]
        call = 0
        while True:
            if not self._wait_for(all_nodes, rendezvous, deadline):
                self._give_up(rendezvous, call, self._find_missing(all_nodes))
            self._call(lambda call=call: self._store.set(f"{rendezvous}/call/{call}", ""))
            answers = [f"{rendezvous}/here/{call}/{node}" for node in range(1, self._node.count)]
            if self._wait_for(answers, rendezvous, time.monotonic() + self._answer_timeout):
                self._publish_decision(rendezvous, call, _START)
                return
            for node in self._find_missing(answers, first=1):
                self._call(lambda node=node: self._store.delete_key(_node_key(rendezvous, node)))
            self._publish_decision(rendezvous, call, _CALL_AGAIN)
            call += 1

    def _follow(self, rendezvous: str) -> None:
        """Other nodes: answer node 0's calls until it decides."""
        deadline = time.monotonic() + self._timeout + 2 * self._answer_timeout
        call = 0
        while True:
            call_key, decision_key = f"{rendezvous}/call/{call}", f"{rendezvous}/verdict/{call}"
            if not self._wait_for([call_key], rendezvous, deadline):
                raise RendezvousTimeoutError(f"node {self._node.number} timed out waiting for node 0's call")
            self._call(lambda call=call: self._store.set(f"{rendezvous}/here/{call}/{self._node.number}", ""))
            if not self._wait_for([decision_key], rendezvous, deadline):
                raise RendezvousTimeoutError(f"node {self._node.number} timed out waiting for node 0's decision")
            decision = json.loads(self._call(lambda key=decision_key: self._store.get(key)))
            if decision == _START:
                return
            if decision != _CALL_AGAIN:
                raise RendezvousTimeoutError(decision)
            # Node 0 deletes a node's key if its answer was late.
            self._announce(rendezvous)
            call += 1

    def _give_up(self, rendezvous: str, call: int, missing: Sequence[int]) -> None:
        error = NodesMissingError(missing, self._timeout)
        self._publish_decision(rendezvous, call, str(error))
        self._call(lambda: self._store.set(f"{rendezvous}/call/{call}", ""))
        raise error

    def _publish_decision(self, rendezvous: str, call: int, decision: str) -> None:
        self._call(lambda: self._store.set(f"{rendezvous}/verdict/{call}", json.dumps(decision)))

    def _find_missing(self, keys: Sequence[str], first: int = 0) -> list[int]:
        """Numbers of the nodes without a key; the first key belongs to node `first`."""
        return [
            node for node, key in enumerate(keys, start=first)
            if not self._call(lambda key=key: self._store.check([key]))
        ]  # fmt: skip

    def _wait_for(self, keys: Sequence[str], rendezvous: str, deadline: float) -> bool:
        """Wait until all keys exist; False at the deadline."""
        # c10d's own wait blocks Ctrl-C and logs warnings when it times out.
        began = checked = time.monotonic()
        while not self._call(lambda: self._store.check(list(keys))):
            now = time.monotonic()
            if now >= deadline:
                return False
            if now >= checked + self._check_interval:
                checked = now
                self._raise_if_closed()
                self._raise_if_duplicate(rendezvous)
            # Nodes that restart arrive within a part of a second, those of a new job within minutes.
            pause = min(max((now - began) / 10, _SHORTEST_PAUSE), _LONGEST_PAUSE)
            time.sleep(min(pause, deadline - now))
        return True

    def _raise_if_duplicate(self, rendezvous: str) -> None:
        key = _node_key(rendezvous, self._node.number)
        # For a missing key c10d returns the expected value.
        holder = self._call(lambda: self._store.compare_set(key, self._token, self._token)).decode()
        if holder != self._token:
            self._is_duplicate = True
            raise TopologyError(
                f"--node-rank {self._node.number} was given on two nodes; give each node a different number"
            )

    def _raise_if_closed(self) -> None:
        if self.is_closed():
            raise RendezvousClosedError

    def num_nodes_waiting(self) -> int:
        """Number of nodes that have joined the next rendezvous, so that the others must join it too."""
        return self._call(lambda: self._store.add(f"launcher/rendezvous/{self._round + 1}/arrived", 0))

    def is_closed(self) -> bool:
        """Whether a node has ended the run."""
        return self._call(lambda: self._store.check([_CLOSED]))

    def set_closed(self) -> None:
        """End the run for all nodes."""
        self._call(lambda: self._store.set(_CLOSED, "1"))

    def shutdown(self) -> bool:
        """Leave, which ends the run: the other nodes cannot continue without this one."""
        if not self._is_duplicate:
            try:
                self.set_closed()
            except RendezvousConnectionError:
                return False
        return True

    @property
    def use_agent_store(self) -> bool:
        """The ranks use the agents' store."""
        return True

    def get_backend(self) -> str:
        """Name of the backend."""
        return "c10d"

    def get_run_id(self) -> str:
        """Name of the rendezvous."""
        return self._node.run_id

    def _call(self, operation: Callable[[], Any]) -> Any:
        try:
            return operation()
        except (RuntimeError, ValueError) as error:
            raise RendezvousConnectionError(f"the store on node 0 does not answer: {error}") from error


def _node_key(rendezvous: str, node: int) -> str:
    return f"{rendezvous}/node/{node}"
