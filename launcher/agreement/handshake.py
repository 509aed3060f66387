"""The exchange over the c10d store by which the ranks agree.

The exchange also gives the attempt a name of its own: torchelastic's store outlives the ranks of a failed attempt, and
what they left in it must not be taken for this attempt's. So rank zero publishes a fresh word (the challenge), every
rank answers under it, and the decision lists the answers' tokens: a rank that read an old challenge does not find its
own token in the old decision and asks again. Five store operations a rank, whatever the number of ranks.

Rank zero plans meanwhile, which may take long. It reports that it lives and what it does, and the others wait as long
as it does; without a sign of life they give up.
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

from launcher.agreement.facts import RankFacts
from launcher.core.errors import AgreementError, LauncherError
from launcher.process.activity import ActivityReporter, ActivityWatch, doing

_CHALLENGE = "launcher/challenge"
# Seconds that a rank waits for a decision under one challenge before it looks whether there is a newer one.
_RECHECK = 2.0
_STALE_PAUSE = 0.05
# Seconds between two looks at the store of a rank that has more than the store to look at.
_LOOK_PAUSE = 0.1
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
    tell: Callable[[str], None] = lambda text: None,
    look: Callable[[], None] | None = None,
) -> Decision:
    """Give this rank's facts to rank zero and get its decision.

    Args:
        store: shared by all ranks, possibly with what an earlier attempt left in it.
        world_size: number of ranks.
        facts: this rank's.
        flat_config: dotted path to value; sent only where it differs from rank zero's.
        decide: called on rank zero with everybody's facts; what it raises as `LauncherError` is raised on every rank.
        timeout: seconds to wait for the others; for rank zero's decision, without a sign of life from it.
        tell: told what rank zero is doing, if that takes long.
        look: called often while this rank waits, which costs a store operation each time; raises an `AgreementError`
            if another rank will never come. Without it nothing interrupts the wait, Ctrl-C neither.

    Raises:
        AgreementError: a rank never arrived or died, or `decide` found that the ranks differ.
        LauncherError: what `decide` raised.
    """
    deadline = time.monotonic() + timeout
    if facts.rank == 0:
        return _lead(store, world_size, facts, flat_config, decide, deadline, timeout, tell, look)
    return _follow(store, facts, flat_config, deadline, timeout, tell, look)


def _lead(
    store: Store,
    world_size: int,
    own: RankFacts,
    flat_config: Mapping[str, Any],
    decide: Callable[[Sequence[RankFacts]], Mapping[str, Any]],
    deadline: float,
    timeout: float,
    tell: Callable[[str], None],
    look: Callable[[], None] | None,
) -> Decision:
    attempt = secrets.token_hex(8)
    store.set(
        _CHALLENGE,
        json.dumps({"attempt": attempt, "config_digest": own.config_digest, "sources_digest": own.sources_digest}),
    )
    with ActivityReporter(store if world_size > 1 else None, _sign_key(attempt), tell, timeout):
        decision, failure = _decide(store, world_size, own, flat_config, decide, deadline, attempt, look)
    store.set(_decision_key(attempt), json.dumps(decision, default=str))
    if failure is not None:
        # Rank zero may serve the store: the others must have read its answer before it ends.
        _await_count(store, _seen_key(attempt), sum(map(bool, decision["tokens"][1:])))
        raise failure
    return Decision(attempt, decision["values"])


def _decide(
    store: Store,
    world_size: int,
    own: RankFacts,
    flat_config: Mapping[str, Any],
    decide: Callable[[Sequence[RankFacts]], Mapping[str, Any]],
    deadline: float,
    attempt: str,
    look: Callable[[], None] | None,
) -> tuple[dict[str, Any], LauncherError | None]:
    """Rank zero's decision once all have answered, and the error that it is."""
    keys = [_facts_key(attempt, rank) for rank in range(1, world_size)]
    decision: dict[str, Any] = {"tokens": [], "values": None, "error": None}
    failure: LauncherError | None = None
    try:
        with doing("waiting for the facts of all ranks"):
            _wait(store, keys, deadline, look)
    except (TimeoutError, AgreementError) as problem:
        missing = [rank for rank in range(1, world_size) if not store.check([_facts_key(attempt, rank)])]
        # The ranks that did come wait for an answer too.
        decision["tokens"] = [""] + [
            "" if rank in missing else _read_facts(store, attempt, rank).token for rank in range(1, world_size)
        ]
        failure = _never_arrived(missing, own) if isinstance(problem, TimeoutError) else problem
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
    return decision, failure


def _await_count(store: Store, key: str, count: int) -> None:
    give_up = time.monotonic() + _GRACE
    while store.add(key, 0) < count and time.monotonic() < give_up:
        time.sleep(0.01)


