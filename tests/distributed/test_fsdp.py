"""FSDP2 on real ranks: modules as users write them train as under DDP, or an error says what to change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.fsdp_models import MODELS, REFUSED
from tests.support.program_ranks import run_program

pytestmark = pytest.mark.slow
_ACCUMULATE = {"accumulate_grad_batches": 3}
_LAST = {"reduce_every_batch": False}
_RECOMPUTE = {"checkpoint_activations": True}


def case(model: str, strategy: str = "fsdp2", **options: Any) -> dict[str, Any]:
    empty = {"trainer": {}, "precision": "32-true", "options": {}}
    return {"model": model, "strategy": strategy, **empty, **options}


_ELSEWHERE = ("Overflowing", "Dropped", "OldWeightNorm")

# By name: a case, which trains as the same one under DDP.
EQUAL = {
    **{name: case(name) for name in MODELS if name not in (*REFUSED, *_ELSEWHERE)},
    "clip by norm": case("Base", trainer={"gradient_clip_val": 0.1}),
    "clip by norm with a scalar": case("Scalars", trainer={"gradient_clip_val": 0.1}),
    "clip by value": case("Base", trainer={"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "accumulate": case("Base", trainer=_ACCUMULATE),
    "accumulate, sum once": case("BatchNorms", trainer=_ACCUMULATE, options=_LAST),
    "accumulate unused parameters": case("Parts", trainer=_ACCUMULATE),
    "accumulate unused parameters, sum once": case("Parts", trainer=_ACCUMULATE, options=_LAST),
    "grad_op": case("CalledDirectly", "fsdp2_grad_op", trainer=_ACCUMULATE),
    "grad_op with two optimizers": case("Gan", "fsdp2_grad_op"),
    "grad_op with a copy": case("MomentumAfter", "fsdp2_grad_op"),
    "offload": case("CalledDirectly", "fsdp2_offload", trainer={"gradient_clip_val": 0.1}),
    "offload with two optimizers": case("Gan", "fsdp2_offload"),
    "offload with a scalar": case("Scalars", "fsdp2_offload"),
    "hsdp": case("CalledDirectly", "hsdp", trainer={"gradient_clip_val": 0.1}),
    "hsdp that shards on one rank": case("Scalars", "hsdp", options={"shard_ranks": 1}),
    "recompute a block twice": case("CalledTwice", options=_RECOMPUTE),
    "recompute nested blocks": case("CalledTwice", options={"wrap": ["Linear", "Block"], **_RECOMPUTE}),
    "nested blocks": case("Base", options={"wrap": ["Linear", "Block"]}),
    "64-true": case("Scalars", precision="64-true"),
    "bf16-true": case("Base", precision="bf16-true"),
    "compile": case("Base", options={"compile": True, **_RECOMPUTE}),
}
# A model that shards itself, under a strategy or with a setting that says otherwise.
CONTRADICTED = {
    "own shards without offload": (case("ShardedByUser", "fsdp2_offload"), ("without offload", "`strategy: fsdp2`")),
    "own shards without replicas": (
        case("ShardedByUser", "hsdp", options={"shard_ranks": 1}),
        ("over all ranks, but hsdp has 2 replicas", "init_device_mesh(device, (2, 1)"),
    ),
    "own shards and fsdp.wrap": (case("ShardedByUser", options={"wrap": ["Block"]}), ("fsdp.wrap is given",)),
}
# Mixed precision: FSDP2 gathers weights in the computation's type, DDP converts them for each operation.
CLOSE = {
    f"{precision} {model}": case(model, precision=precision)
    for precision, models in (("bf16-mixed", ("Base", "BatchNorms")), ("16-mixed", ("ByHand", "Overflowing")))
    for model in models
}
# With activation checkpointing all losses are those without it.
RECOMPUTED = {
    f"{strategy} {model} {precision}": case(model, strategy, precision=precision)
    for strategy, model, precision in (
        ("ddp", "BatchNorms", "32-true"),
        ("fsdp2", "Dropped", "32-true"),
        ("fsdp2", "BatchNorms", "bf16-mixed"),
        ("fsdp2_grad_op", "OldWeightNorm", "32-true"),
        ("hsdp", "CalledDirectly", "32-true"),
    )
}
FOUR = ("Tied", "FrozenInBlocks", "Gan", "Parts", "Scalars", "clip by norm", "accumulate, sum once")
FOUR_RANKS = {name: EQUAL[name] for name in FOUR} | {
    "hsdp in two nodes": case("BatchNorms", "hsdp", options={"shard_ranks": 2}, trainer={"gradient_clip_val": 0.1}),
    "hsdp, sum once": case("Parts", "hsdp", options={"shard_ranks": 2, **_LAST}, trainer=_ACCUMULATE),
}


def run_cases(folder: Path, cases: dict[str, dict[str, Any]], ranks: int = 2) -> list[dict[str, Any]]:
    (folder / "cases.json").write_text(json.dumps(cases))
    return run_program("tests.support.fsdp_ranks", folder, ranks=ranks, timeout=500)


def _with_ddp(cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The cases, and each different one of them under DDP."""
    return {_ddp_of(each): {**each, "strategy": _ddp_for(each), "options": {}} for each in cases.values()} | cases


