"""The exchange over the c10d store by which the ranks agree.

The exchange also gives the attempt a unique name, because entries of a failed attempt stay in torchelastic's store.
Rank zero publishes a random token (the challenge), every rank answers under it, and the decision lists the tokens of
the answers. A rank that read an old challenge does not find its own token in the old decision, and waits for the new
one. Each rank needs five store operations, for any number of ranks.

Rank zero then plans, which may take long. It reports its activity, and the others wait as long as it reports.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from launcher.agreement.facts import RankFacts
from launcher.core.errors import AgreementError, LauncherError
from launcher.process.activity import ActivityReporter, ActivityWatch, doing

if TYPE_CHECKING:
    from torch.distributed import Store

_CHALLENGE = "launcher/challenge"
# Seconds that a rank waits for a decision under one challenge before it checks for a newer challenge.
_RECHECK = 2.0
_STALE_PAUSE = 0.05
# Seconds between two checks of the store by a rank that has more than the store to check.
_CHECK_PAUSE = 0.1
# Seconds that one side of the exchange gives the other beyond its own limit.
_GRACE = 5.0

# Rank zero's decision, made from the facts of all ranks: plain JSON values.
Decide = Callable[[Sequence[RankFacts]], Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Decision:
    """Rank zero's decision for this attempt, whose unique token `attempt` prefixes the keys of the process group."""

    attempt: str
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Participant:
    """One rank in the exchange.

    Attributes:
        store: shared by all ranks, possibly with entries of an earlier attempt.
        timeout: seconds to wait for the other ranks; for rank zero's decision, seconds without a report from it.
        flat_config: dotted path to value; sent only if it differs from rank zero's.
        notify: called with a text about rank zero's activity, if that takes long.
        check_peers: called often while this rank waits, which costs a store operation each time; raises an
            `AgreementError` if another rank can no longer arrive. Without it nothing interrupts the wait, not even
            Ctrl-C.
    """

    store: Store
    world_size: int
    facts: RankFacts
    timeout: float
    flat_config: Mapping[str, Any] = field(default_factory=dict)
    notify: Callable[[str], None] = lambda text: None
    check_peers: Callable[[], None] | None = None

    def wait(self, keys: list[str], deadline: float) -> None:
        """Wait until the store has `keys`; the clock distinguishes a timeout from a lost server, c10d does not.

        Raises:
            TimeoutError: the deadline has passed.
            AgreementError: the store does not answer, or another rank can no longer arrive.
        """
        if not keys:
            return
        try:
            if self.check_peers is None:
                self.store.wait(keys, timedelta(seconds=max(deadline - time.monotonic(), 0.001)))
                return
            # In the store's own wait Python handles no signal, and each of its timeouts is a warning on the terminal.
            while not self.store.check(keys):
                if time.monotonic() >= deadline:
                    raise TimeoutError
                self.check_peers()
                time.sleep(_CHECK_PAUSE)
        except RuntimeError as error:
            if time.monotonic() >= deadline - 0.01:
                raise TimeoutError from error
            raise AgreementError(
                f"cannot reach the store of the ranks: {error}; look at the log of rank 0, which serves it"
            ) from error


def exchange(participant: Participant, decide: Decide) -> Decision:
    """Send this rank's facts to rank zero and receive its decision.

    Rank zero calls `decide` with the facts of all ranks; a `LauncherError` from it is raised on every rank.

    Raises:
        AgreementError: a rank did not arrive or died, or `decide` found that the ranks differ.
        LauncherError: raised by `decide`.
    """
    deadline = time.monotonic() + participant.timeout
    if participant.facts.rank == 0:
        return _lead(participant, decide, deadline)
    return _follow(participant, deadline)


def _lead(zero: Participant, decide: Decide, deadline: float) -> Decision:
    store, own = zero.store, zero.facts
    attempt = secrets.token_hex(8)
    store.set(
        _CHALLENGE,
        json.dumps({"attempt": attempt, "config_digest": own.config_digest, "sources_digest": own.sources_digest}),
    )
    shared = store if zero.world_size > 1 else None
    with ActivityReporter(shared, _key(attempt, "sign"), zero.notify, zero.timeout):
        decision, failure = _decide(zero, decide, attempt, deadline)
    store.set(_key(attempt, "decision"), json.dumps(decision, default=str))
    if failure is not None:
        # Rank zero may serve the store: the others must have read its answer before it ends.
        give_up, answered = time.monotonic() + _GRACE, sum(map(bool, decision["tokens"][1:]))
        while store.add(_key(attempt, "seen"), 0) < answered and time.monotonic() < give_up:
            time.sleep(0.01)
        raise failure
    return Decision(attempt, decision["values"])


