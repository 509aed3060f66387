"""Ranks that survive a failure keep the last step: nothing is done again, and every bit is as without the failure."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import launcher, run_warm, torchrun
from tests.support.program_ranks import run_program
from tests.support.resume_programs import is_placed, random_program
from tests.support.runs import WORKERS, events_of, only_run, read_trace, toy_env

pytestmark = pytest.mark.slow

_MODEL = ("--model", "tests.support.kept_model.Kept", "--data", "tests.support.toy.ToyData", "--wandb.mode", "disabled",
          "--trainer.callbacks", "tests.support.kept_model.Average", "--trainer.max_epochs", "3",
          "--global_batch_size", "12")  # fmt: skip
# LAUNCHER_KEPT_PROGRAMS=300 runs more of them.
_COUNT = int(os.environ.get("LAUNCHER_KEPT_PROGRAMS", "10"))


def _traces(folder: Path, arguments: tuple[str, ...], ranks: int, *, torch_agent: bool = False) -> list[Any]:
    folder.mkdir()
    command = (
        torchrun(ranks, *arguments, options=("--max-restarts", "2"))
        if torch_agent
        else launcher(*arguments, "--nproc-per-node", str(ranks), "--max-restarts", "2")
    )
    run_warm(command, folder, env=toy_env(folder / "trace"), timeout=180).check()
    return [read_trace(folder / "trace", rank) for rank in range(ranks)]


@pytest.mark.parametrize(
    ("ranks", "victim", "more", "torch_agent"),
    [
        (2, 0, (), False),
        (3, 2, ("--trainer.accumulate_grad_batches", "2", "--trainer.gradient_clip_val", "1.0"), False),
        (2, 1, (*WORKERS, "--precision", "16-mixed"), False),
        (2, 0, (), True),
    ],
)
def test_a_killed_rank_costs_no_step_and_changes_no_bit(
    tmp_path: Path, ranks: int, victim: int, more: tuple[str, ...], torch_agent: bool
) -> None:
    expected = _traces(tmp_path / "whole", (*_MODEL, *more), ranks)
    killed = ("--model.kill_at", "5", "--model.by_rank", str(victim))
    found = _traces(tmp_path / "killed", (*_MODEL, *more, *killed), ranks, torch_agent=torch_agent)
    for rank in range(ranks):
        again = [entry for number, entry in enumerate(found[rank]) if entry in found[rank][:number]]
        # The step that was begun, and no other, was done again, with the same samples and loss.
        assert {step for step, _, _ in again} <= {5}, rank
        unique = [entry for number, entry in enumerate(found[rank]) if entry not in found[rank][:number]]
        assert unique == expected[rank], rank
    resumed = events_of(only_run(tmp_path / "killed"), "resumed")
    assert [(event["step"], event["kept"]) for event in resumed] == [(5, True)]


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of two ranks for each seed; one start for all."""
    folder = tmp_path_factory.mktemp("kept")
    return run_program("tests.support.kept_programs", folder, "0", str(_COUNT), timeout=240 + 20 * _COUNT)


@pytest.mark.parametrize("seed", range(_COUNT))
def test_a_rank_may_be_lost_anywhere_in_a_training(played: list[dict[str, Any]], seed: int) -> None:
    program = random_program(seed)
    for rank in played:
        result = rank[str(seed)]
        if not is_placed(program):
            continue  # a notice says that its epoch starts again
        assert result["found"] == [], (program, result)
        assert result["ended"] or result["kept"], (program, result)


def test_what_cannot_be_kept_is_named_and_the_last_checkpoint_is_used(tmp_path: Path) -> None:
    arguments = (*_MODEL, "--strategy", "fsdp2", "--checkpoint.every_n_steps", "2", "--model.kill_at", "5")
    output = run_warm(
        launcher(*arguments, "--nproc-per-node", "2", "--max-restarts", "1"),
        tmp_path, env=toy_env(tmp_path / "trace"), timeout=150,
    ).check().output  # fmt: skip
    assert "restart 1 of 1, from the last checkpoint (rank 0 could not keep its last step: under fsdp2" in output
    assert [event["kept"] for event in events_of(only_run(tmp_path), "resumed")] == [False]
