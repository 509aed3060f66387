"""`strategies.choice`: the exact texts of reasons and errors."""

from __future__ import annotations

from typing import Any

import pytest

from strategies.choice import Rejected, StrategyChoice, StrategyError, choose_strategy
from strategies.registry import list_strategy_names

BUCKETS = "gradient_as_bucket_view: saves a copy of all gradients"
STATIC = "static_graph on: the model declares that every step uses the same parameters"
DEBUGGING = "DeepSpeed on CPUs is for debugging: it is slower than DDP and saves no memory that matters"


def choose(requested: str = "auto", world: int = 2, kind: str = "cpu", **options: Any) -> StrategyChoice:
    known = {"accumulate": 1, "model_has_static_graph": True, **options}
    return choose_strategy(requested, world_size=world, device_kind=kind, **known)


def ddp(asked: str, why_static: str, world: int = 2, kind: str = "cpu", backend: str = "gloo", **more: Any) -> Any:
    reasons = (f"DDP: {asked}", f"{backend} carries the gradients of {kind} devices", BUCKETS, why_static)
    rejected = (Rejected("single_device", f"there are {world} ranks"),) if world > 1 else ()
    return StrategyChoice("ddp", reasons, rejected, backend, gradient_as_bucket_view=True, **more)


@pytest.mark.parametrize("requested", ["auto", "single_device"])
def test_single_rank_choice_text(requested: str) -> None:
    assert choose(requested, world=1) == StrategyChoice(
        "single_device",
        ("one rank: no gradient exchange needed",),
        (Rejected("ddp", "with one rank it only adds the cost of its buckets"),),
    )


def test_ddp_choice_text() -> None:
    assert choose() == ddp("2 ranks, each with the whole model", STATIC, static_graph=True)
    assert choose(world=4, kind="cuda") == ddp(
        "4 ranks, each with the whole model", STATIC, 4, "cuda", "nccl", static_graph=True
    )


def test_requested_ddp_choice_text() -> None:
    assert choose("ddp", world=1) == ddp("requested", STATIC, world=1, static_graph=True)
    unused = "static_graph off: unused parameters may change from step to step"
    assert choose("ddp_find_unused_parameters_true") == ddp("requested", unused, find_unused_parameters=True)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"model_has_static_graph": False}, "the model does not declare `static_graph = True`"),
        ({"accumulate": 2}, "1 of 2 backward passes skip the all-reduce"),
        ({"accumulate": 4}, "3 of 4 backward passes skip the all-reduce"),
    ],
)
def test_static_graph_off_reason_text(options: dict[str, Any], why: str) -> None:
    assert choose(**options) == ddp("2 ranks, each with the whole model", f"static_graph off: {why}")


@pytest.mark.parametrize(
    ("name", "world", "kind", "shards"),
    [
        ("deepspeed_stage_1", 2, "cuda", ["ZeRO stage 1: each rank keeps 1/2 of the optimizer's states"]),
        ("deepspeed_stage_2", 3, "cuda",
         ["ZeRO stage 2: each rank keeps 1/3 of the optimizer's states, the gradients"]),
        ("deepspeed_stage_3", 2, "cpu",
         ["ZeRO stage 3: each rank keeps 1/2 of the optimizer's states, the gradients, the parameters"]),
        ("deepspeed_stage_2_offload", 1, "cuda",
         ["ZeRO stage 2: each rank keeps 1/1 of the optimizer's states, the gradients", "optimizer states are on cpu"]),
        ("deepspeed_stage_3_offload", 2, "cuda",
         ["ZeRO stage 3: each rank keeps 1/2 of the optimizer's states, the gradients, the parameters",
          "optimizer states are on cpu", "parameters are on cpu"]),
    ],
)  # fmt: skip
def test_zero_variant_choice_text(name: str, world: int, kind: str, shards: list[str]) -> None:
    backend = "nccl" if kind == "cuda" else "gloo"
    carries = f"{backend} carries gradients and parameters of {kind} devices"
    reasons = (f"{name}: requested", *shards, carries, *([DEBUGGING] if kind == "cpu" else []))
    rejected = (Rejected("single_device", f"there are {world} ranks"),) if world > 1 else ()
    assert choose(name, world, kind) == StrategyChoice(name, reasons, rejected, backend)


@pytest.mark.parametrize(
    ("requested", "world", "kind", "message"),
    [
        ("dpd", 2, "cpu", f"strategy 'dpd' does not exist; valid are {', '.join(list_strategy_names())}"),
        ("single_device", 2, "cpu",
         ("strategy single_device was requested, but there are 2 ranks; use `strategy: auto`, or one rank")),
        ("auto", 2, "mps", "Apple's GPU has no process group backend; use `devices: 1` or `accelerator: cpu`"),
        ("deepspeed_stage_2", 1, "cuda",
         ("strategy deepspeed_stage_2 shards the model's states over the ranks, but there is one rank; start several "
          "(`devices: 2`, or torchrun), or use `strategy: auto`")),
    ],
)  # fmt: skip
def test_strategy_error_text(requested: str, world: int, kind: str, message: str) -> None:
    with pytest.raises(StrategyError) as caught:
        choose(requested, world, kind)
    assert str(caught.value) == message
