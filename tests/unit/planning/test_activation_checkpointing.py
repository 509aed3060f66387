"""Activation checkpointing as a decision of the plan."""

from __future__ import annotations

import dataclasses
import io
import json
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader

from launcher.config.schema import RunConfig
from launcher.core.errors import PlanError
from launcher.planning.memory import plan_with_memory
from launcher.planning.object_profile import profile_objects
from launcher.planning.oom import out_of_memory
from launcher.planning.plan import Plan
from launcher.planning.table import print_plan
from launcher.runs.oom_record import MemoryRecord, OomRecord
from launcher.user_code.objects import UserObjects
from strategies.precision import Precision
from strategies.step_trace import ModelProfile
from tests.support.rank_threads import CPU
from tests.unit.planning.test_memory_plan import config, profiled, ranks

MIB = 1 << 20


class WideBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 1024), nn.Linear(1024, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Deep(pl.LightningModule):
    """8 MiB of states, and about 100 MiB of activations, almost all of them inside of blocks."""

    def __init__(self, batch_size: int = 4) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(WideBlock() for _ in range(4)))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.blocks(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader([torch.zeros(1024, 64)] * 8, batch_size=4)  # type: ignore[arg-type]


class Unrepeated(Deep):
    """The same without blocks of one class."""

    def __init__(self, batch_size: int = 4) -> None:
        super().__init__()
        self.blocks = nn.Sequential(nn.Linear(64, 1024), nn.Tanh(), nn.Linear(1024, 64))


def asked(model: type[Deep] = Deep, **given: Any) -> RunConfig:
    return dataclasses.replace(config(f"{__name__}.{model.__name__}", **given), data=None)


def planned(mebibytes: float, *, count: int = 1, record: MemoryRecord | None = None, **given: Any) -> Plan:
    """On ranks with this memory each."""
    device = dataclasses.replace(CPU, memory_bytes=int(mebibytes * MIB) * count)
    of = asked(**given)
    return plan_with_memory(of, ranks(count, device), profiled(of), record=record)


def needed(plan: Plan, name: str | None = None) -> int:
    assert plan.memory is not None
    return next(a["memory"]["total"] for a in plan.memory["assessments"] if a["name"] == (name or plan.strategy.name))


def test_auto_does_not_trace_again_where_something_fits() -> None:
    of = asked()
    profile = profiled(of)
    plan = plan_with_memory(of, ranks(1), profile)
    assert (plan.activation_checkpointing, plan.checkpointing_reasons) == (False, ())
    assert profile.checkpointed is not None
    assert profile.checkpointed.cache_info().misses == 0  # type: ignore[attr-defined]


def test_auto_takes_it_where_nothing_fits_and_states_what_it_saves_and_costs() -> None:
    roomy, tight = planned(1000), planned(120)
    assert needed(roomy) > 110 * MIB
    assert needed(tight) < 110 * MIB
    assert tight.activation_checkpointing
    (reason,) = tight.checkpointing_reasons
    saved = (needed(roomy) - needed(tight)) / MIB
    assert reason == (
        f"nothing fits without it; saves {saved:.3g} MiB, and computes the blocks' forward pass once more "
        "(+17% operations)"
    )
    compute = [plan.memory["assessments"][0]["step"]["compute"] for plan in (roomy, tight) if plan.memory]
    assert compute[1] == pytest.approx(7 / 6 * compute[0], rel=0.01)


def test_false_never_takes_it_and_the_error_names_it() -> None:
    with pytest.raises(PlanError, match=r"no strategy fits: single_device .*`activation_checkpointing: true`, or sho"):
        planned(120, activation_checkpointing=False)


def test_true_takes_it_without_need() -> None:
    plan = planned(1000, activation_checkpointing=True)
    assert (plan.activation_checkpointing, plan.checkpointing_reasons) == (True, ("requested",))
    assert needed(plan) == needed(planned(120))


def test_a_requested_strategy_has_to_fit_itself() -> None:
    plan = planned(120, count=2, strategy="ddp")
    assert plan.strategy.name == "ddp"
    assert plan.checkpointing_reasons[0].startswith("ddp does not fit without it; saves ")
    assert not planned(1000, count=2, strategy="ddp").activation_checkpointing
    never = planned(120, count=2, strategy="ddp", activation_checkpointing=False)
    assert not never.activation_checkpointing
    assert "strategy ddp was requested, and it does not fit" in never.notices[-1]


def test_an_error_states_that_it_does_not_suffice() -> None:
    with pytest.raises(PlanError, match=r"no strategy fits, even with activation checkpointing: ") as error:
        planned(20)
    assert "`activation_checkpointing" not in str(error.value)


def test_a_model_without_blocks_has_no_checkpointing() -> None:
    with pytest.raises(PlanError, match=r"no strategy fits: .*activation checkpointing in the module") as error:
        planned(20, model=Unrepeated)
    assert "even with" not in str(error.value)


def test_plans_with_and_without_it_are_json_and_plans_of_older_versions_are_read() -> None:
    plan = planned(120)
    values = json.loads(json.dumps(plan.to_dict()))
    assert Plan.from_dict(values) == plan
    for name in ("activation_checkpointing", "checkpointing_reasons"):
        del values[name]
    assert not Plan.from_dict(values).activation_checkpointing


@pytest.mark.parametrize("width", [80, 140])
def test_the_printed_plan_has_the_decision_and_its_reason(width: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    print_plan(planned(120), console)
    output = console.file.getvalue()  # type: ignore[attr-defined]
    assert "memory    activation checkpointing" in output
    assert "nothing fits without it" in output
    assert max(map(len, output.splitlines())) <= width


def test_after_running_out_of_memory_the_same_strategy_with_it_is_the_last_resort() -> None:
    def ended(plan: Plan) -> Any:
        return out_of_memory(MemoryError("x"), plan, rank=0, host="n0", allocated_bytes=None, on_oom="next")

    def recorded(*plans: Plan) -> MemoryRecord:
        of = asked(on_oom="next").to_dict()
        return MemoryRecord(tuple(OomRecord.of(of, plan.to_dict()) for plan in plans))

    first = planned(1000, on_oom="next")
    assert first.memory is not None
    assert (first.memory["next"], first.memory["next_checkpointed"]) == ("single_device", True)
    error = ended(first)
    assert (error.next_strategy, error.next_checkpointed, error.restarts) == ("single_device", True, True)
    assert "next: `activation_checkpointing: true` with `strategy: single_device`" in str(error)
    second = planned(1000, on_oom="next", record=recorded(first))
    assert second.activation_checkpointing
    assert second.ran_out == ("single_device",)
    assert second.checkpointing_reasons[0].startswith("nothing else needs less than single_device; saves ")
    assert "it continues with single_device with activation checkpointing" in second.notices[-1]
    assert ended(second).next_strategy is None
    with pytest.raises(PlanError, match="nothing that fits needs less"):
        planned(1000, on_oom="next", record=recorded(first, second))
    never = planned(1000, on_oom="next", activation_checkpointing=False)
    assert ended(never).next_strategy is None


def test_strategies_that_need_less_precede_it() -> None:
    of = {"on_oom": "next", "count": 2}
    first = planned(1000, **of)
    assert first.memory is not None
    chain = [(first.memory["next"], first.memory["next_checkpointed"])]
    entries: tuple[OomRecord, ...] = ()
    plan = first
    while chain[-1][0] is not None:
        entries = (*entries, OomRecord.of(asked(on_oom="next").to_dict(), plan.to_dict()))
        plan = planned(1000, record=MemoryRecord(entries), **of)
        assert plan.memory is not None
        assert (plan.strategy.name, plan.activation_checkpointing) == chain[-1]
        chain.append((plan.memory["next"], plan.memory["next_checkpointed"] or plan.activation_checkpointing))
    states = [is_on for name, is_on in chain if name is not None]
    assert states == sorted(states)
    assert {False, True} == set(states)
    assert needed(plan) < needed(first)


def test_the_callers_objects_are_not_changed_by_a_trace_with_it() -> None:
    model = Deep()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    forward = [block.forward for block in model.blocks]
    found = profile_objects(asked(), UserObjects(model), Precision.FP32_TRUE, world_size=1, device_kind="cpu")
    assert isinstance(found, ModelProfile)
    assert found.checkpointed is not None
    again = found.checkpointed()
    assert again is not None
    assert again.plain[1].backward < 0.6 * found.plain[1].backward
    assert [block.forward for block in model.blocks] == forward
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
