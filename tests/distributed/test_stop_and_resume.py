"""A run that is stopped in the middle of an epoch resumes with the next batch."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.core.errors import describe_stop_signal
from tests.support.processes import launcher, run, run_warm, torchrun
from tests.support.runs import REPOSITORY, TOY, events_of, read_trace, toy_env, train_on

pytestmark = pytest.mark.slow
SETTINGS = (*TOY, "--global_batch_size", "8", "--trainer.max_epochs", "3", "--name", "it")
NOISY = ("--model", "tests.support.toy.Noisy", "--data", "tests.support.toy.NoisyData")


def _train(cwd: Path, trace: Path, ranks: int, *arguments: str, code: int = 0) -> str:
    cwd.mkdir(exist_ok=True)
    return train_on(ranks, (*SETTINGS, *arguments), cwd, toy_env(trace)).check(code).output


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], Path]:
    """Traces of uninterrupted runs, by number of ranks and of loader workers."""

    @functools.cache
    def train(ranks: int, workers: int) -> Path:
        folder = tmp_path_factory.mktemp("uninterrupted")
        _train(folder, folder / "trace", ranks, *NOISY, "--data.workers", str(workers))
        return folder / "trace"

    return train


def _learned(trace: Path) -> dict[tuple[int, tuple[int, ...]], float]:
    """Samples and loss of each step's last execution; validations are sample -1."""
    return {(step, tuple(samples)): loss for step, samples, loss in read_trace(trace)}


# Steps 7 and 15 are the last of an epoch, followed by a validation and the end of the epoch.
@pytest.mark.parametrize(
    ("ranks", "step", "workers", "number"),
    [(1, 7, 0, signal.SIGUSR1), (1, 11, 2, signal.SIGHUP), (1, 15, 2, signal.SIGTERM), (2, 11, 0, signal.SIGINT)],
)
def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, uninterrupted: Callable[[int, int], Path], ranks: int, step: int, workers: int, number: int
) -> None:
    own = (*NOISY, "--data.workers", str(workers))
    parts = tmp_path / "parts"
    arguments = ("--model.signal_at", str(step), "--model.signal_number", str(int(number)))
    stopped = _train(parts, tmp_path / "trace", ranks, *own, *arguments, code=128 + number)
    directory = parts / "runs" / "it"
    stopped_at = events_of(directory, "interrupted")[0]["step"]
    # The rank with the signal stops in that step; if the other is one step ahead, both finish that step.
    next_border = step + 1 + (step % 8 == 7)
    assert stopped_at in ((next_border,) if ranks == 1 else (next_border, next_border + 1))
    assert stopped.count(f"stopped by {describe_stop_signal(number)} after step {stopped_at}; saved") == 1
    for log in (parts / "runs" / "it" / "logs").iterdir():
        assert "Traceback" not in log.read_text()
    resumed = _train(parts, tmp_path / "trace", ranks, *own, "--resume", "auto")
    assert ("--resume auto --nproc-per-node 2 " in resumed) == (ranks == 2)

    for rank in range(ranks):
        assert read_trace(tmp_path / "trace", rank) == read_trace(uninterrupted(ranks, workers), rank)
    assert events_of(directory, "resumed")[0]["checkpoint"].endswith("last.ckpt")
    first, second = events_of(directory, "run_started")
    assert first["wandb_id"] == second["wandb_id"]


@pytest.mark.parametrize("every", [(), ("--checkpoint.every_n_steps", "8")])
def test_a_killed_run_resumes_from_the_end_of_an_epoch_as_if_uninterrupted(
    tmp_path: Path, uninterrupted: Callable[[int, int], Path], every: tuple[str, ...]
) -> None:
    """The checkpoint is from an epoch's last step: written after its validation, or before it and then repeated."""
    arguments = (*NOISY, *every, "--model.kill_at", "12")
    _train(tmp_path, tmp_path / "trace", 1, *arguments, code=-signal.SIGKILL)
    _train(tmp_path, tmp_path / "trace", 1, *arguments, "--resume", "auto")
    directory = tmp_path / "runs" / "it"
    assert [event["step"] for event in events_of(directory, "training_started")] == [0, 8]
    assert _learned(tmp_path / "trace") == _learned(uninterrupted(1, 0))
    validated = [event["step"] for event in events_of(directory, "validation")]
    assert validated == ([8, 8, 16, 24] if every else [8, 16, 24])


