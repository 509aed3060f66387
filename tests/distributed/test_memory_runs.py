"""Memory in real processes: plans for other machines, and a run that is out of memory."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from launcher.runs.oom_record import FILE_NAME, read_memory_record
from tests.support.processes import launcher, run_warm, torchrun
from tests.support.runs import PERSISTENT, REPOSITORY, TOY, WORKERS, events_of, only_run, toy_env

H100S = ("--gpus", "64", "--gpus-per-node", "8", "--gpu", "h100")


def strategies_in_record(directory: Path) -> list[str]:
    return [entry.strategy for entry in read_memory_record(directory).entries]


@pytest.mark.slow
def test_a_plan_for_other_gpus_has_every_candidate_and_a_plot(tmp_path: Path) -> None:
    arguments = launcher("plan", *TOY, *H100S, "--json", "--plot", "memory.svg", "--global-batch-size", "256")
    ended = run_warm(arguments, tmp_path, env={"PYTHONPATH": str(REPOSITORY)}, timeout=120).check()
    plan = json.loads(ended.output[ended.output.index("{") :])
    assert (plan["world_size"], plan["num_nodes"], plan["precision"]) == (64, 8, "bf16-mixed")
    assert plan["strategy"]["name"] == plan["memory"]["pick"] == "ddp"
    assert plan["memory"]["method"] == "traced"
    assert len(plan["memory"]["assessments"]) == 12
    assert "<svg" in (tmp_path / "memory.svg").read_text()
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != "") == ["memory.svg"]


@pytest.mark.slow
def test_wrong_options_are_reported_together_without_a_plan(tmp_path: Path) -> None:
    arguments = launcher("plan", *TOY, "--gpus", "12", "--gpus-per-node", "8", "--gpu", "h10")
    ended = run_warm(arguments, tmp_path, env={"PYTHONPATH": str(REPOSITORY)}, timeout=60).check(2)
    assert "the config has 2 problems" in ended.output
    assert "the closest are h100" in ended.output
    assert "Traceback" not in ended.output


@pytest.mark.slow
def test_a_model_too_large_for_every_strategy_is_rejected_before_a_run_exists(tmp_path: Path) -> None:
    arguments = launcher("fit", *TOY, "--accelerator", "cpu", "--memory_share", "1e-9", "--devices", "1")
    plan = launcher("plan", *TOY, "--accelerator", "cpu", "--memory_share", "1e-9")
    env = toy_env(tmp_path / "trace")
    ended = run_warm(plan, tmp_path, env=env, timeout=60).check(2)
    assert "no strategy fits: single_device needs least" in ended.output
    assert "what would do" in ended.output
    # A run of such a small model starts without a memory check.
    run_warm([*arguments, "--trainer.max_steps", "1"], tmp_path, env=env, timeout=90).check()


@pytest.mark.slow
def test_a_run_that_is_out_of_memory_reports_what_to_do(tmp_path: Path) -> None:
    arguments = launcher(
        "--model", "tests.support.hungry.Hungry", *TOY[2:], "--accelerator", "cpu", "--trainer.max_steps", "4"
    )
    ended = run_warm(arguments, tmp_path, env=toy_env(tmp_path / "trace"), timeout=90).check(1)
    assert "rank 0" in ended.output
    assert "is out of memory with single_device" in ended.output
    assert "next: a smaller micro batch" in ended.output
    (event,) = events_of(only_run(tmp_path), "out_of_memory")
    assert (event["strategy"], event["next"], event["go_on"]) == ("single_device", None, False)
    assert strategies_in_record(only_run(tmp_path)) == ["single_device"], "recorded although nothing restarts"


@pytest.mark.slow
def test_a_run_that_is_out_of_memory_continues_with_a_smaller_strategy(tmp_path: Path) -> None:
    arguments = launcher("fit", "--nproc-per-node", "2", "--model", "tests.support.hungry.HungryBlocks",
                         *TOY[2:], "--accelerator", "cpu", "--on_oom", "next", "--strategy", "ddp",
                         "--checkpoint.every_n_steps", "1", "--trainer.max_steps", "4", *WORKERS)  # fmt: skip
    ended = run_warm(arguments, tmp_path, env=toy_env(tmp_path / "trace"), timeout=300).check()
    directory = only_run(tmp_path)
    plans = [event["plan"] for event in events_of(directory, "planned")]
    states = [(plan["strategy"]["name"], plan["activation_checkpointing"]) for plan in plans]
    # The agent and the next plan use the strategy that each plan lists as next; activation checkpointing is last.
    following = [(plan["memory"]["next"], plan["memory"]["next_checkpointed"]) for plan in plans[:2]]
    assert states[:2] == [("ddp", False), ("fsdp2", False)]
    assert following == states[1:]
    assert states[2][1]
    last = f"{states[2][0]} with activation checkpointing"
    assert [event["verdict"] for event in events_of(directory, "rank_failed")] == [
        f"restart with strategy {name}, from the last checkpoint" for name in ("fsdp2", last)
    ]
    assert len(events_of(directory, "resumed")) == 2
    assert {event["step"] for event in events_of(directory, "finished")} == {4}
    assert "is out of memory with ddp" in ended.output
    assert "next: `strategy: fsdp2`" in ended.output
    assert f"it continues with {last}" in ended.output
    # The plan's estimate is compared with the measured memory, which includes libraries that are
    # loaded late and the allocator's overhead.
    (memory,) = events_of(directory, "memory")
    assessed = plans[-1]["memory"]["assessments"]
    assert memory["planned"] == next(a["memory"] for a in assessed if a["name"] == states[2][0])
    assert memory["ranks"] == [0, 1]
    planned = memory["planned"]["total"]
    assert all(0.7 * planned < peak < planned + (500 << 20) for peak in memory["measured"]), memory
    output = run_warm(launcher("report", directory.name, "--json"), tmp_path).check().output
    found = json.loads(output[output.index("{") :])["attempts"][-1]["memory"]
    assert found["measured"] == {str(rank): peak for rank, peak in enumerate(memory["measured"])}
    assert found["planned"] == planned
    assert strategies_in_record(directory) == ["ddp", "fsdp2"]
    assert [event["ran_out"] for event in events_of(directory, "strategy_changed")] == [["ddp"], ["ddp", "fsdp2"]]
    # The requested strategy stays in the run's config, by which `--resume auto` finds the run.
    assert "strategy: ddp\n" in (directory / "config.yaml").read_text()


@pytest.mark.slow
def test_a_restart_by_torchrun_uses_the_next_strategy(tmp_path: Path) -> None:
    arguments = ("fit", "--model", "tests.support.hungry.Hungry", "--model.content_from", "1", "--model.width", "1448",
                 *TOY[2:], "--accelerator", "cpu", "--on_oom", "next", "--checkpoint.every_n_steps", "1",
                 "--trainer.max_steps", "4", *PERSISTENT)  # fmt: skip
    command = torchrun(2, *arguments, options=("--max-restarts", "1"))
    ended = run_warm(command, tmp_path, env=toy_env(tmp_path / "trace"), timeout=240).check()
    directory = only_run(tmp_path)
    plans = [event["plan"] for event in events_of(directory, "planned")]
    following = plans[0]["memory"]["next"]
    assert [plan["strategy"]["name"] for plan in plans] == ["ddp", following]
    (changed,) = events_of(directory, "strategy_changed")
    assert (changed["ran_out"], changed["strategy"]) == (["ddp"], following)
    assert ended.output.count(f"ddp ran out of memory in this run: it continues with {following}") == 1
    assert {event["step"] for event in events_of(directory, "finished")} == {4}
    assert stat.S_IMODE((directory / FILE_NAME).stat().st_mode) == 0o600


@pytest.mark.slow
def test_without_a_smaller_strategy_there_is_no_restart(tmp_path: Path) -> None:
    arguments = launcher("fit", "--model", "tests.support.hungry.Hungry", *TOY[2:], "--accelerator", "cpu", "--on_oom",
                         "next", "--devices", "1", "--trainer.max_steps", "4")  # fmt: skip
    ended = run_warm(arguments, tmp_path, env=toy_env(tmp_path / "trace"), timeout=120).check(1)
    assert "is out of memory with single_device" in ended.output
    (event,) = events_of(only_run(tmp_path), "rank_failed")
    assert not event["restart"]
