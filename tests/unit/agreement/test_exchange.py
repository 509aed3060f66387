"""`launcher.agreement.handshake` over a real TCPStore: one decision, or one error with the right ranks."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

import launcher.agreement.handshake
import launcher.process.activity
from launcher.agreement.facts import RankFacts, agree_on
from launcher.agreement.handshake import Decision, Participant, exchange
from launcher.core.errors import AgreementError, LauncherError, PlanError
from launcher.process.activity import doing
from tests.support.rank_threads import LocalRendezvous, Server, Spy, all_set, facts, run_ranks


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.end()


@pytest.fixture
def rendezvous(server: Server) -> LocalRendezvous:
    return LocalRendezvous(server)


def decide(everybody: Sequence[RankFacts]) -> Mapping[str, Any]:
    agree_on(everybody)
    return {"hosts": [f.host for f in everybody]}


def rank(
    store: Any,
    own: RankFacts,
    world: int,
    *,
    config: Mapping[str, Any] | None = None,
    deciding: Callable[[Sequence[RankFacts]], Mapping[str, Any]] = decide,
    timeout: float = 10,
) -> Callable[[], Decision]:
    return lambda: exchange(Participant(store, world, own, timeout, config or {}), deciding)


def texts(errors: Sequence[Any]) -> set[str]:
    assert all(isinstance(error, AgreementError) for error in errors), errors
    return {str(error) for error in errors}


def test_one_rank_decides_alone(rendezvous: LocalRendezvous) -> None:
    decision = exchange(Participant(rendezvous.client(), 1, facts(0), 1), decide)
    assert decision.values == {"hosts": ["node0"]}


def test_all_ranks_get_rank_zeros_decision_and_one_attempt(rendezvous: LocalRendezvous) -> None:
    results = run_ranks([rank(rendezvous.client(), facts(n), 4) for n in range(4)])
    assert results[0].values == {"hosts": ["node0", "node1", "node2", "node3"]}
    assert all(result == results[0] for result in results)
    assert len(results[0].attempt) >= 16


def test_another_config_names_rank_host_and_setting_on_every_rank(rendezvous: LocalRendezvous) -> None:
    config = {"seed": 1, "precision": "auto"}
    bodies = [rank(rendezvous.client(), facts(n, config_digest="a"), 3, config=config) for n in range(2)]
    bodies.append(rank(rendezvous.client(), facts(2, config_digest="b"), 3, config={**config, "seed": 7}))
    results = run_ranks(bodies)
    (text,) = texts(results)
    assert "seed: 1 on rank 0 (node0), 7 on rank 2 (node2)" in text
    assert "precision" not in text
    assert {error.ranks for error in results} == {(2,)}


def test_settings_that_become_text_are_no_difference(rendezvous: LocalRendezvous) -> None:
    config = {"betas": (0.9, 0.95), "path": Path("/x"), "seed": 1}
    one = rank(rendezvous.client(), facts(0, config_digest="a"), 2, config=config)
    other = rank(rendezvous.client(), facts(1, config_digest="b"), 2, config={**config, "seed": 2})
    (text,) = texts(run_ranks([one, other]))
    assert "seed: 1 on rank 0 (node0), 2 on rank 1 (node1)" in text
    assert "betas" not in text
    assert "path" not in text


def test_equal_configs_are_not_sent(rendezvous: LocalRendezvous) -> None:
    seen: list[RankFacts] = []

    def look(everybody: Sequence[RankFacts]) -> Mapping[str, Any]:
        seen.extend(everybody)
        return {}

    run_ranks([rank(rendezvous.client(), facts(n), 2, config={"seed": 1}, deciding=look) for n in range(2)])
    assert [fact.config for fact in seen] == [None, None]


@pytest.mark.parametrize("other", ["same", "another"])
def test_digests_of_files_are_sent_only_by_ranks_that_differ(rendezvous: LocalRendezvous, other: str) -> None:
    sent: list[Mapping[str, str] | None] = []

    def look(everybody: Sequence[RankFacts]) -> Mapping[str, Any]:
        sent.append(everybody[1].sources)
        return {}

    files = [{"m.py": digest, "n.py": "same"} for digest in ("same", other)]
    run_ranks([rank(rendezvous.client(), facts(n, sources_digest=str(files[n]), sources=files[n]), 2, deciding=look)
               for n in range(2)])  # fmt: skip
    assert sent == [None if other == "same" else files[1]]


def test_another_torch_is_named_on_every_rank(rendezvous: LocalRendezvous) -> None:
    everybody = [facts(0), facts(1, versions={"torch": "2.10.0"}), facts(2)]
    (text,) = texts(run_ranks([rank(rendezvous.client(), own, 3) for own in everybody]))
    assert "torch version" in text
    assert "2.10.0 on rank 1 (node1)" in text


def test_one_ranks_error_is_reported_on_every_rank(rendezvous: LocalRendezvous) -> None:
    everybody = [facts(0), facts(1), facts(2, hardware=None, error="cannot import my_pkg")]
    results = run_ranks([rank(rendezvous.client(), own, 3) for own in everybody])
    assert texts(results) == {"rank 2 (node2): cannot import my_pkg"}
    assert {error.ranks for error in results} == {(2,)}


def test_an_error_of_rank_zeros_decision_is_raised_on_every_rank(rendezvous: LocalRendezvous) -> None:
    def refuse(everybody: Sequence[RankFacts]) -> Mapping[str, Any]:
        raise PlanError("no plan meets the config")

    results = run_ranks([rank(rendezvous.client(), facts(n), 3, deciding=refuse) for n in range(3)])
    assert isinstance(results[0], PlanError)
    assert all(isinstance(error, LauncherError) and error.exit_code == 2 for error in results)
    assert {str(error) for error in results} == {"no plan meets the config"}


@pytest.mark.slow
def test_a_missing_rank_is_named_on_all_others(rendezvous: LocalRendezvous) -> None:
    arrived = {n: threading.Event() for n in (1, 3)}

    def waits(n: int) -> Callable[[str, Any], None]:
        return lambda name, key: arrived[n].set() if name == "wait" else None

    def lead() -> Decision:
        # Its time begins when the others have arrived, even on a slow machine.
        assert all_set(list(arrived.values()))
        return exchange(Participant(rendezvous.client(), 4, facts(0), 0.3), decide)

    results = run_ranks([lead, *(rank(Spy(rendezvous.client(), waits(n)), facts(n), 4) for n in arrived)])
    (text,) = texts(results)
    assert text.startswith("rank 2 (node 2) did not arrive: rank 0 (node0) timed out")
    assert {error.ranks for error in results} == {(2,)}


def test_many_missing_ranks_are_counted(rendezvous: LocalRendezvous) -> None:
    (error,) = run_ranks([rank(rendezvous.client(), facts(0, local_world_size=8), 33, timeout=0.2)])
    assert "rank 8 (node 1) and 24 more did not arrive" in str(error)
    assert error.ranks == tuple(range(1, 33))


def test_a_missing_rank_zero_is_named(rendezvous: LocalRendezvous) -> None:
    results = run_ranks([rank(rendezvous.client(), facts(n), 3, timeout=0.1) for n in (1, 2)])
    assert all(isinstance(error, AgreementError) for error in results)
    assert [str(error).startswith(f"rank 0 did not arrive: rank {n} (node{n})") for n, error in enumerate(results, 1)]
    assert {error.ranks for error in results} == {(0,)}


def test_a_lost_store_is_not_reported_as_a_missing_rank() -> None:
    server = Server()
    waiting = threading.Event()
    follower = Spy(server.client(0), lambda name, key: waiting.set() if name == "wait" else None)

    def end() -> None:
        assert waiting.wait(10)
        server.end()

    error, _ = run_ranks([rank(follower, facts(1), 2), end])
    assert isinstance(error, AgreementError)
    assert "cannot reach the store of the ranks" in str(error)


def answering(store: Any) -> tuple[Spy, threading.Event]:
    """A store, and the event that its rank has answered some challenge."""
    answered = threading.Event()
    return Spy(store, lambda name, key: answered.set() if name == "set" and "/facts/" in key else None), answered


def follow_then_lead(rendezvous: LocalRendezvous, world: int) -> list[Any]:
    """Followers that answer an old challenge before the leader starts; returns the leader's result first."""
    followers = [answering(rendezvous.client()) for _ in range(1, world)]

    def lead() -> Decision:
        assert all_set([answered for _, answered in followers])
        return exchange(Participant(rendezvous.client(), world, facts(0, host="new0"), 10), decide)

    return run_ranks([lead, *(rank(s, facts(n, host=f"new{n}"), world) for n, (s, _) in enumerate(followers, 1))])