def _follow(
    store: Store,
    facts: RankFacts,
    flat_config: Mapping[str, Any],
    deadline: float,
    timeout: float,
    tell: Callable[[str], None],
    look: Callable[[], None] | None,
) -> Decision:
    problem = f"rank 0 never arrived: rank {facts.rank} ({facts.host}) waited for it in vain; look at rank 0's log"
    leader: _Leader | None = None
    earlier = ""
    try:
        _wait(store, [_CHALLENGE], deadline, look)
        while True:
            challenge = json.loads(store.get(_CHALLENGE))
            attempt = challenge["attempt"]
            if leader is None or attempt != leader.attempt:
                differs = challenge["config_digest"] != facts.config_digest
                # Rank zero may have begun to wait for the others only now.
                answer = dataclasses.replace(facts, config=flat_config) if differs else facts
                if challenge["sources_digest"] == facts.sources_digest:
                    answer = dataclasses.replace(answer, sources=None)
                store.set(_facts_key(attempt, facts.rank), answer.to_json())
                leader = _Leader(store, attempt, timeout + _GRACE, tell, look)
            decision = leader.decision_or_newer_challenge()
            if decision is not None and decision["tokens"][facts.rank : facts.rank + 1] == [facts.token]:
                break
            # An earlier attempt's challenge: rank zero of this attempt is not here yet.
            if decision is not None and decision["error"] is not None:
                earlier = f"; an earlier attempt ended with: {decision['error']['message']}"
            if time.monotonic() > leader.deadline:
                raise TimeoutError
            time.sleep(_STALE_PAUSE)
    except TimeoutError:
        if leader is not None and leader.watch.activity:
            problem = (
                f"rank 0 died or hangs while {leader.watch.activity}: rank {facts.rank} ({facts.host}) had no sign of "
                f"life from it for {timeout:g} s (agreement_timeout); look at rank 0's log"
            )
        raise AgreementError(problem + earlier, [0]) from None
    if decision["error"] is not None:
        store.add(_seen_key(attempt), 1)
        raise AgreementError(decision["error"]["message"], decision["error"]["ranks"])
    return Decision(attempt, decision["values"])


class _Leader:
    """Rank zero of one challenge, as another rank sees it: waited for while it gives signs of life."""

    def __init__(
        self,
        store: Store,
        attempt: str,
        patience: float,
        tell: Callable[[str], None],
        look: Callable[[], None] | None,
    ) -> None:
        self.attempt = attempt
        self.watch = ActivityWatch(store, _sign_key(attempt), tell)
        self.deadline = time.monotonic() + patience
        self._store, self._patience, self._look = store, patience, look

    def decision_or_newer_challenge(self) -> dict[str, Any] | None:
        """The decision under this challenge, or None if another challenge has taken its place."""
        while True:
            try:
                recheck = min(self.deadline, time.monotonic() + _RECHECK)
                _wait(self._store, [_decision_key(self.attempt)], recheck, self._look)
            except TimeoutError:
                if json.loads(self._store.get(_CHALLENGE))["attempt"] != self.attempt:
                    return None
                if self.watch.has_moved():
                    self.deadline = time.monotonic() + self._patience
                if time.monotonic() >= self.deadline:
                    raise
            else:
                return json.loads(self._store.get(_decision_key(self.attempt)))


def _never_arrived(missing: Sequence[int], own: RankFacts) -> AgreementError:
    names = ", ".join(f"rank {r} (node {r // own.local_world_size})" for r in missing[:8])
    more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
    return AgreementError(
        f"{names}{more} never arrived: rank 0 ({own.host}) waited in vain; look at that rank's log, or raise "
        "agreement_timeout if the node is slow to start",
        missing,
    )


def _wait(store: Store, keys: list[str], deadline: float, look: Callable[[], None] | None) -> None:
    """Wait for `keys`; c10d reports a timeout and a lost server alike, so the clock tells them apart."""
    if not keys:
        return
    try:
        if look is None:
            store.wait(keys, timedelta(seconds=max(deadline - time.monotonic(), 0.001)))
            return
        # Inside the store's own wait Python handles no signal, and each of its timeouts is a warning on the terminal.
        while not store.check(keys):
            if time.monotonic() >= deadline:
                raise TimeoutError
            look()
            time.sleep(_LOOK_PAUSE)
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


def _sign_key(attempt: str) -> str:
    return f"launcher/{attempt}/sign"


def _decision_key(attempt: str) -> str:
    return f"launcher/{attempt}/decision"


def _seen_key(attempt: str) -> str:
    return f"launcher/{attempt}/seen"