def test_a_signal_to_one_rank_stops_all_ranks_at_the_same_step(tmp_path: Path) -> None:
    # Only rank one receives SLURM's warning, in the middle of a step.
    arguments = ("--model.signal_at", "5", "--model.by_rank", "1", "--model.signal_number", str(int(signal.SIGUSR2)))
    _train(tmp_path, tmp_path / "trace", 2, *arguments, code=128 + signal.SIGUSR2)

    interrupted = events_of(tmp_path / "runs" / "it", "interrupted")
    assert {event["rank"] for event in interrupted} == {0, 1}
    assert len({event["step"] for event in interrupted}) == 1
    assert len(read_trace(tmp_path / "trace", 0)) == len(read_trace(tmp_path / "trace", 1)) == interrupted[0]["step"]


def test_ctrl_c_at_the_terminal_of_torchrun_leaves_a_checkpoint(tmp_path: Path) -> None:
    sent: list[str] = []

    def press_ctrl_c(line: str, group: int) -> None:
        if line.startswith("step 4/") and not sent:
            sent.append(line)
            os.killpg(group, signal.SIGINT)

    arguments = ("--trainer.log_every_n_steps", "1", "--trainer.max_epochs", "200")
    command, env = torchrun(2, *SETTINGS, *arguments), toy_env(tmp_path / "trace")
    finished = run(command, tmp_path, env=env, on_line=press_ctrl_c)

    assert sent
    directory = tmp_path / "runs" / "it"
    assert len({event["step"] for event in events_of(directory, "interrupted")}) == 1, finished.output
    assert (directory / "checkpoints" / "last.ckpt").exists()
    assert "saving at the next step boundary" in finished.output
    step = events_of(directory, "interrupted")[0]["step"]
    assert finished.output.count(f"stopped by Ctrl-C after step {step}; saved") == 1
    assert (
        "\ntorchrun --nproc-per-node 2 " in finished.output
        or "torch.distributed.run --nproc-per-node 2 " in finished.output
    )
    assert "--name it --resume auto\n" in finished.output
    assert not events_of(directory, "failed")


def test_the_end_of_training_is_saved_and_more_epochs_continue_from_there(tmp_path: Path) -> None:
    arguments = ("--config", str(REPOSITORY / "launcher/presets/demo.yaml"), "--data.train_stride", "960", "--name",
                 "it", "--data.block_size", "32", "--model.n_layer", "1", "--model.n_embd", "32", "--wandb.mode",
                 "disabled", "--trainer.limit_val_batches", "4")  # fmt: skip
    run_warm(launcher(*arguments), tmp_path).check()
    run_warm(launcher(*arguments, "--resume", "auto"), tmp_path).check()
    output = run_warm(launcher(*arguments, "--resume", "auto", "--trainer.max_epochs", "2"), tmp_path).check().output

    events = [events_of(tmp_path / "runs" / "it", kind) for kind in ("finished", "checkpoint", "training_started")]
    steps = [[event["step"] for event in of_kind] for of_kind in events]
    # The last quarter of the epoch is incomplete, so the last validation is not at the last step.
    end = steps[0][0]
    assert steps[0] == [end, end, 2 * end]
    assert end in steps[1]
    assert steps[2] == [0, end]
    assert "nothing was left to train" not in output
    logs = "".join(path.read_text() for path in (tmp_path / "runs" / "it" / "logs").iterdir())
    assert f"nothing was left to train after step {end}" in logs