def _ddp_for(each: dict[str, Any]) -> str:
    return "ddp_find_unused_parameters_true" if each["model"] == "PartsLater" else "ddp"


def _ddp_of(each: dict[str, Any]) -> str:
    return f"ddp: {each['model']} {each['precision']} {each['trainer']}"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Results of two ranks; one start for all tests."""
    recomputed = {f"again: {name}": {**each, "options": _RECOMPUTE} for name, each in RECOMPUTED.items()}
    refused = {name: case(name) for name in REFUSED} | {name: given for name, (given, _) in CONTRADICTED.items()}
    cases = {**_with_ddp(EQUAL | CLOSE), **RECOMPUTED, **recomputed, **refused}
    return run_cases(tmp_path_factory.mktemp("two"), cases)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_cases(tmp_path_factory.mktemp("four"), _with_ddp(FOUR_RANKS), 4)


def assert_like_ddp(ranks: list[dict[str, Any]], name: str, tolerance: float) -> None:
    for rank in ranks:
        ours, theirs = rank[name], rank[_ddp_of((EQUAL | FOUR_RANKS | CLOSE)[name])]
        assert "error" not in theirs, theirs["trace"]
        assert "error" not in ours, ours["trace"]
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=tolerance, abs=tolerance)
        assert len(ours["losses"]) >= 20
        assert (ours["steps"], ours["name"], ours["skipped"]) == (theirs["steps"], theirs["name"], theirs["skipped"])


@pytest.mark.parametrize("name", EQUAL)
def test_losses_are_those_of_ddp(two: list[dict[str, Any]], name: str) -> None:
    assert_like_ddp(two, name, 1e-5)


@pytest.mark.parametrize("name", FOUR_RANKS)
def test_losses_on_four_ranks_are_those_of_ddp(four: list[dict[str, Any]], name: str) -> None:
    assert_like_ddp(four, name, 1e-5)


@pytest.mark.parametrize("name", CLOSE)
def test_losses_in_mixed_precision_are_close_to_those_of_ddp(two: list[dict[str, Any]], name: str) -> None:
    assert_like_ddp(two, name, 0.02)


@pytest.mark.parametrize("name", RECOMPUTED)
def test_activation_checkpointing_changes_no_loss(two: list[dict[str, Any]], name: str) -> None:
    for rank in two:
        assert "error" not in rank[f"again: {name}"], rank[f"again: {name}"]["trace"]
        assert rank[f"again: {name}"]["losses"] == rank[name]["losses"]


@pytest.mark.parametrize("name", [*REFUSED, *CONTRADICTED])
def test_what_shards_cannot_train_is_an_error_of_one_line_with_advice(two: list[dict[str, Any]], name: str) -> None:
    for rank in two:
        assert rank[name]["error"].startswith(("StrategyError: ", "RuntimeError: "))
        assert "\n" not in rank[name]["error"]
        for part in REFUSED[name] if name in REFUSED else CONTRADICTED[name][1]:
            assert part in rank[name]["error"]


@pytest.mark.parametrize("strategy", ["fsdp2", "hsdp"])
def test_one_model_is_fitted_validated_tested_and_predicts(two: list[dict[str, Any]], strategy: str) -> None:
    for rank in two:
        assert rank["evaluated"][strategy] == pytest.approx(rank["evaluated"]["ddp"], rel=1e-5)


def test_an_overflow_on_one_rank_halves_the_scale_and_skips_the_step_on_all(two: list[dict[str, Any]]) -> None:
    name = "16-mixed Overflowing"
    scales = [[value for value in rank[name]["losses"] if value >= 1000] for rank in two]
    assert scales[0] == scales[1]
    assert set(scales[0]) == {65536.0, 32768.0}
    assert [rank[name]["skipped"] for rank in two] == [rank[_ddp_of(CLOSE[name])]["skipped"] for rank in two]
    assert two[0][name]["skipped"] >= 1


def test_weights_saved_by_hand_are_a_part_and_a_warning(two: list[dict[str, Any]]) -> None:
    for rank in two:
        assert "this rank has only a part" in rank["SavedByHand"]["warnings"][0]
        assert not rank[_ddp_of(EQUAL["SavedByHand"])]["warnings"]


def test_offload_steps_fused_and_a_checkpoint_does_not_say_so(two: list[dict[str, Any]]) -> None:
    assert two[0]["offload with two optimizers"]["fused"] == [[[True, None]], [[True, None]]]
    assert two[0]["offload with a scalar"]["fused"] == [[[None, None]]]
    assert two[0]["Gan"]["fused"] == [[[None, None]], [[None, None]]]
