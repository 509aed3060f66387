"""Models that change themselves, or save objects in their checkpoints, resume like others."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.support.changing_models import KINDS
from tests.support.processes import Finished, launcher, run_warm
from tests.support.runs import REPOSITORY, events_of, train_on
from tests.support.warm import DEEPSPEED

pytestmark = pytest.mark.slow
ENV = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
SETTINGS = ("--data", "tests.support.changing_models.Data", "--wandb.mode", "disabled", "--accelerator", "cpu",
            "--trainer.enable_model_summary", "false")  # fmt: skip


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Weights of a run's last checkpoint."""
    target = folder / f"{name}.pt"
    target.unlink(missing_ok=True)
    run_warm(launcher("convert", f"runs/{name}/checkpoints/last.ckpt", str(target)), folder).check()
    return torch.load(target, weights_only=True)


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], rel: float = 0.0) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=rel, atol=rel)


def test_every_kind_resumes_as_if_uninterrupted(tmp_path: Path) -> None:
    """Compared with plain Lightning. Objects in a checkpoint of another run are loaded only if trusted."""
    command = [sys.executable, "-m", "tests.support.changing_models_here"]
    output = run_warm(command, tmp_path, env=ENV, timeout=300).check().output
    for kind in KINDS:
        assert f"{kind.__name__}: 16 steps, same" in output, output
    (refused,) = [line for line in output.splitlines() if line.startswith("refused: ")]
    assert "last.ckpt holds objects whose loading would run code: " in refused
    for key in ("Data.counts", "callbacks.Counter.counts", "stats.counts"):
        assert f"{key} (tests.support.changing_models.Counts)" in refused
    assert "trusted: 4 weights" in output, output


def test_a_killed_rank_is_replaced_with_every_model(tmp_path: Path) -> None:
    def train(name: str, **more: str) -> Finished:
        arguments = ("--model", "tests.support.changing_models.Dies", *SETTINGS, "--trainer.max_epochs", "2", "--name",
                     name, "--checkpoint.every_n_steps", "2", "--nproc-per-node", "2", "--max-restarts",
                     "1")  # fmt: skip
        return run_warm(launcher(*arguments), tmp_path, env={**ENV, **more}).check()

    train("whole")
    train("parts", DIES="1")
    started = events_of(tmp_path / "runs" / "parts", "run_started")
    assert [event["restart_count"] for event in started] == [0, 1]
    assert_equal(weights(tmp_path, "whole"), weights(tmp_path, "parts"))


def test_an_empty_group_and_objects_are_kept_through_every_strategy(tmp_path: Path) -> None:
    """ZeRO drops the empty group; the schedule, which has a rate for it, continues, and so does DDP afterwards."""

    def train(name: str, epochs: int, *more: str) -> None:
        arguments = ("fit", "--model", "tests.support.changing_models.EmptyGroup", *SETTINGS, "--trainer.max_epochs",
                     str(epochs), "--name", name, "--resume", "auto", *more)  # fmt: skip
        train_on(2, arguments, tmp_path, ENV, preloaded=DEEPSPEED).check()

    def rate(steps: int) -> float:
        return float((tmp_path / f"rate-{steps}").read_text())

    train("whole", 4, "--strategy", "ddp")
    rates = rate(16)
    for epochs, strategy in enumerate(("deepspeed_stage_2", "deepspeed_stage_2", "deepspeed_stage_3", "ddp"), start=1):
        train("parts", epochs, "--strategy", strategy)
    assert rate(16) == pytest.approx(rates)
    assert_equal(weights(tmp_path, "whole"), weights(tmp_path, "parts"), rel=1e-4)


def test_bf16_of_stage_1_with_fp32_gradients_resumes_under_other_strategies(tmp_path: Path) -> None:
    """DeepSpeed uses another optimizer for this case, with other names in its files."""

    def train(name: str, epochs: int, strategy: str, *more: str) -> str:
        arguments = ("fit", "--model", "tests.support.changing_models.Whole", *SETTINGS, "--trainer.max_epochs",
                     str(epochs), "--precision", "bf16-mixed", "--name", name, "--resume", "auto", "--strategy",
                     strategy)  # fmt: skip
        return train_on(2, (*arguments, *more), tmp_path, ENV, preloaded=DEEPSPEED).check().output

    (tmp_path / "fp32.yaml").write_text("deepspeed_config: {data_types: {grad_accum_dtype: fp32}}\n")
    own = ("--config", "fp32.yaml")
    train("it", 1, "deepspeed_stage_1", *own)
    first = weights(tmp_path, "it")
    assert all(value.dtype == torch.float32 for value in first.values())
    for epochs, strategy, more in ((2, "deepspeed_stage_1", ()), (3, "deepspeed_stage_1", own), (4, "ddp", ())):
        assert f"it is put together for {strategy}" in train("it", epochs, strategy, *more)
    train("whole", 4, "deepspeed_stage_1", *own)
    assert_equal(weights(tmp_path, "whole"), weights(tmp_path, "it"), rel=5e-2)