def test_ranks_that_find_an_earlier_attempts_decision_wait_for_their_own(rendezvous: LocalRendezvous) -> None:
    old = run_ranks([rank(rendezvous.client(), facts(n), 3) for n in range(3)])
    new = follow_then_lead(rendezvous, 3)
    assert new[0].values == {"hosts": ["new0", "new1", "new2"]}
    assert all(result == new[0] for result in new)
    assert new[0].attempt != old[0].attempt


def test_ranks_that_find_an_earlier_attempts_error_wait_for_their_own_decision(rendezvous: LocalRendezvous) -> None:
    run_ranks([rank(rendezvous.client(), own, 3) for own in (facts(0), facts(1, error="no GPU"), facts(2))])
    new = follow_then_lead(rendezvous, 3)
    assert all(result == new[0] and result.values["hosts"][0] == "new0" for result in new)


def test_ranks_that_find_an_attempt_without_a_decision_wait_for_a_newer_one(
    rendezvous: LocalRendezvous, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher.agreement.handshake, "_RECHECK", 0.05)

    def die(name: str, key: Any) -> None:
        if name == "wait":
            raise RuntimeError("killed")

    run_ranks([rank(Spy(rendezvous.client(), die), facts(0), 3)])
    new = follow_then_lead(rendezvous, 3)
    assert all(result == new[0] and result.values["hosts"] == ["new0", "new1", "new2"] for result in new)