def _decide(
    zero: Participant, decide: Decide, attempt: str, deadline: float
) -> tuple[dict[str, Any], LauncherError | None]:
    """Rank zero's decision once all ranks have answered, and the error if it is one."""
    store, own, others = zero.store, zero.facts, range(1, zero.world_size)
    keys = [_key(attempt, f"facts/{rank}") for rank in others]
    decision: dict[str, Any] = {"tokens": [], "values": None, "error": None}
    failure: LauncherError | None = None
    try:
        with doing("waiting for the facts of all ranks"):
            zero.wait(keys, deadline)
    except (TimeoutError, AgreementError) as problem:
        missing = [rank for rank in others if not store.check([_key(attempt, f"facts/{rank}")])]
        # The ranks that did arrive wait for an answer too.
        decision["tokens"] = [""] + [
            "" if rank in missing else RankFacts.from_json(store.get(_key(attempt, f"facts/{rank}"))).token
            for rank in others
        ]
        failure = _missing_ranks_error(missing, own) if isinstance(problem, TimeoutError) else problem
    else:
        everybody = [own] + [RankFacts.from_json(text) for text in (store.multi_get(keys) if keys else [])]
        if any(f.config_digest != own.config_digest for f in everybody):
            everybody[0] = dataclasses.replace(own, config=json.loads(json.dumps(zero.flat_config, default=str)))
        decision["tokens"] = [f.token for f in everybody]
        try:
            decision["values"] = dict(decide(everybody))
        except LauncherError as error:
            failure = error
    if failure is not None:
        decision["error"] = {"message": str(failure), "ranks": list(getattr(failure, "ranks", ()))}
    return decision, failure


def _follow(follower: Participant, deadline: float) -> Decision:
    store, facts = follower.store, follower.facts
    leader: _Leader | None = None
    earlier = ""
    try:
        follower.wait([_CHALLENGE], deadline)
        while True:
            challenge = json.loads(store.get(_CHALLENGE))
            attempt = challenge["attempt"]
            if leader is None or attempt != leader.attempt:
                store.set(_key(attempt, f"facts/{facts.rank}"), _answer(follower, challenge).to_json())
                leader = _Leader(follower, attempt)
            decision = leader.await_decision()
            if decision is not None and decision["tokens"][facts.rank : facts.rank + 1] == [facts.token]:
                break
            # The challenge of an earlier attempt: rank zero of this attempt has not arrived yet.
            if decision is not None and decision["error"] is not None:
                earlier = f"; an earlier attempt ended with: {decision['error']['message']}"
            if time.monotonic() > leader.deadline:
                raise TimeoutError
            time.sleep(_STALE_PAUSE)
    except TimeoutError:
        raise AgreementError(_no_leader_text(follower, leader) + earlier, [0]) from None
    if decision["error"] is not None:
        store.add(_key(attempt, "seen"), 1)
        raise AgreementError(decision["error"]["message"], decision["error"]["ranks"])
    return Decision(attempt, decision["values"])


def _answer(follower: Participant, challenge: Mapping[str, Any]) -> RankFacts:
    """The facts to send, with config and sources only if they differ from rank zero's."""
    answer = follower.facts
    if challenge["config_digest"] != answer.config_digest:
        answer = dataclasses.replace(answer, config=follower.flat_config)
    if challenge["sources_digest"] == answer.sources_digest:
        answer = dataclasses.replace(answer, sources=None)
    return answer


class _Leader:
    """Rank zero of one challenge, as another rank sees it; the rank waits while rank zero reports."""

    def __init__(self, follower: Participant, attempt: str) -> None:
        self.attempt = attempt
        self.watch = ActivityWatch(follower.store, _key(attempt, "sign"), follower.notify)
        # Rank zero may have started to wait for the others only now.
        self._patience = follower.timeout + _GRACE
        self.deadline = time.monotonic() + self._patience
        self._follower = follower

    def await_decision(self) -> dict[str, Any] | None:
        """The decision under this challenge; None if a newer challenge has replaced it. Raises TimeoutError."""
        store = self._follower.store
        while True:
            try:
                recheck = min(self.deadline, time.monotonic() + _RECHECK)
                self._follower.wait([_key(self.attempt, "decision")], recheck)
            except TimeoutError:
                if json.loads(store.get(_CHALLENGE))["attempt"] != self.attempt:
                    return None
                if self.watch.has_update():
                    self.deadline = time.monotonic() + self._patience
                if time.monotonic() >= self.deadline:
                    raise
            else:
                return json.loads(store.get(_key(self.attempt, "decision")))


def _no_leader_text(follower: Participant, leader: _Leader | None) -> str:
    name = f"rank {follower.facts.rank} ({follower.facts.host})"
    if leader is not None and leader.watch.activity:
        return (
            f"rank 0 died or hangs while {leader.watch.activity}: {name} received no report from it for "
            f"{follower.timeout:g} s (agreement_timeout); look at rank 0's log"
        )
    timeout = f"timed out after {follower.timeout:g} s (agreement_timeout)"
    return f"rank 0 did not arrive: {name} {timeout}; look at rank 0's log"


def _missing_ranks_error(missing: Sequence[int], own: RankFacts) -> AgreementError:
    names = ", ".join(f"rank {r} (node {r // own.local_world_size})" for r in missing[:8])
    more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
    return AgreementError(
        f"{names}{more} did not arrive: rank 0 ({own.host}) timed out; look at that rank's log, or raise "
        "agreement_timeout if the node is slow to start",
        missing,
    )


def _key(attempt: str, name: str) -> str:
    return f"launcher/{attempt}/{name}"
