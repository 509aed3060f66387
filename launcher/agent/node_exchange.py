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
# Seconds between two looks for a suspicion of another node.
_SUSPICION_INTERVAL = 2.0
_SUSPICION_KEY, _SUSPECT_KEY = "launcher/suspicion/{}", "launcher/suspicion/{}/{}"
_STATES_KEY, _OUTCOMES_KEY = "launcher/states/{}", "launcher/ends/{}"


class NodeExchange:
    """One node's side of the exchange. If the node that serves the store has failed, reads return nothing."""

    def __init__(self, store: Any, node: int, nodes: int) -> None:
        self._store = store
        self._node = node
        self._others = [number for number in range(nodes) if number != node]
        self._next_check = 0.0

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
            self._store.set(_STATES_KEY.format(self._node), _dump_states(own))
            while True:
                for number in sorted(waiting):
                    if self._store.check([_STATES_KEY.format(number)]):
                        states |= _load_states(self._store.get(_STATES_KEY.format(number)))
                        waiting.discard(number)
                if not waiting or time.monotonic() >= deadline:
                    break
                time.sleep(_POLL_INTERVAL)
        return states

    @property
    def decides(self) -> bool:
        """Whether this node gives the verdict on a suspicion."""
        return self._node == 0

    def announce_suspicion(self, number: int) -> None:
        """Ask all nodes for the states of their ranks; `number` counts the suspicions of the attempt."""
        with contextlib.suppress(RuntimeError):
            self._store.set(_SUSPICION_KEY.format(number), str(self._node))

    def has_suspicion(self, number: int, now: float) -> bool:
        """Whether a node asks for the states of all ranks; looks into the store every two seconds of `now`."""
        if now < self._next_check:
            return False
        self._next_check = now + _SUSPICION_INTERVAL
        with contextlib.suppress(RuntimeError):
            return self._store.check([_SUSPICION_KEY.format(number)])
        return False

    def publish_states(self, number: int, own: Mapping[int, RankState]) -> None:
        """Publish the states of this node's ranks for a suspicion."""
        with contextlib.suppress(RuntimeError):
            self._store.set(_SUSPECT_KEY.format(number, self._node), _dump_states(own))

    def read_states(self, number: int) -> tuple[dict[int, RankState], list[int]]:
        """The ranks of the nodes that have published them for a suspicion, and the other nodes; does not wait."""
        states: dict[int, RankState] = {}
        silent = list(self._others)
        with contextlib.suppress(RuntimeError):
            for node in self._others:
                if self._store.check([_SUSPECT_KEY.format(number, node)]):
                    states |= _load_states(self._store.get(_SUSPECT_KEY.format(number, node)))
                    silent.remove(node)
        return states, silent

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


def _dump_states(states: Mapping[int, RankState]) -> str:
    return json.dumps({rank: asdict(state) for rank, state in states.items()})


def _load_states(text: bytes) -> dict[int, RankState]:
    return {int(rank): RankState.from_dict(values) for rank, values in json.loads(text).items()}
