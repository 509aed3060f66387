"""User loaders and epochs ended by the Trainer, on real ranks: interrupted and resumed, or rejected."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.runs import events_of, read_trace, toy_env, train_on

pytestmark = pytest.mark.slow
BASE = ("--model", "tests.support.user_loaders.Loaders", "--data", "tests.support.user_loaders.LoadersData",
        "--wandb.mode", "disabled",
        "--name", "it", "--trainer.max_epochs", "3")  # fmt: skip


def _train(cwd: Path, ranks: int, *arguments: str, code: int = 0) -> str:
    cwd.mkdir(exist_ok=True)
    return train_on(ranks, (*BASE, *arguments), cwd, toy_env(cwd / "trace")).check(code).output


def _steps(cwd: Path, ranks: int) -> dict[int, tuple[list[list[int]], list[float]]]:
    """Samples and loss of each rank in the last execution of each step; without validations, which are sample -1."""
    seen: dict[int, tuple[list[list[int]], list[float]]] = {}
    for rank in range(ranks):
        own = {step: (samples, loss) for step, samples, loss in read_trace(cwd / "trace", rank) if samples != [-1]}
        for step, (samples, loss) in own.items():
            seen.setdefault(step, ([], []))[0].append(samples)
            seen[step][1].append(loss)
    return seen


@pytest.mark.parametrize(
    ("ranks", "arguments", "first"),
    [
        # An epoch that the Trainer ended, and one that max_steps cut.
        (2, ("--data.kind", "max_size_cycle", "--trainer.limit_train_batches", "3"), ("--trainer.max_epochs", "1")),
        (2, ("--data.kind", "weighted", "--data.workers", "1"), ("--trainer.max_steps", "7")),
        (1, ("--data.kind", "own", "--data.workers", "2"), ("--trainer.max_steps", "13")),
        (2, ("--data.kind", "min_size", "--trainer.use_distributed_sampler", "false"), ("--trainer.max_steps", "4")),
    ],
)
def test_a_run_that_the_trainer_ended_resumes_as_if_uninterrupted(
    tmp_path: Path, ranks: int, arguments: tuple[str, ...], first: tuple[str, ...]
) -> None:
    _train(tmp_path / "whole", ranks, *arguments)
    _train(tmp_path / "parts", ranks, *arguments, *first)
    _train(tmp_path / "parts", ranks, *arguments, "--resume", "auto")
    assert _steps(tmp_path / "parts", ranks) == _steps(tmp_path / "whole", ranks)
    assert [event["message"] for event in events_of(tmp_path / "parts" / "runs" / "it", "notice")] == []


def test_a_run_resumes_with_the_same_samples_on_another_number_of_ranks(tmp_path: Path) -> None:
    arguments = ("--data.kind", "dict", "--global_batch_size", "4", "--data.batch_size", "2")
    _train(tmp_path / "whole", 1, *arguments)
    _train(tmp_path / "parts", 2, *arguments, "--trainer.max_steps", "3")
    trace = tmp_path / "parts" / "trace-1"
    trace.rename(trace.with_name("first-1"))
    _train(tmp_path / "parts", 1, *arguments, "--resume", "auto")
    # One rank takes two batches a step, with the samples that two ranks take together.
    whole, parts = (read_trace(tmp_path / name / "trace") for name in ("whole", "parts"))
    later = [[entry[:2] for entry in trace if entry[0] >= 3 and entry[1] != [-1]] for trace in (whole, parts)]
    assert later[0] == later[1]


def test_a_loader_that_divides_the_batch_itself_is_rejected_with_a_fixed_batch_and_reported_without(
    tmp_path: Path,
) -> None:
    arguments = ("--data.kind", "own", "--data.own_share", "true", "--trainer.max_epochs", "1")
    refused = _train(tmp_path / "fixed", 2, *arguments, "--global_batch_size", "8", code=2)
    assert "needs 4 samples at once on each of 2 ranks, but LoadersData.train_dataloader made a loader of 2" in refused
    assert not list((tmp_path / "fixed").glob("trace*"))
    output = _train(tmp_path / "free", 2, *arguments)
    assert (
        "the plan's batch was 8 samples a step, but LoadersData.train_dataloader made a loader of 2: a step trains 4"
        in (" ".join(output.split()))
    )
    run = tmp_path / "free" / "runs" / "it"
    batch = json.loads((run / "plan.json").read_text())["batch"]
    assert (batch["micro_batch_size"], batch["global_batch_size"]) == (2, 4), "what is trained"
    assert [(event["before"], event["now"]) for event in events_of(run, "batch_corrected")] == [(8, 4)]
