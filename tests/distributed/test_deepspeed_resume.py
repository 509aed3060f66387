"""Runs under DeepSpeed resume with the next batch: under the same strategy, under another one, after a kill."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.support.interrupted_runs import STEPS, assert_same, curve, interrupt, run_uninterrupted, train
from tests.support.processes import launcher, run_warm
from tests.support.runs import REPOSITORY, events_of, read_trace
from tests.support.warm import DEEPSPEED

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[list[int], float]]:
    return run_uninterrupted(tmp_path_factory.mktemp("uninterrupted"))


@pytest.mark.parametrize(("stage", "damaged"), [(2, True), (3, False)])
def test_an_interrupted_run_resumes_with_the_next_batch(
    tmp_path: Path, stage: int, damaged: bool, uninterrupted: list[tuple[list[int], float]]
) -> None:
    """With one wrong bit in one rank's file it resumes from the previous checkpoint."""
    arguments = ("--strategy", f"deepspeed_stage_{stage}", "--checkpoint.every_n_steps", "2")
    interrupt(tmp_path, "trace", 2, "it", 6, *arguments)
    last = tmp_path / "runs" / "it" / "checkpoints" / "last.ckpt"
    pieces = sorted(file.name for file in (last / "checkpoint").glob("*_optim_states.pt"))
    assert len(pieces) == 2, "every rank saved its part"
    if damaged:
        piece = last / "checkpoint" / pieces[1]
        content = bytearray(piece.read_bytes())
        content[len(content) // 2] ^= 1
        piece.write_bytes(content)
    again = train(tmp_path, "trace", 2, "--name", "it", "--resume", "auto", *arguments).check()

    (resumed,) = events_of(tmp_path / "runs" / "it", "resumed")
    if damaged:
        notice = f"last.ckpt is skipped: checkpoint/{pieces[1]} in it has changed"
        assert notice in " ".join(again.output.split()), again.output
        assert resumed["checkpoint"].endswith("step=6.ckpt")
    else:
        assert resumed["checkpoint"].endswith("last.ckpt")
    assert_same(curve(tmp_path, "trace"), uninterrupted)
    finished = events_of(tmp_path / "runs" / "it", "finished")
    assert finished[-1]["step"] == STEPS
    left = [path.name for path in last.parent.iterdir() if path.name.startswith(".") or "before" in path.name]
    assert not left, "no part of a save remains"


def test_a_run_resumes_under_any_strategy_and_number_of_ranks(
    tmp_path: Path, uninterrupted: list[tuple[list[int], float]]
) -> None:
    def last(name: str) -> tuple[str, str]:
        return "--resume", str(tmp_path / "runs" / name / "checkpoints" / "last.ckpt")

    interrupt(tmp_path, "trace", 2, "stage3", 1, "--strategy", "deepspeed_stage_3")
    interrupt(tmp_path, "trace", 1, "alone", 3, *last("stage3"))
    interrupt(tmp_path, "trace", 2, "stage2", 5, *last("alone"), "--strategy", "deepspeed_stage_2")
    end = train(tmp_path, "trace", 3, "--name", "end", *last("stage2"), "--strategy", "deepspeed_stage_3").check()

    assert "saved by ZeRO stage 2 in fp32 on 2 ranks: it is consolidated for deepspeed_stage_3" in end.output
    assert_same(curve(tmp_path, "trace"), uninterrupted)
    assert not list((tmp_path / "runs").glob("*/.resume-whole*"))

    plain = tmp_path / "weights.pt"
    source = tmp_path / "runs" / "end" / "checkpoints" / "last.ckpt"
    run_warm(launcher("convert", str(source), str(plain)), tmp_path).check()
    state = torch.load(plain, weights_only=True)
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        "net.0.weight": (16, 8), "net.0.bias": (16,), "net.2.weight": (1, 16), "net.2.bias": (1,)
    }  # fmt: skip
    assert plain.stat().st_mode & 0o777 == 0o600
    again = run_warm(launcher("convert", str(source), str(plain)), tmp_path).check(2)
    assert "exists already and is not overwritten" in again.output


def test_a_killed_rank_is_replaced_and_deepspeed_uses_the_new_group(
    tmp_path: Path, uninterrupted: list[tuple[list[int], float]]
) -> None:
    arguments = ("--strategy", "deepspeed_stage_2", "--checkpoint.every_n_steps", "2", "--name", "it")
    kill = ("--model.kill_at", "5", "--model.by_rank", "1")
    train(tmp_path, "trace", 2, *arguments, *kill, options=("--max-restarts", "1")).check()
    directory = tmp_path / "runs" / "it"
    assert [event["restart_count"] for event in events_of(directory, "run_started")] == [0, 1]
    assert events_of(directory, "finished")[-1]["step"] == STEPS
    # Step 4 was saved, 4 and 5 are trained again: the last record of each step counts.
    by_step = {step: samples for step, samples, _ in read_trace(tmp_path / "trace", 0)}
    assert sorted(by_step) == list(range(STEPS))


def test_two_runs_in_one_process_are_independent(tmp_path: Path) -> None:
    script = tmp_path / "twice.py"
    script.write_text(
        "import os\n"
        "from launcher import fit, load_config\n"
        "before = dict(os.environ)\n"
        "arguments = ['--model', 'tests.support.toy.Toy', '--data', 'tests.support.toy.ToyData', '--wandb.mode',\n"
        "         'disabled', '--trainer.max_steps', '3', '--strategy', 'deepspeed_stage_2_offload', '--name']\n"
        "losses = [fit(load_config([], [*arguments, name])).metrics['loss'] for name in ('a', 'b')]\n"
        "assert losses[0] == losses[1], losses\n"
        "rank = {k for k in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT') if k in os.environ}\n"
        "assert not rank, rank\n"
    )
    command = [sys.executable, str(script)]
    run_warm(command, tmp_path, env={"PYTHONPATH": str(REPOSITORY)}, preloaded=DEEPSPEED).check()
