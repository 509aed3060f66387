"""Exchanges failures and hang states between the agents of several nodes, over the store of the current attempt."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from launcher.agent.failure_report import RankOutcome
from launcher.agent.hang_detection import RankState

_POLL_INTERVAL = 0.1
# The same while the ranks of this node wait for the cause of their lost connections.
_CAUSE_INTERVAL = 0.01
_STATES_KEY, _OUTCOMES_KEY = "launcher/states/{}", "launcher/ends/{}"


class NodeExchange:
    """One node's side of the exchange. If the node that serves the store has failed, reads return nothing."""

    def __init__(self, store: Any, node: int, nodes: int) -> None:
        self._store = store
        self._node = node
        self._others = [number for number in range(nodes) if number != node]

    def publish_outcomes(self, outcomes: Sequence[RankOutcome]) -> None:
        """Publish the outcomes of this node's ranks."""
        with contextlib.suppress(RuntimeError):
            self._store.set(_OUTCOMES_KEY.format(self._node), json.dumps([asdict(outcome) for outcome in outcomes]))

    def read_outcomes(self, wait: float = 0.0) -> list[RankOutcome]:
        """Outcomes that the other nodes have published. Waits up to `wait` seconds for a failure that is a cause."""
        deadline = time.monotonic() + wait
        while True:
            found = self._read()
            has_cause = any(outcome.has_failed and not outcome.is_consequence for outcome in found)
            if has_cause or time.monotonic() >= deadline:
                return found
            time.sleep(_CAUSE_INTERVAL)

    def exchange_states(self, own: Mapping[int, RankState], wait: float) -> dict[int, RankState]:
        """Publish this node's states in a hang, and add those that other nodes publish within `wait` seconds.

        The nodes detect the hang at different times.
        """
        states = dict(own)
        deadline = time.monotonic() + wait
        waiting = set(self._others)
        with contextlib.suppress(RuntimeError):
            self._store.set(_STATES_KEY.format(self._node), json.dumps({r: asdict(state) for r, state in own.items()}))
            while True:
                for number in sorted(waiting):
                    if self._store.check([_STATES_KEY.format(number)]):
                        published = json.loads(self._store.get(_STATES_KEY.format(number)))
                        states |= {int(rank): RankState.from_dict(values) for rank, values in published.items()}
                        waiting.discard(number)
                if not waiting or time.monotonic() >= deadline:
                    break
                time.sleep(_POLL_INTERVAL)
        return states

    def is_reachable(self) -> bool:
        """Whether the store still answers."""
        try:
            self._store.check([_OUTCOMES_KEY.format(self._node)])
        except RuntimeError:
            return False
        return True

    def _read(self) -> list[RankOutcome]:
        found: list[RankOutcome] = []
        with contextlib.suppress(RuntimeError):
            for number in self._others:
                if self._store.check([_OUTCOMES_KEY.format(number)]):
                    published = json.loads(self._store.get(_OUTCOMES_KEY.format(number)))
                    found += [RankOutcome.from_dict(values) for values in published]
        return found
