"""The exchange over the c10d store by which the ranks agree.

The exchange also gives the attempt a name of its own: torchelastic's store outlives the ranks of a failed attempt, and
what they left in it must not be taken for this attempt's. So rank zero publishes a fresh word (the challenge), every
rank answers under it, and the decision lists the answers' tokens: a rank that read an old challenge does not find its
own token in the old decision and asks again. Five store operations a rank, whatever the number of ranks.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

from launcher.agreement import RankFacts
from launcher.errors import AgreementError, LauncherError

_CHALLENGE = "launcher/challenge"
# Seconds that a rank waits for a decision under one challenge before it looks whether there is a newer one.
_RECHECK = 2.0
_STALE_PAUSE = 0.05
# Seconds that one side of the exchange gives the other beyond its own limit.
_GRACE = 5.0


class Store(Protocol):
    """What is used of torch's c10d stores."""

    def set(self, key: str, value: str, /) -> None:
        """Write a key, over what it had."""
        ...

    def get(self, key: str, /) -> bytes:
        """Read a key; waits until it is there."""
        ...

    def add(self, key: str, value: int, /) -> int:
        """Add to a counter and read it, in one step."""
        ...

    def wait(self, keys: list[str], timeout: timedelta, /) -> None:
        """Wait until all keys are there."""
        ...

    def check(self, keys: list[str], /) -> bool:
        """Whether all keys are there."""
        ...

    def multi_get(self, keys: list[str], /) -> list[bytes]:
        """Read several keys in one step."""
        ...


@dataclass(frozen=True, slots=True)
class Decision:
    """What rank zero decided for this attempt.

    Attributes:
        attempt: a word that no other attempt has; prefixes the store keys of the process group.
        values: plain JSON values.
    """

    attempt: str
    values: Mapping[str, Any]


def exchange(
    store: Store,
    world_size: int,
    facts: RankFacts,
    flat_config: Mapping[str, Any],
    decide: Callable[[Sequence[RankFacts]], Mapping[str, Any]],
    timeout: float,
) -> Decision:
    """Give this rank's facts to rank zero and get its decision.

    Args:
        store: shared by all ranks, possibly with what an earlier attempt left in it.
        world_size: number of ranks.
        facts: this rank's.
        flat_config: dotted path to value; sent only where it differs from rank zero's.
        decide: called on rank zero with everybody's facts; what it raises as `LauncherError` is raised on every rank.
        timeout: seconds to wait for the others.

    Raises:
        AgreementError: a rank never arrived, or `decide` found that the ranks differ.
        LauncherError: what `decide` raised.
    """
    deadline = time.monotonic() + timeout
    if facts.rank == 0:
        return _lead(store, world_size, facts, flat_config, decide, deadline)
    return _follow(store, facts, flat_config, deadline, timeout)


def _lead(
    store: Store,
    world_size: int,
    own: RankFacts,
    flat_config: Mapping[str, Any],
    decide: Callable[[Sequence[RankFacts]], Mapping[str, Any]],
    deadline: float,
) -> Decision:
    attempt = secrets.token_hex(8)
    store.set(
        _CHALLENGE,
        json.dumps({"attempt": attempt, "config_digest": own.config_digest, "sources_digest": own.sources_digest}),
    )
    keys = [_facts_key(attempt, rank) for rank in range(1, world_size)]
    decision: dict[str, Any] = {"tokens": [], "values": None, "error": None}
    failure: LauncherError | None = None
    try:
        _wait(store, keys, deadline)
    except TimeoutError:
        missing = [rank for rank in range(1, world_size) if not store.check([_facts_key(attempt, rank)])]
        # The ranks that did come wait for an answer too.
        decision["tokens"] = [""] + [
            "" if rank in missing else _read_facts(store, attempt, rank).token for rank in range(1, world_size)
        ]
        failure = _never_arrived(missing, own)
    else:
        everybody = [own] + [RankFacts.from_json(text) for text in (store.multi_get(keys) if keys else [])]
        if any(f.config_digest != own.config_digest for f in everybody):
            everybody[0] = dataclasses.replace(own, config=json.loads(json.dumps(flat_config, default=str)))
        decision["tokens"] = [f.token for f in everybody]
        try:
            decision["values"] = dict(decide(everybody))
        except LauncherError as error:
            failure = error
    if failure is not None:
        decision["error"] = {"message": str(failure), "ranks": list(getattr(failure, "ranks", ()))}
    store.set(_decision_key(attempt), json.dumps(decision, default=str))
    if failure is not None:
        # Rank zero may serve the store: the others must have read its answer before it ends.
        _await_count(store, _seen_key(attempt), sum(map(bool, decision["tokens"][1:])))
        raise failure
    return Decision(attempt, decision["values"])