def test_a_missing_rank_zero_of_a_new_attempt_is_named(
    rendezvous: LocalRendezvous, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher.agreement.handshake, "_GRACE", 0.1)
    run_ranks([rank(rendezvous.client(), facts(n), 2) for n in range(2)])
    (error,) = run_ranks([rank(rendezvous.client(), facts(1), 2, timeout=0.3)])
    assert isinstance(error, AgreementError)
    assert str(error).startswith("rank 0 did not arrive")


def test_a_late_rank_receives_the_error_of_the_attempt_without_it(
    rendezvous: LocalRendezvous, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher.agreement.handshake, "_GRACE", 0.1)
    (first,) = run_ranks([rank(rendezvous.client(), facts(0), 2, timeout=0.1)])
    (error,) = run_ranks([rank(rendezvous.client(), facts(1), 2, timeout=0.3)])
    assert str(error).startswith("rank 0 did not arrive: rank 1 (node1) timed out after 0.3 s (agreement_timeout); ")
    assert str(error).endswith(f"; an earlier attempt ended with: {first}")
    assert "rank 1 (node 1) did not arrive: rank 0 (node0) timed out" in str(first)


@pytest.mark.slow
def test_a_follower_of_a_late_rank_zero_learns_which_rank_is_missing(
    rendezvous: LocalRendezvous, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The follower's time restarts with rank zero's challenge: only rank zero knows which ranks are missing."""
    monkeypatch.setattr(launcher.agreement.handshake, "_GRACE", 0.2)
    run_ranks([rank(rendezvous.client(), facts(n), 3) for n in range(3)])
    looks: list[str] = []
    late = threading.Event()

    def look(name: str, key: Any) -> None:
        if (name, key) == ("get", "launcher/challenge"):
            looks.append(name)
            # It checks the earlier attempt's decision every 0.05 s: more than the grace period has passed.
            if len(looks) == 8:
                late.set()

    def lead() -> Decision:
        assert late.wait(10)
        return exchange(Participant(rendezvous.client(), 3, facts(0), 0.3), decide)

    results = run_ranks([lead, rank(Spy(rendezvous.client(), look), facts(1), 3, timeout=1)])
    (text,) = texts(results)
    assert text.startswith("rank 2 (node 2) did not arrive: ")
    assert {error.ranks for error in results} == {(2,)}


def test_store_operations_of_a_rank_do_not_grow_with_the_ranks(server: Server) -> None:
    counts: dict[int, list[int]] = {}
    for world in (2, 4, 12):
        ranks = LocalRendezvous(server)
        spies = [Spy(ranks.client()) for _ in range(world)]
        run_ranks([rank(spy, facts(n), world) for n, spy in enumerate(spies)])
        counts[world] = [len(spy.operations) for spy in spies]
    assert {count for world in counts.values() for count in world[1:]} == {5}
    assert len({world[0] for world in counts.values()}) == 1


@pytest.mark.slow
def test_the_others_wait_for_a_living_rank_zero_and_report_its_activity(
    rendezvous: LocalRendezvous, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher.agreement.handshake, "_GRACE", 0.1)
    monkeypatch.setattr(launcher.agreement.handshake, "_RECHECK", 0.05)
    # Without reports the others would time out before that, after 0.4 s.
    monkeypatch.setattr(launcher.process.activity, "_NOTICE_AFTER", 0.6)
    notices: dict[int, list[str]] = {0: [], 1: [], 2: []}
    all_notified = threading.Event()

    def record(n: int) -> Callable[[str], None]:
        def keep(text: str) -> None:
            notices[n].append(text)
            if all(notices.values()):
                all_notified.set()

        return keep

    def plan(everybody: Sequence[RankFacts]) -> Mapping[str, Any]:
        with doing("planning"), doing("counting sheep"):
            assert all_notified.wait(10)
        return {"a": 1}

    bodies = [
        lambda n=n: exchange(Participant(rendezvous.client(), 3, facts(n), 0.3 if n else 10, notify=record(n)), plan)
        for n in range(3)
    ]
    # Rank zero's limit is for the arrival of the others; it reports as often as their limit requires.
    monkeypatch.setattr(launcher.process.activity, "_INTERVAL", 0.05)
    assert [result.values for result in run_ranks(bodies)] == [{"a": 1}] * 3
    assert notices == {
        0: ["planning takes a while: rank 0 is counting sheep"],
        1: ["waiting for rank 0, which is counting sheep"],
        2: ["waiting for rank 0, which is counting sheep"],
    }


@pytest.mark.slow
def test_the_death_of_rank_zero_while_it_plans_is_detected(
    rendezvous: LocalRendezvous, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher.agreement.handshake, "_GRACE", 0.1)
    monkeypatch.setattr(launcher.agreement.handshake, "_RECHECK", 0.05)
    monkeypatch.setattr(launcher.process.activity, "_INTERVAL", 0.05)
    seen = threading.Event()
    spy = Spy(rendezvous.client(), lambda name, key: seen.set() if name == "get" and key.endswith("/sign") else None)

    def die(everybody: Sequence[RankFacts]) -> Mapping[str, Any]:
        with doing("counting sheep"):
            assert seen.wait(10)
            raise MemoryError

    killed, error = run_ranks(
        [rank(rendezvous.client(), facts(0), 2, deciding=die), rank(spy, facts(1), 2, timeout=0.4)]
    )
    assert isinstance(killed, MemoryError)
    assert isinstance(error, AgreementError)
    assert str(error).startswith("rank 0 died or hangs while counting sheep: rank 1 (node1) received no report")
    assert error.ranks == (0,)


def test_no_thread_reports_after_the_agreement(rendezvous: LocalRendezvous) -> None:
    run_ranks([rank(rendezvous.client(), facts(n), 2) for n in range(2)])
    assert "launcher-activity" not in {thread.name for thread in threading.enumerate()}


class Arriving:
    """A store that sets an event when a rank's facts are in it."""

    def __init__(self, store: Any, arrived: threading.Event) -> None:
        self._store, self._arrived = store, arrived

    def set(self, key: str, value: Any) -> None:
        self._store.set(key, value)
        if "/facts/" in key:
            self._arrived.set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def test_a_rank_that_cannot_arrive_ends_the_wait_of_all_others(rendezvous: LocalRendezvous) -> None:
    arrived = threading.Event()

    def look() -> None:
        if arrived.is_set():
            raise AgreementError("rank 2 has ended; look at its output", [2])

    stores = [rendezvous.client(), Arriving(rendezvous.client(), arrived)]
    looks = [look, None]
    members = [Participant(cast(Any, stores[n]), 3, facts(n), 300, check_peers=looks[n]) for n in range(2)]
    bodies = [lambda member=member: exchange(member, decide) for member in members]
    results = run_ranks(bodies)
    assert texts(results) == {"rank 2 has ended; look at its output"}
    assert {error.ranks for error in results} == {(2,)}


def test_check_peers_reports_that_rank_zero_cannot_arrive(rendezvous: LocalRendezvous) -> None:
    def look() -> None:
        raise AgreementError("rank 0 has ended; look at its output", [0])

    (result,) = run_ranks(
        [lambda: exchange(Participant(rendezvous.client(), 3, facts(1), 300, check_peers=look), decide)]
    )
    assert texts([result]) == {"rank 0 has ended; look at its output"}


def test_ctrl_c_ends_the_wait_with_check_peers(rendezvous: LocalRendezvous) -> None:
    def look() -> None:
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        exchange(Participant(rendezvous.client(), 2, facts(0), 300, check_peers=look), decide)
