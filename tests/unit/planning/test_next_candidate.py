"""The next candidate after running out of memory, if the config rules out candidates that need less."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from launcher.agreement.facts import Agreement
from launcher.config.schema import RunConfig, TrainerOptions
from launcher.planning.memory import plan_with_memory
from launcher.planning.oom import out_of_memory
from launcher.planning.plan import Plan
from tests.support.rank_threads import H100
from tests.unit.planning.test_memory_plan import ranks
from tests.unit.runs.test_memory_record import asked, profile

# Memory of these modules on three ranks.
FOLLOWING = "deepspeed_stage_2"


def planned(given: RunConfig, device: Any = None) -> Plan:
    return plan_with_memory(given, ranks(3) if device is None else ranks(3, device), profile())


def with_stage(**zero: Any) -> RunConfig:
    return asked(strategy="deepspeed_stage_1", deepspeed_config={"zero_optimization": zero})


def ended(plan: Plan) -> Any:
    return out_of_memory(MemoryError("x"), plan, rank=0, host="n0", allocated_bytes=None, on_oom="next")


def test_fixed_stage_ends_the_run_with_advice() -> None:
    error = ended(planned(with_stage(stage=1)))
    assert (error.next_strategy, error.restarts) == (None, False)
    assert f"`strategy: {FOLLOWING}` needs less, but deepspeed_config fixes zero_optimization.stage: 1" in str(error)
    assert "set that to 'auto' there" in str(error)
    assert "micro batch" not in str(error)


def test_config_with_auto_stage_does_not_block_the_next_candidate() -> None:
    for zero in ({"stage": "auto"}, {"reduce_bucket_size": 1_000_000}):
        error = ended(planned(with_stage(**zero)))
        assert (error.next_strategy, error.restarts) == (FOLLOWING, True)


def test_next_candidate_is_one_that_the_config_allows() -> None:
    # Stage 2 is fixed and offload is not: on a GPU stage 2 with offload remains.
    # With such a small model DDP also needs less.
    fixed = asked(strategy="deepspeed_stage_2", deepspeed_config={"zero_optimization": {"stage": 2}})
    free = dataclasses.replace(fixed, deepspeed_config=None)
    memory = [planned(given, H100).memory for given in (free, fixed)]
    assert [found and found["next"] for found in memory] == ["ddp", "deepspeed_stage_2_offload"]


def test_other_plan_problems_block_the_next_candidate() -> None:
    clip = TrainerOptions(gradient_clip_val=1.0, gradient_clip_algorithm="value")
    given = asked(strategy="ddp", trainer=clip)
    assert ended(planned(given)).next_strategy == "fsdp2", "only ZeRO is blocked"
    averaged = Agreement(
        tuple(dataclasses.replace(f, traits={**f.traits, "weight_callbacks": ["Averaging"]}) for f in ranks(3).facts)
    )
    error = ended(plan_with_memory(given, averaged, profile()))
    assert error.next_strategy is None
    assert "DeepSpeed clips gradients only by their norm" in str(error)


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_no_obstacle_is_reported_without_one(strategy: str) -> None:
    memory = planned(asked(strategy=strategy)).memory
    assert memory is not None
    assert (memory["next"], memory["next_obstacle"]) == ("fsdp2", None)
