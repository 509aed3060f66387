"""DeepSpeed's stages and DDP train the demo to the same loss: two gloo ranks, real ZeRO."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.runs import REPOSITORY, events_of, train_on
from tests.support.warm import DEEPSPEED

pytestmark = pytest.mark.slow
# Accumulated and clipped: a gradient with another scale than DDP's would be clipped differently.
DEMO = ("--config", str(REPOSITORY / "launcher/presets/demo.yaml"), "--wandb.mode", "disabled",
        "--data.train_stride", "480", "--data.block_size", "32", "--model.n_layer", "2", "--model.n_embd", "32",
        "--trainer.accumulate_grad_batches", "2", "--trainer.gradient_clip_val", "0.3",
        "--trainer.val_check_interval", "1.0", "--trainer.limit_val_batches", "4",
        "--trainer.log_every_n_steps", "1")  # fmt: skip


def _curve(folder: Path, strategy: str, precision: str) -> list[float]:
    """The training loss of rank zero at every step, then the final validation loss."""
    name = f"{strategy}-{precision}"
    arguments = (*DEMO, "--strategy", strategy, "--precision", precision, "--name", name)
    train_on(2, arguments, folder, {}, preloaded=DEEPSPEED).check()
    directory = folder / "runs" / name
    steps = [event["metrics"]["train_loss"] for event in events_of(directory, "step")]
    (finished,) = events_of(directory, "finished")
    return [*steps, finished["metrics"]["val_loss"]]


@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-4), ("bf16-mixed", 0.02)])
def test_every_stage_trains_the_demo_to_ddps_loss(tmp_path: Path, precision: str, tolerance: float) -> None:
    expected = _curve(tmp_path, "ddp", precision)
    assert len(expected) > 20
    assert expected[-1] < expected[0] - 0.5
    for stage in (1, 2, 3):
        got = _curve(tmp_path, f"deepspeed_stage_{stage}", precision)
        assert got == pytest.approx(expected, rel=tolerance), f"stage {stage}"
