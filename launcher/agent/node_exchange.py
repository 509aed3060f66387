"""What the agents of several nodes tell each other when a rank fails: over the store of the attempt that they share."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from launcher.agent.failure_report import RankEnd
from launcher.agent.hang_detection import RankState

_PAUSE = 0.1


class NodeExchange:
    """One attempt's exchange.

    Args:
        store: shared by the nodes, of this attempt alone.
        node: this node's number in the attempt.
        nodes: number of nodes.
    """

    def __init__(self, store: Any, node: int, nodes: int) -> None:
        self._store = store
        self._node = node
        self._others = [number for number in range(nodes) if number != node]

    def publish(self, ends: Sequence[RankEnd]) -> None:
        """Tell the other nodes what became of this node's ranks."""
        # The store may have gone with the node that served it: then nobody is left to tell.
        with contextlib.suppress(RuntimeError):
            self._store.set(_key(self._node), json.dumps([end.to_dict() for end in ends]))

    def others(self, wait: float = 0.0) -> list[RankEnd]:
        """What the other nodes have told.

        Args:
            wait: seconds to wait until one of them tells of a failure that is not just a lost peer.
        """
        give_up = time.monotonic() + wait
        while True:
            found = self._read()
            if any(end.failed and not end.consequence for end in found) or time.monotonic() >= give_up:
                return found
            time.sleep(_PAUSE)

    def states(self, own: Mapping[int, RankState], wait: float) -> dict[int, RankState]:
        """Tell the other nodes what this node's ranks do in a hang, and hear the same from them.

        Args:
            own: by global rank.
            wait: seconds to wait for all other nodes; each finds the hang by itself, and not at the same moment.

        Returns:
            This node's and all that have told in time.
        """
        everybody = dict(own)
        give_up = time.monotonic() + wait
        waiting = set(self._others)
        # The store may have gone with the node that served it.
        with contextlib.suppress(RuntimeError):
            self._store.set(_states_key(self._node), json.dumps({r: state.to_dict() for r, state in own.items()}))
            while True:
                for number in sorted(waiting):
                    if self._store.check([_states_key(number)]):
                        told = json.loads(self._store.get(_states_key(number)))
                        everybody |= {int(rank): RankState.from_dict(values) for rank, values in told.items()}
                        waiting.discard(number)
                if not waiting or time.monotonic() >= give_up:
                    break
                time.sleep(_PAUSE)
        return everybody

    def reachable(self) -> bool:
        """Whether the store still answers; it goes with the node that serves it."""
        try:
            self._store.check([_key(self._node)])
        except RuntimeError:
            return False
        return True

    def _read(self) -> list[RankEnd]:
        found: list[RankEnd] = []
        with contextlib.suppress(RuntimeError):
            for number in self._others:
                if self._store.check([_key(number)]):
                    found += [RankEnd.from_dict(values) for values in json.loads(self._store.get(_key(number)))]
        return found


def _states_key(node: int) -> str:
    return f"launcher/states/{node}"


def _key(node: int) -> str:
    return f"launcher/ends/{node}"
