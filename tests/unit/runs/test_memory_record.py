"""Strategies that ran out of memory are recorded in the run directory, and skipped by the next start."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from launcher.agent.restarts import record_out_of_memory
from launcher.agreement.facts import Agreement
from launcher.config.schema import FsdpOptions, RunConfig
from launcher.core.errors import PlanError
from launcher.jobs.status import summarize_events
from launcher.planning.fit_plan import plan_for_fit
from launcher.planning.memory import plan_with_memory
from launcher.planning.plan import Plan
from launcher.runs.directory import open_run_directory, write_plan
from launcher.runs.oom_record import (
    FILE_NAME,
    MemoryRecord,
    OomRecord,
    add_attempt_oom_record,
    add_oom_record,
    read_memory_record,
)
from launcher.runs.selection import find_run
from strategies.step_trace import ModelProfile
from tests.support.rank_threads import CPU
from tests.support.run_directories import ended as unlocked
from tests.unit.agent.test_failure_report import make_error, make_outcome
from tests.unit.planning.test_memory_plan import config, profiled, ranks

ENTRY = OomRecord("ddp", "auto", "my_pkg.Model", "d1", "32-true", 2, 4, 100 << 30)
# Enough parameters to shard: the toy model's fit into one bucket.
WIDE = {"class_path": "tests.support.hungry.Hungry", "init_args": {"width": 1448}}
KILLED = make_outcome(1, -9, out_of_memory=True)


def asked(**given: Any) -> RunConfig:
    return dataclasses.replace(config(on_oom="next", **given), model=WIDE)


@functools.cache
def profile() -> ModelProfile:
    return profiled(asked())


def planned(given: RunConfig, record: MemoryRecord | None = None, agreement: Agreement | None = None) -> Plan:
    return plan_with_memory(given, agreement or ranks(3), profile(), record=record)


def record_of(given: RunConfig, *plans: Plan) -> MemoryRecord:
    return MemoryRecord(tuple(OomRecord.of(given.to_dict(), plan.to_dict()) for plan in plans))


def test_an_entry_is_stored_once_in_a_private_file(tmp_path: Path) -> None:
    other = dataclasses.replace(ENTRY, strategy="deepspeed_stage_1", micro_batch_size=None, memory_bytes=None)
    assert read_memory_record(tmp_path) == MemoryRecord()
    assert all(add_oom_record(tmp_path, entry) for entry in (ENTRY, other, ENTRY))
    assert read_memory_record(tmp_path).entries == (ENTRY, other)
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    assert stat.S_IMODE((tmp_path / FILE_NAME).stat().st_mode) == 0o600


def test_a_record_of_an_older_version_is_read(tmp_path: Path) -> None:
    values = dataclasses.asdict(ENTRY)
    del values["activation_checkpointing"]
    (tmp_path / FILE_NAME).write_text(json.dumps([values]))
    assert read_memory_record(tmp_path).entries == (ENTRY,)
    # The digest of settings that are the defaults is that of a version without them.
    plan = planned(asked()).to_dict()
    old = asked().to_dict()
    del old["fsdp"]
    assert OomRecord.of(asked().to_dict(), plan) == OomRecord.of(old, plan)
    changed = asked(fsdp=FsdpOptions(wrap=["Layer"])).to_dict()
    assert OomRecord.of(changed, plan) != OomRecord.of(old, plan)


@pytest.mark.parametrize("text", ["[", "{}[", '[{"strategy": "ddp"}]', "[1]", "7"])
def test_a_damaged_record_is_reported_and_empty(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE_NAME).write_text(text)
    record = read_memory_record(tmp_path)
    assert record.entries == ()
    assert "is not known" in (record.problem or "")
    plan = plan_for_fit(asked(), ranks(2), None, record=record)
    assert plan.notices[-1] == record.problem
    assert plan.strategy.name == "ddp"


def test_a_record_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    missing = tmp_path / "no"
    assert not add_oom_record(missing, ENTRY)
    assert not add_attempt_oom_record(missing)
    (tmp_path / "plan.json").write_text("{}")
    assert "cannot write" in (record_out_of_memory(KILLED, tmp_path) or "")
    # Another failure, or a node without the directory: no notice.
    assert record_out_of_memory(make_outcome(1, -9), tmp_path) is None
    assert record_out_of_memory(KILLED, missing) is None
    assert record_out_of_memory(KILLED, None) is None


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ({}, True),
        ({"strategy": "deepspeed_stage_1"}, True),
        ({"memory_bytes": 90 << 30}, True),
        ({"memory_bytes": (100 << 30) + (64 << 20)}, True),
        ({"memory_bytes": None}, True),
        ({"memory_bytes": 102 << 30}, False),
        ({"asked": "ddp"}, False),
        ({"model": "my_pkg.Other"}, False),
        ({"settings": "d2"}, False),
        ({"precision": "bf16-mixed"}, False),
        ({"world_size": 4}, False),
        ({"micro_batch_size": 2}, False),
        ({"activation_checkpointing": True}, False),
    ],
)
def test_a_record_applies_if_no_relevant_circumstance_has_changed(change: dict[str, Any], again: bool) -> None:
    now = dataclasses.replace(ENTRY, **change)
    assert ENTRY.would_recur(now) is again
    assert MemoryRecord((ENTRY, ENTRY)).ran_out(now) == (("ddp",) if again else ())


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_strategies_that_ran_out_of_memory_are_skipped_in_turn(strategy: str) -> None:
    given = asked(strategy=strategy)
    first = planned(given)
    assert first.memory is not None
    assert (first.strategy.name, first.ran_out) == ("ddp", ())
    second = planned(given, record_of(given, first))
    assert second.memory is not None
    assert second.strategy.name == first.memory["next"] == second.memory["pick"]
    assert second.ran_out == ("ddp",)
    assert second.strategy.name == "fsdp2"
    assert f"ddp ran out of memory in this run: it continues with {second.strategy.name}" in second.notices
    assert any("which ran out of memory in this run" in reason for reason in second.strategy.reasons)
    assert Plan.from_dict(json.loads(json.dumps(second.to_dict()))) == second


def test_a_chain_of_strategies_needs_less_each_time() -> None:
    given = asked(strategy="deepspeed_stage_1")
    plans = [planned(given)]
    while plans[-1].memory and plans[-1].memory["next"]:
        plans.append(planned(given, record_of(given, *plans)))
        before = plans[-2].memory
        assert before is not None
        assert plans[-1].strategy.name == before["next"]
        assert plans[-1].ran_out == tuple(plan.strategy.name for plan in plans[:-1])
    assert [plan.strategy.name for plan in plans] == ["deepspeed_stage_1", "fsdp2"]


def test_if_no_strategy_needs_less_the_plan_states_what_would_fit() -> None:
    given = asked()
    plans = [planned(given)]
    while plans[-1].memory and plans[-1].memory["next"]:
        plans.append(planned(given, record_of(given, *plans)))
    with pytest.raises(PlanError, match=r"nothing that fits needs less; use a smaller micro batch"):
        planned(given, record_of(given, *plans))


def test_an_explicit_strategy_or_another_number_of_ranks_overrides_the_record() -> None:
    given = asked()
    record = record_of(given, planned(given))
    assert planned(asked(strategy="ddp"), record).strategy.name == "ddp"
    assert planned(given, record, ranks(4)).strategy.name == "ddp"
    assert planned(given, record, ranks(3, batch_size=2)).strategy.name == "ddp"
    assert planned(given, record).strategy.name != "ddp"


def test_a_requeued_job_uses_the_record_of_its_run(tmp_path: Path) -> None:
    """The next start of the same run reads the record that a rank or an agent wrote."""
    # So little memory that the step is traced for any on_oom.
    agreement = ranks(3, dataclasses.replace(CPU, memory_bytes=3 << 30))
    given = asked(name="it", runs_dir=str(tmp_path))
    run = unlocked(open_run_directory(given))
    first = plan_for_fit(given, agreement, None)
    write_plan(run, first.to_dict())
    assert record_out_of_memory(KILLED, run.path) is None
    again = dataclasses.replace(given, resume="auto")
    place = find_run(again)
    assert place.exists
    record = read_memory_record(place.path)
    assert record == record_of(again, first), "config.yaml and plan.json contain what the rank itself knows"
    second = plan_for_fit(again, agreement, None, record=record)
    assert second.ran_out == ("ddp",)
    assert second.strategy.name != "ddp"
    stop = dataclasses.replace(again, on_oom="stop")
    plain = plan_for_fit(stop, agreement, None, record=record)
    assert plain.memory is not None
    assert (plain.strategy.name, plain.ran_out) == ("ddp", ())


def test_a_failed_allocation_counts_like_an_oom_kill() -> None:
    refused = dataclasses.replace(make_error(), kind="OutOfMemoryError")
    assert make_outcome(1, 1, error=refused).ran_out_of_memory
    assert KILLED.ran_out_of_memory
    assert not make_outcome(1, 1, error=make_error()).ran_out_of_memory


def test_the_status_of_a_run_reports_out_of_memory(tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    events.write_text(json.dumps({"time": 1.0, "rank": 0, "kind": "out_of_memory", "strategy": "ddp"}) + os.linesep)
    ending = summarize_events(events).endings.find_ending("it")
    assert ending is not None
    assert (ending.state, ending.text) == ("failed", "rank 0: out of memory with ddp")


def test_the_next_strategy_respects_the_config() -> None:
    zero = {"zero_optimization": {"stage": 1}}
    given = asked(strategy="deepspeed_stage_1", deepspeed_config=zero)
    first = planned(given)
    with pytest.raises(PlanError, match=r"in this run: `strategy: deepspeed_stage_\d` needs less, but"):
        planned(given, record_of(given, first))