def _await_count(store: Store, key: str, count: int) -> None:
    give_up = time.monotonic() + _GRACE
    while store.add(key, 0) < count and time.monotonic() < give_up:
        time.sleep(0.01)


def _follow(
    store: Store, facts: RankFacts, flat_config: Mapping[str, Any], deadline: float, timeout: float
) -> Decision:
    never = f"rank 0 never arrived: rank {facts.rank} ({facts.host}) waited for it in vain; look at rank 0's log"
    answered: str | None = None
    earlier = ""
    try:
        _wait(store, [_CHALLENGE], deadline)
        while True:
            challenge = json.loads(store.get(_CHALLENGE))
            attempt = challenge["attempt"]
            if attempt != answered:
                differs = challenge["config_digest"] != facts.config_digest
                # Rank zero may have begun to wait for the others only now.
                answer = dataclasses.replace(facts, config=flat_config) if differs else facts
                if challenge["sources_digest"] == facts.sources_digest:
                    answer = dataclasses.replace(answer, sources=None)
                store.set(_facts_key(attempt, facts.rank), answer.to_json())
                answered = attempt
                deadline = time.monotonic() + timeout + _GRACE
            decision = _decision_or_newer_challenge(store, attempt, deadline)
            if decision is not None and decision["tokens"][facts.rank : facts.rank + 1] == [facts.token]:
                break
            # An earlier attempt's challenge: rank zero of this attempt is not here yet.
            if decision is not None and decision["error"] is not None:
                earlier = f"; an earlier attempt ended with: {decision['error']['message']}"
            if time.monotonic() > deadline:
                raise TimeoutError
            time.sleep(_STALE_PAUSE)
    except TimeoutError:
        raise AgreementError(never + earlier, [0]) from None
    if decision["error"] is not None:
        store.add(_seen_key(attempt), 1)
        raise AgreementError(decision["error"]["message"], decision["error"]["ranks"])
    return Decision(attempt, decision["values"])


def _decision_or_newer_challenge(store: Store, attempt: str, deadline: float) -> dict[str, Any] | None:
    """The decision under this challenge, or None if another challenge has taken its place."""
    while True:
        try:
            _wait(store, [_decision_key(attempt)], min(deadline, time.monotonic() + _RECHECK))
        except TimeoutError:
            if time.monotonic() >= deadline:
                raise
            if json.loads(store.get(_CHALLENGE))["attempt"] != attempt:
                return None
        else:
            return json.loads(store.get(_decision_key(attempt)))


def _never_arrived(missing: Sequence[int], own: RankFacts) -> AgreementError:
    names = ", ".join(f"rank {r} (node {r // own.local_world_size})" for r in missing[:8])
    more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
    return AgreementError(
        f"{names}{more} never arrived: rank 0 ({own.host}) waited in vain; look at that rank's log, or raise "
        "agreement_timeout if the node is slow to start",
        missing,
    )


def _wait(store: Store, keys: list[str], deadline: float) -> None:
    """Wait for `keys`; c10d reports a timeout and a lost server alike, so the clock tells them apart."""
    left = deadline - time.monotonic()
    if not keys:
        return
    try:
        store.wait(keys, timedelta(seconds=max(left, 0.001)))
    except RuntimeError as error:
        if time.monotonic() >= deadline - 0.01:
            raise TimeoutError from error
        raise AgreementError(
            f"the store that the ranks meet at is gone: {error}; look at the log of rank 0, which serves it"
        ) from error


def _read_facts(store: Store, attempt: str, rank: int) -> RankFacts:
    return RankFacts.from_json(store.get(_facts_key(attempt, rank)))


def _facts_key(attempt: str, rank: int) -> str:
    return f"launcher/{attempt}/facts/{rank}"


def _decision_key(attempt: str) -> str:
    return f"launcher/{attempt}/decision"


def _seen_key(attempt: str) -> str:
    return f"launcher/{attempt}/seen"
