"""DeepSpeed on CUDA devices. `pytest -m gpu`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.processes import launcher, run
from tests.support.runs import TOY, events_of, toy_env

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
SETTINGS = (*TOY, "--global_batch_size", "8", "--trainer.max_epochs", "2", "--precision", "bf16-mixed", "--name", "it")


def _interrupt_and_go_on(folder: Path, *arguments: str) -> None:
    env = toy_env(folder / "trace")
    run(launcher(*SETTINGS, *arguments, "--model.signal_at", "5"), folder, env=env, timeout=240)
    directory = folder / "runs" / "it"
    assert {event["step"] for event in events_of(directory, "interrupted")} == {6}
    assert (directory / "checkpoints" / "last.ckpt").is_dir()
    run(launcher(*SETTINGS, *arguments, "--resume", "auto"), folder, env=env, timeout=240).check()
    assert events_of(directory, "finished")[-1]["step"] == 16
    plan = events_of(directory, "planned")[-1]["plan"]
    assert plan["strategy"]["backend"] == "nccl"
    assert plan["deepspeed"]["bf16"]["enabled"]


@pytest.mark.parametrize("name", ["deepspeed_stage_2_offload", "deepspeed_stage_3_offload"])
def test_one_gpu_trains_with_offload_and_resumes(tmp_path: Path, name: str) -> None:
    _interrupt_and_go_on(tmp_path, "--devices", "1", "--strategy", name)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_gpus_share_the_states_and_resume(tmp_path: Path, stage: int) -> None:
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two CUDA devices, this machine shows {torch.cuda.device_count()}")
    _interrupt_and_go_on(tmp_path, "--devices", "2", "--strategy", f"deepspeed_stage_{stage}")
