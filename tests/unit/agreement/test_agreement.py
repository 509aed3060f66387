"""`launcher.agreement.facts`: what must be equal on all ranks, and which ranks differ."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.agreement.facts import Agreement, RankFacts, agree_on
from launcher.core.errors import AgreementError
from launcher.hardware.topology import Topology
from tests.support.rank_threads import CPU, H100, V100, facts


def refusal(*everybody: RankFacts) -> AgreementError:
    with pytest.raises(AgreementError) as caught:
        agree_on(everybody)
    return caught.value


def test_equal_ranks_agree_in_the_order_of_the_ranks() -> None:
    agreement = agree_on([facts(2), facts(0), facts(1)])
    assert [f.rank for f in agreement.facts] == [0, 1, 2]
    assert (agreement.world_size, agreement.hosts) == (3, ("node0", "node1", "node2"))
    assert not agreement.assumed


def test_a_host_of_several_ranks_is_named_once() -> None:
    assert Agreement((facts(0, host="a"), facts(1, host="a"), facts(2, host="b"))).hosts == ("a", "b")


def test_capabilities_are_those_of_each_ranks_device() -> None:
    first, second = agree_on([facts(0, H100), facts(1, V100)]).capabilities()
    assert (first.rank, first.host, first.device_name) == (0, "node0", "NVIDIA H100")
    assert ("bf16" in first.native_dtypes, "bf16" in second.native_dtypes) == (True, False)


@pytest.mark.parametrize("library", ["torch", "lightning", "deepspeed"])
def test_another_version_names_library_rank_host_and_both_versions(library: str) -> None:
    error = refusal(facts(0), facts(1), facts(2, versions={library: "0.1"}))
    assert error.ranks == (2,)
    assert f"{library} version: " in str(error)
    assert "0.1 on rank 2 (node2)" in str(error)
    assert "on rank 0 (node0), rank 1 (node1)" in str(error)


def test_a_library_that_one_node_lacks_is_a_difference() -> None:
    assert "None on rank 1 (node1)" in str(refusal(facts(0), facts(1, versions={"deepspeed": None})))


def test_another_patch_release_of_python_is_no_difference() -> None:
    assert agree_on([facts(0), facts(1, versions={"python": "3.11.9"})]).world_size == 2


def test_other_code_on_one_rank_is_a_difference() -> None:
    error = refusal(facts(0, traits={"batch_size": 4}), facts(1, traits={"batch_size": 8}))
    assert 'code: {"batch_size": 4} on rank 0 (node0); {"batch_size": 8} on rank 1 (node1)' in str(error)


def test_the_order_of_traits_is_no_difference() -> None:
    assert agree_on([facts(0, traits={"a": 1, "b": 2}), facts(1, traits={"b": 2, "a": 1})]).world_size == 2


def test_traits_unknown_to_json_are_compared_as_text() -> None:
    assert agree_on([facts(0, traits={"root": Path("/x")}), facts(1, traits={"root": "/x"})]).world_size == 2
    assert refusal(facts(0, traits={"root": Path("/x")}), facts(1, traits={"root": Path("/y")})).ranks == (1,)


def test_another_config_names_the_setting_and_both_values() -> None:
    one = facts(0, config_digest="a" * 64, config={"seed": 1, "name": "x"})
    other = facts(1, config_digest="b" * 64, config={"seed": 2, "name": "x", "extra": True})
    error = refusal(one, other, facts(2, config_digest="a" * 64))
    assert error.ranks == (1,)
    assert "seed: 1 on rank 0 (node0), 2 on rank 1 (node1)" in str(error)
    assert "extra: None on rank 0 (node0), True on rank 1 (node1)" in str(error)
    assert "name" not in str(error)


def test_the_smaller_group_is_the_blocking_one() -> None:
    error = refusal(facts(0, versions={"torch": "2.12"}), *(facts(rank) for rank in range(1, 5)))
    assert error.ranks == (0,)


def test_an_even_split_blames_the_side_without_rank_zero() -> None:
    assert refusal(facts(0), facts(1, versions={"torch": "2.12"})).ranks == (1,)


def test_many_differing_ranks_are_counted() -> None:
    everybody = [facts(rank, versions={"torch": "2.12" if rank > 20 else "2.13"}) for rank in range(40)]
    text = str(refusal(*everybody))
    assert "and 13 more" in text
    assert "rank 28 (node28) and 11 more" in text


def test_failed_ranks_are_listed_by_error_and_name() -> None:
    error = refusal(facts(0), facts(1, hardware=None, error="no GPU"), facts(2, error="no GPU"), facts(3, error="typo"))
    assert str(error) == "rank 1 (node1), rank 2 (node2): no GPU\nrank 3 (node3): typo"
    assert error.ranks == (1, 2, 3)


def test_an_error_of_all_ranks_is_reported_once_without_names() -> None:
    error = refusal(*(facts(rank, error="model: no such class") for rank in range(4)))
    assert str(error) == "model: no such class"
    assert error.ranks == (0, 1, 2, 3)


def test_a_failure_takes_precedence_over_a_difference() -> None:
    assert "torch" not in str(refusal(facts(0), facts(1, versions={"torch": "x"}, error="no GPU")))


def test_facts_contain_the_topology() -> None:
    fact = RankFacts.of(Topology(5, 8, 1, 4, 1, "n1", "torchrun"), error="x")
    assert (fact.rank, fact.local_rank, fact.local_world_size, fact.node_rank, fact.host) == (5, 1, 4, 1, "n1")
    assert (fact.error, fact.hardware) == ("x", None)


def test_two_processes_of_one_rank_have_two_tokens() -> None:
    assert facts(0).token != facts(0).token


@settings(deadline=None)
@given(
    st.sampled_from([CPU, H100, V100]),
    st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5) | st.none(), max_size=3),
    st.none() | st.text(max_size=20),
)
def test_facts_are_read_back_from_text(device: object, config: dict[str, object], error: str | None) -> None:
    fact = facts(3, device, config=config, error=error, traits={"static_graph": True})  # type: ignore[arg-type]
    assert RankFacts.from_json(fact.to_json()) == fact
    assert RankFacts.from_json(fact.to_json().encode()) == fact
    without = dataclasses.replace(fact, hardware=None)
    assert RankFacts.from_json(without.to_json()) == without
