"""Exchanges failures and hang states between the agents of several nodes, over the store of the current attempt."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from launcher.agent.failure_report import RankOutcome
from launcher.agent.hang_detection import RankState

_POLL_INTERVAL = 0.1


class NodeExchange:
    """One node's side of the exchange. If the store is gone, so is the node that serves it: reads return nothing.

    Args:
        store: store of this attempt, shared by the nodes.
        node: this node's number in the attempt.
        nodes: number of nodes.
    """

    def __init__(self, store: Any, node: int, nodes: int) -> None:
        self._store = store
        self._node = node
        self._others = [number for number in range(nodes) if number != node]

    def publish_outcomes(self, outcomes: Sequence[RankOutcome]) -> None:
        """Publish the outcomes of this node's ranks."""
        with contextlib.suppress(RuntimeError):
            self._store.set(_outcomes_key(self._node), json.dumps([outcome.to_dict() for outcome in outcomes]))

    def read_outcomes(self, wait: float = 0.0) -> list[RankOutcome]:
        """Outcomes that the other nodes have published.

        Args:
            wait: seconds to wait for a failure that is not a lost connection.
        """
        deadline = time.monotonic() + wait
        while True:
            found = self._read()
            has_cause = any(outcome.has_failed and not outcome.is_consequence for outcome in found)
            if has_cause or time.monotonic() >= deadline:
                return found
            time.sleep(_POLL_INTERVAL)

    def exchange_states(self, own: Mapping[int, RankState], wait: float) -> dict[int, RankState]:
        """Publish the states of this node's ranks in a hang and read those of the other nodes.

        Args:
            own: by global rank.
            wait: seconds to wait for all other nodes, which detect the hang at different times.

        Returns:
            States of this node and of all nodes that published in time.
        """
        states = dict(own)
        deadline = time.monotonic() + wait
        waiting = set(self._others)
        with contextlib.suppress(RuntimeError):
            self._store.set(_states_key(self._node), json.dumps({r: state.to_dict() for r, state in own.items()}))
            while True:
                for number in sorted(waiting):
                    if self._store.check([_states_key(number)]):
                        published = json.loads(self._store.get(_states_key(number)))
                        states |= {int(rank): RankState.from_dict(values) for rank, values in published.items()}
                        waiting.discard(number)
                if not waiting or time.monotonic() >= deadline:
                    break
                time.sleep(_POLL_INTERVAL)
        return states

    def is_reachable(self) -> bool:
        """Whether the store still answers."""
        try:
            self._store.check([_outcomes_key(self._node)])
        except RuntimeError:
            return False
        return True

    def _read(self) -> list[RankOutcome]:
        found: list[RankOutcome] = []
        with contextlib.suppress(RuntimeError):
            for number in self._others:
                if self._store.check([_outcomes_key(number)]):
                    published = json.loads(self._store.get(_outcomes_key(number)))
                    found += [RankOutcome.from_dict(values) for values in published]
        return found


def _states_key(node: int) -> str:
    return f"launcher/states/{node}"


def _outcomes_key(node: int) -> str:
    return f"launcher/ends/{node}"
