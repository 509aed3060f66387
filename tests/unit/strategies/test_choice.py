"""`strategies.choice`: the chosen strategy and its reasons."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.choice import StrategyChoice, StrategyError, choose_strategy
from strategies.registry import find_requested, list_strategy_names, list_zero_variants

DDP_FIND_UNUSED = "ddp_find_unused_parameters_true"
NAMES, VARIANTS = list_strategy_names(), list_zero_variants()


def choose(
    requested: str = "auto", world: int = 2, kind: str = "cpu", accumulate: int = 1, static: bool = True
) -> StrategyChoice:
    return choose_strategy(
        requested, world_size=world, device_kind=kind, accumulate=accumulate, model_has_static_graph=static
    )


@pytest.mark.parametrize("kind", ["cpu", "cuda", "mps"])
def test_one_rank_uses_single_device_without_process_group(kind: str) -> None:
    choice = choose(world=1, kind=kind)
    assert (choice.name, choice.backend) == ("single_device", None)
    assert [r.name for r in choice.rejected] == ["ddp"]


@pytest.mark.parametrize(("kind", "backend"), [("cpu", "gloo"), ("cuda", "nccl")])
def test_several_ranks_use_ddp_with_the_backend_of_the_device(kind: str, backend: str) -> None:
    choice = choose(kind=kind)
    assert (choice.name, choice.backend, choice.gradient_as_bucket_view) == ("ddp", backend, True)
    assert [r.name for r in choice.rejected] == ["single_device"]


def test_requested_ddp_is_used_with_one_rank() -> None:
    choice = choose("ddp", world=1)
    assert (choice.name, choice.backend, choice.rejected) == ("ddp", "gloo", ())
    assert "requested" in choice.reasons[0]


def test_static_graph_is_on_if_the_model_declares_it() -> None:
    choice = choose()
    assert choice.static_graph
    assert any(reason.startswith("static_graph on") for reason in choice.reasons)


@pytest.mark.parametrize(
    ("choice", "why"),
    [
        (choose(static=False), "does not declare"),
        (choose(accumulate=2), "1 of 2 backward passes skip the all-reduce"),
        (choose(accumulate=4), "3 of 4 backward passes skip the all-reduce"),
        (choose(DDP_FIND_UNUSED), "unused parameters may change"),
    ],
)
def test_static_graph_is_off_with_a_reason_if_not_safe(choice: StrategyChoice, why: str) -> None:
    assert not choice.static_graph
    assert [reason for reason in choice.reasons if reason.startswith("static_graph off") and why in reason]


def test_unused_parameters_are_searched_only_on_request() -> None:
    assert choose(DDP_FIND_UNUSED).find_unused_parameters
    assert not choose("ddp").find_unused_parameters


def test_unknown_name_error_lists_valid_names() -> None:
    with pytest.raises(StrategyError, match="'dpd'") as caught:
        choose("dpd")
    assert all(name in str(caught.value) for name in NAMES)


def test_single_device_rejects_several_ranks() -> None:
    with pytest.raises(StrategyError, match="there are 3 ranks"):
        choose("single_device", world=3)


@pytest.mark.parametrize("requested", ["auto", "ddp"])
def test_mps_rejects_several_ranks(requested: str) -> None:
    with pytest.raises(StrategyError, match="no process group backend"):
        choose(requested, kind="mps")


@pytest.mark.parametrize("requested", ["ddp", DDP_FIND_UNUSED])
def test_mps_rejects_a_process_group_with_one_rank(requested: str) -> None:
    with pytest.raises(StrategyError, match="no process group backend"):
        choose(requested, world=1, kind="mps")


@settings(deadline=None)
@given(
    st.sampled_from(NAMES),
    st.integers(1, 64),
    st.sampled_from(["cpu", "cuda"]),
    st.integers(1, 8),
    st.booleans(),
)
def test_several_ranks_exchange_gradients_and_each_choice_has_a_reason(
    requested: str, world: int, kind: str, accumulate: int, static: bool
) -> None:
    if requested == "single_device" and world > 1:
        return
    entry = find_requested(requested)
    if entry is not None and entry.is_sharded and entry.offload is None and world == 1:
        return
    choice = choose(requested, world, kind, accumulate, static)
    assert (choice.backend is not None) == (choice.name != "single_device")
    assert choice.name != "single_device" or world == 1
    assert choice.reasons
    assert choice.name not in [r.name for r in choice.rejected]
    assert not (choice.static_graph and (choice.find_unused_parameters or accumulate > 1 or not static))
