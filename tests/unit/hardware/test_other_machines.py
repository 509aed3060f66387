"""`launcher plan --gpus ...`: plans for other machines."""

from __future__ import annotations

import argparse
from typing import Any
from urllib.parse import urlparse

import pytest

from launcher.core.errors import ConfigError
from launcher.hardware.target_machines import TargetMachines, parse_size, read_options
from strategies.gpus import GIB, GPUS, find_gpu, recognize_gpu

_TENSOR_RATIO = {("v100", "t4", "mi"): 8, ("a100", "a30", "h"): 16, ("a10", "a40", "l4"): 4, ("rtx",): 2}


def read(**given: Any) -> TargetMachines | None:
    options = {"gpus": None, "gpus_per_node": None, "gpu": None, "gpu_memory": None, **given}
    return read_options(argparse.Namespace(**options))


def test_nothing_given_means_this_machine() -> None:
    assert read() is None


def test_a_named_gpu_has_memory_and_native_dtypes() -> None:
    found = read(gpus=64, gpus_per_node=8, gpu="H100")
    assert found is not None
    assert (found.gpus, found.gpus_per_node, found.nodes) == (64, 8, 8)
    assert found.hardware.device.memory_bytes == 80 * GIB
    assert "bf16" in found.hardware.device.native_dtypes
    v100 = read(gpus=1, gpu="v100")
    assert v100 is not None
    assert "bf16" not in v100.hardware.device.native_dtypes


def test_memory_alone_is_enough_and_overrides_the_table() -> None:
    found = read(gpus=2, gpu_memory="80GiB")
    assert found is not None
    assert (found.hardware.device.memory_bytes, found.gpus_per_node) == (80 * GIB, 2)
    half = read(gpus=2, gpu="h100", gpu_memory="40GB")
    assert half is not None
    assert half.hardware.device.memory_bytes == 40 * 10**9


def test_all_invalid_options_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        read(gpus=12, gpus_per_node=8, gpu="h10", gpu_memory="lots")
    paths = [problem.path for problem in caught.value.problems]
    assert paths == ["--gpus-per-node", "--gpu", "--gpu-memory"]
    assert "did you mean h100?" in str(caught.value)
    assert "'lots'" in str(caught.value)


@pytest.mark.parametrize(
    ("given", "path"),
    [({"gpu": "h100"}, "--gpus"), ({"gpus": 0, "gpu": "h100"}, "--gpus"), ({"gpus": 2}, "--gpu-memory"),
     ({"gpus": 2, "gpus_per_node": 0, "gpu": "h100"}, "--gpus-per-node")],
)  # fmt: skip
def test_incomplete_options_are_rejected(given: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(**given)
    assert [problem.path for problem in caught.value.problems] == [path]


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GiB", 80 << 30), ("80 GB", 80 * 10**9), ("16g", 16 * 10**9), ("1.5TiB", 3 << 39), ("1024", 1024),
     ("", None), ("GiB", None), ("-3GB", None), ("80 GiB each", None)],
)  # fmt: skip
def test_sizes_are_read(text: str, size: int | None) -> None:
    assert parse_size(text) == size


def test_the_table_is_complete() -> None:
    assert len({gpu.key for gpu in GPUS}) == len(GPUS)
    for gpu in GPUS:
        assert find_gpu(gpu.key) is gpu
        assert gpu.half_flops > gpu.fp32_flops > 1e12
        assert 10 * GIB < gpu.memory_bytes < 400 * GIB
        assert gpu.memory_bandwidth > gpu.link_bandwidth >= gpu.host_bandwidth > 1e9
        address = urlparse(gpu.source)
        assert address.scheme == "https"
        assert (address.hostname or "").endswith((".nvidia.com", ".amd.com"))
        # Tensor cores against plain ones, dense, as the architecture has them: a sparse peak would be twice that.
        expected = 30 if gpu.key == "b200" else next(n for keys, n in _TENSOR_RATIO.items() if gpu.key.startswith(keys))
        assert gpu.half_flops / gpu.fp32_flops == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
    ("name", "key"),
    [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-40GB", "a100-40gb"), ("Tesla V100-SXM2-32GB", "v100"),
     ("NVIDIA GeForce RTX 4090", "rtx4090"), ("NVIDIA L40S", "l40s"), ("NVIDIA L4", "l4"), ("Tesla T4", "t4")],
)  # fmt: skip
def test_a_drivers_name_is_recognized(name: str, key: str) -> None:
    found = recognize_gpu(name)
    assert found is not None
    assert found.key == key
    assert recognize_gpu("Quadro 600") is None
