"""FSDP2 on one CUDA device, and the same program on a CPU. `pytest -m gpu tests/gpu/test_fsdp_gpu.py`."""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.fsdp_one_rank import PRECISIONS, SIZES, STEPS
from tests.support.processes import launcher, run
from tests.support.runs import TOY, events_of, toy_env

pytestmark = pytest.mark.slow
ON_GPU = pytest.param("cuda", marks=pytest.mark.gpu)
# Of the losses; matrix products in another order, and autocast beside a cast of the parameters.
TOLERANCES = {"32-true": 1e-4, "bf16-mixed": 2e-2, "16-mixed": 1e-2}
# The plan beside the allocator's peak, with the workspaces of cuBLAS that it does not know.
MEMORY_ERROR = 0.1


@pytest.fixture(scope="module", params=["cpu", ON_GPU])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def seen(device: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process saw in all its trainings."""
    folder = tmp_path_factory.mktemp("one-rank")
    command = [sys.executable, "-m", "tests.support.fsdp_one_rank", device, str(folder / "seen.json")]
    run(command, folder, timeout=420).check()
    return json.loads((folder / "seen.json").read_text())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["fsdp2", "fsdp2_grad_op"])
def test_losses_are_those_of_one_device(seen: dict[str, Any], device: str, name: str, precision: str) -> None:
    _check_losses(seen, name, precision, device)


def _check_losses(seen: dict[str, Any], name: str, precision: str, held_on: str) -> None:
    found, reference = seen[f"{name} {precision}"], seen[f"single_device {precision}"]
    assert len(found["losses"]) == STEPS
    assert found["losses"] == pytest.approx(reference["losses"], rel=TOLERANCES[precision])
    assert found["losses"][-1] < found["losses"][0]
    # Master weights are sharded and in fp32.
    assert found["types"] == [f"DTensor {held_on} torch.float32"]
    assert (found["scale"] is not None) == (precision == "16-mixed")


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_a_resumed_training_repeats_an_uninterrupted_one(seen: dict[str, Any], device: str, precision: str) -> None:
    found, whole = seen[f"resumed {precision}"], seen[f"fsdp2 {precision}"]
    # The gradient of an embedding is summed in any order on a GPU.
    assert found["losses"] == pytest.approx(whole["losses"], rel=1e-12 if device == "cpu" else 1e-4)
    assert found["scale"] == whole["scale"]


def test_a_model_on_the_meta_device_is_initialised_and_trains(seen: dict[str, Any], device: str) -> None:
    losses = seen["meta"]["losses"]
    assert losses[0] == pytest.approx(math.log(SIZES[device].vocabulary), rel=0.1)
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))


def test_activation_checkpointing_changes_no_loss(seen: dict[str, Any]) -> None:
    assert seen["checkpointed"]["losses"] == pytest.approx(seen["fsdp2 bf16-mixed"]["losses"], rel=1e-3)
    assert seen["checkpointed"]["calls"] == 2 * seen["fsdp2 bf16-mixed"]["calls"] > 0
    assert seen["checkpointed"]["estimate"] < seen["fsdp2 bf16-mixed"]["estimate"]


@pytest.mark.parametrize("device", [ON_GPU], indirect=True)
class TestOnlyOnAGpu:
    """What a CPU does not have: an allocator's peak, and kernels for lists of tensors."""

    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_offloaded_weights_are_on_the_host(self, seen: dict[str, Any], precision: str) -> None:
        _check_losses(seen, "fsdp2_offload", precision, "cpu")

    def test_the_plan_is_the_peak_of_the_allocator(self, seen: dict[str, Any]) -> None:
        peaks = {key: (found["estimate"], found["peak"]) for key, found in seen.items() if "estimate" in found}
        errors = {key: round(estimate / peak - 1, 4) for key, (estimate, peak) in peaks.items()}
        print(errors)
        assert max(map(abs, errors.values())) <= MEMORY_ERROR, (errors, peaks)

    def test_activation_checkpointing_needs_less_memory(self, seen: dict[str, Any]) -> None:
        assert seen["checkpointed"]["peak"] < seen["fsdp2 bf16-mixed"]["peak"]

    def test_keeping_gathered_parameters_needs_more_memory(self, seen: dict[str, Any]) -> None:
        assert seen["fsdp2 bf16-mixed"]["peak"] <= seen["fsdp2_grad_op bf16-mixed"]["peak"]
        assert seen["fsdp2_offload bf16-mixed"]["peak"] < seen["fsdp2 bf16-mixed"]["peak"]

    def test_the_optimizer_steps_with_kernels_for_lists(self, seen: dict[str, Any]) -> None:
        found = seen["fsdp2 32-true"]
        assert found["foreach"] == [True]
        with_lists, one_by_one = found["seconds"]
        assert with_lists < one_by_one
        # Not much slower than on plain tensors.
        assert with_lists < 3 * seen["single_device 32-true"]["seconds"][0]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_one_gpu_trains_with_offload_and_resumes(tmp_path: Path, precision: str) -> None:
    env = toy_env(tmp_path / "trace")
    settings = (*TOY, "--global_batch_size", "8", "--trainer.max_epochs", "2", "--precision", precision, "--name", "it",
                "--devices", "1", "--strategy", "fsdp2_offload")  # fmt: skip
    run(launcher(*settings, "--model.signal_at", "5"), tmp_path, env=env, timeout=240)
    directory = tmp_path / "runs" / "it"
    assert {event["step"] for event in events_of(directory, "interrupted")} == {6}
    assert (directory / "checkpoints" / "last.ckpt").is_dir()
    run(launcher(*settings, "--resume", "auto"), tmp_path, env=env, timeout=240).check()
    assert events_of(directory, "finished")[-1]["step"] == 16
    (plan, measured) = events_of(directory, "planned")[-1]["plan"], events_of(directory, "memory")[-1]
    assert (plan["strategy"]["name"], plan["strategy"]["backend"]) == ("fsdp2_offload", "nccl")
    assert measured["measured"][0] > 0
