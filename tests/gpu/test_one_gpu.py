"""Tests that need a CUDA device. `pytest -m gpu`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.processes import launcher, run
from tests.support.runs import TOY, events_of, only_run, toy_env

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


def test_hardware_has_the_device_and_its_native_types() -> None:
    import torch

    from launcher.hardware.devices import detect_hardware

    device = detect_hardware("auto", 0).device
    major, _ = torch.cuda.get_device_capability(0)
    assert device.kind == "cuda"
    assert device.name == torch.cuda.get_device_name(0)
    assert device.memory_bytes == torch.cuda.get_device_properties(0).total_memory
    # Ampere (compute capability 8.0) is the first with native bf16.
    assert ("bf16" in device.native_dtypes) == (major >= 8)


def test_detecting_the_hardware_before_a_fork_does_not_initialise_cuda(tmp_path: Path) -> None:
    import sys

    code = (
        "import torch; from launcher.hardware.devices import available_kind, device_count; "
        "assert device_count(available_kind('auto')) > 0; assert not torch.cuda.is_initialized()"
    )
    run([sys.executable, "-c", code], tmp_path).check()


@pytest.mark.parametrize("asked", ["auto", "16-mixed"])
def test_the_planned_precision_is_trained_on_the_gpu(tmp_path: Path, asked: str) -> None:
    import torch

    arguments = (*TOY, "--devices", "1", "--precision", asked, "--trainer.max_steps", "3", "--trainer.callbacks",
                 "[{class_path: tests.support.toy.Probe}]")  # fmt: skip
    env = {**toy_env(tmp_path / "trace"), "PROBE": str(tmp_path / "probe")}
    run(launcher(*arguments), tmp_path, env=env).check()

    native_bf16 = torch.cuda.get_device_capability(0)[0] >= 8
    expected = "bf16-mixed" if native_bf16 else "16-mixed"
    (planned,) = events_of(only_run(tmp_path), "planned")
    precision, dtype, scale, strategy = json.loads((tmp_path / "probe").read_text())
    assert precision == planned["plan"]["precision"] == (expected if asked == "auto" else asked)
    assert dtype == {"bf16-mixed": "torch.bfloat16", "16-mixed": "torch.float16"}[precision]
    assert (scale is not None) == (precision == "16-mixed")
    assert strategy == "SingleDeviceStrategy"


def test_the_demo_trains_on_all_gpus_of_the_machine(tmp_path: Path) -> None:
    import torch

    arguments = ("--trainer.max_steps", "20", "--trainer.limit_val_batches", "0", "--checkpoint.monitor", "null")
    run(launcher(*arguments), tmp_path, timeout=240).check()
    (planned,) = events_of(only_run(tmp_path), "planned")
    assert planned["plan"]["device_kind"] == "cuda"
    assert planned["plan"]["world_size"] == torch.cuda.device_count()
    assert planned["plan"]["strategy"]["backend"] == ("nccl" if torch.cuda.device_count() > 1 else None)
