"""What comes after a strategy that runs out of memory, where the config rules out what needs less."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from launcher.config.schema import RunConfig, TrainerOptions
from launcher.planning.memory import plan_with_memory
from launcher.planning.oom import out_of_memory
from launcher.planning.plan import Plan
from tests.support.rank_threads import H100
from tests.unit.planning.test_memory_plan import ranks
from tests.unit.runs.test_memory_record import asked, profile

# Of these modules on three ranks.
FOLLOWING = "deepspeed_stage_2"


def planned(given: RunConfig, device: Any = None) -> Plan:
    return plan_with_memory(given, ranks(3) if device is None else ranks(3, device), profile())


def with_stage(**zero: Any) -> RunConfig:
    return asked(strategy="deepspeed_stage_1", deepspeed_config={"zero_optimization": zero})


def ended(plan: Plan) -> Any:
    return out_of_memory(MemoryError("x"), plan, rank=0, host="n0", allocated_bytes=None, on_oom="next")


def test_a_stage_that_the_users_file_fixes_ends_the_run_and_the_error_says_what_to_change() -> None:
    told = ended(planned(with_stage(stage=1)))
    assert (told.next_strategy, told.restarts) == (None, False)
    assert f"`strategy: {FOLLOWING}` needs less, but deepspeed_config fixes zero_optimization.stage: 1" in str(told)
    assert "set that to 'auto' there" in str(told)
    assert "micro batch" not in str(told)


def test_a_file_that_leaves_the_stage_to_the_plan_does_not_stand_in_the_way() -> None:
    for zero in ({"stage": "auto"}, {"reduce_bucket_size": 1_000_000}):
        told = ended(planned(with_stage(**zero)))
        assert (told.next_strategy, told.restarts) == (FOLLOWING, True)


def test_what_the_config_does_allow_comes_instead() -> None:
    # Stage 2 is fixed and offload is not: on a GPU its own offload is left. Of so small a model DDP needs less too.
    fixed = asked(strategy="deepspeed_stage_2", deepspeed_config={"zero_optimization": {"stage": 2}})
    free = dataclasses.replace(fixed, deepspeed_config=None)
    memory = [planned(given, H100).memory for given in (free, fixed)]
    assert [found and found["next"] for found in memory] == ["ddp", "deepspeed_stage_2_offload"]


def test_whatever_else_no_plan_meets_is_no_way_on_either() -> None:
    clip = TrainerOptions(gradient_clip_val=1.0, gradient_clip_algorithm="value")
    told = ended(planned(asked(strategy="ddp", trainer=clip)))
    assert told.next_strategy is None
    assert "DeepSpeed clips gradients only by their norm" in str(told)


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_without_an_obstacle_none_is_told(strategy: str) -> None:
    memory = planned(asked(strategy=strategy)).memory
    assert memory is not None
    assert (memory["next"], memory["next_obstacle"]) == ("deepspeed_stage_1", None)
