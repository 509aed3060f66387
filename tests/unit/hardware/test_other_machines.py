"""`launcher plan --gpus ...`: plans for other machines."""

from __future__ import annotations

import argparse
from typing import Any
from urllib.parse import urlparse

import pytest

from launcher.core.errors import ConfigError
from launcher.hardware.target_machines import TargetMachines, parse_size, read_options
from strategies.gpus import GIB, GPUS, UnknownGpuError, find_gpu, recognize_gpu

# Speed in 16 bits relative to 32 bits; the first that fits a key counts.
_TENSOR_RATIO = {("b200", "gb200", "b300"): 30, ("h100-nvl", "h200-nvl"): 14, ("a10g",): 2, ("l40s",): 4, ("l40",): 2,
                 ("rtxa6000", "rtx6000ada"): 4, ("mi355x",): 16, ("v100", "t4", "mi"): 8,
                 ("a100", "a30", "h", "gh"): 16,
                 ("a10", "a40", "l4"): 4, ("rtx",): 2}  # fmt: skip


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
    assert "the closest are h100" in str(caught.value)
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
    [("80GiB", 80 << 30), ("80 GB", 80 * 10**9), ("16g", 16 * 10**9), ("1.5TiB", 3 << 39), ("1024", None),
     ("80B", None), ("", None), ("GiB", None), ("-3GB", None), ("80 GiB each", None)],
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
        assert (address.hostname or "").endswith((".nvidia.com", ".amd.com", ".awsstatic.com"))
        # Tensor cores against plain ones, dense, as the architecture has them: a sparse peak would be twice that.
        expected = next(n for keys, n in _TENSOR_RATIO.items() if gpu.key.startswith(keys))
        assert gpu.half_flops / gpu.fp32_flops == pytest.approx(expected, rel=0.1)


# Names as `nvidia-smi -L`, `rocm-smi` or torch print them, by key.
NAMES = {
    "v100": ("Tesla V100-SXM2-32GB", "Tesla V100-SXM3-32GB"),
    "v100-16gb": ("Tesla V100-SXM2-16GB",),
    "v100-pcie": ("Tesla V100-PCIE-32GB",),
    "v100-pcie-16gb": ("Tesla V100-PCIE-16GB",),
    "t4": ("Tesla T4",),
    "a10": ("NVIDIA A10",),
    "a10g": ("NVIDIA A10G",),
    "a30": ("NVIDIA A30",),
    "a40": ("NVIDIA A40",),
    "a100": ("NVIDIA A100-SXM4-80GB", "A100-SXM4-80GB", "A100-SXM-80GB"),
    "a100-40gb": ("NVIDIA A100-SXM4-40GB", "A100-SXM4-40GB"),
    "a100-pcie": ("NVIDIA A100 80GB PCIe",),
    "a100-pcie-40gb": ("NVIDIA A100-PCIE-40GB", "A100-PCIE-40GB"),
    "l4": ("NVIDIA L4",),
    "l40": ("NVIDIA L40",),
    "l40s": ("NVIDIA L40S",),
    "rtx3090": ("NVIDIA GeForce RTX 3090", "GeForce RTX 3090"),
    "rtx4090": ("NVIDIA GeForce RTX 4090",),
    "rtx5090": ("NVIDIA GeForce RTX 5090",),
    "rtxa6000": ("NVIDIA RTX A6000", "RTX A6000"),
    "rtx6000ada": ("NVIDIA RTX 6000 Ada Generation",),
    "h100": ("NVIDIA H100 80GB HBM3", "NVIDIA H100"),
    "h100-pcie": ("NVIDIA H100 PCIe",),
    "h100-nvl": ("NVIDIA H100 NVL",),
    "h200": ("NVIDIA H200",),
    "h200-nvl": ("NVIDIA H200 NVL",),
    "gh200": ("NVIDIA GH200 480GB",),
    "b200": ("NVIDIA B200",),
    "gb200": ("NVIDIA GB200",),
    "b300": ("NVIDIA B300 SXM6 AC",),
    "mi250x": ("AMD Instinct MI250X",),
    "mi300x": ("AMD Instinct MI300X",),
    "mi325x": ("AMD Instinct MI325X",),
    "mi355x": ("AMD Instinct MI355X",),
}
SPELLINGS = {
    "v100": ("v100", "V100-32GB", "tesla v100"),
    "a100": ("a100-80gb", "A100 80GB", "a100_80gb", "A100-80G", "a100 80 GiB", "A100-SXM", "a100sxm4", "nvidia a100"),
    "a100-40gb": ("A100 40GB", "a100_40gb", "A100-SXM-40GB"),
    "a100-pcie": ("a100 pcie", "A100-PCIe-80GB"),
    "h100": ("H100", "h100-sxm", "H100 SXM5", "h100-sxm5-80gb", "h100-80gb"),
    "h100-nvl": ("h100nvl", "H100-NVL-94GB"),
    "h200": ("H200 141GB", "h200-sxm"),
    "rtx4090": ("rtx 4090", "RTX4090", "4090", "rtx-4090", "GeForce RTX 4090"),
    "rtxa6000": ("a6000", "rtx-a6000", "RTXA6000"),
    "rtx6000ada": ("RTX 6000 Ada", "rtx6000-ada"),
    "t4": ("T4", "T4 16GB"),
    "gb200": ("GB200 NVL72",),
    "b200": ("B200 SXM6", "b200-180gb"),
    "mi300x": ("MI300X", "mi300x-192gb", "instinct mi300x"),
}  # fmt: skip


def test_every_gpu_has_a_name_in_this_test() -> None:
    assert set(NAMES) == {gpu.key for gpu in GPUS}


@pytest.mark.parametrize("key", NAMES)
def test_name_of_a_driver_is_recognized_and_accepted(key: str) -> None:
    for name in NAMES[key]:
        found = recognize_gpu(name)
        assert found is not None, name
        assert found.key == key
        for spelling in (
            name,
            name.lower(),
            name.upper(),
            name.replace(" ", "-"),
            f"  {name} ",
            name.replace("-", "_"),
        ):
            assert find_gpu(spelling).key == key, spelling


@pytest.mark.parametrize(("key", "text"), [(key, text) for key, texts in SPELLINGS.items() for text in texts])
def test_common_spelling_is_accepted(key: str, text: str) -> None:
    assert find_gpu(text).key == key


@pytest.mark.parametrize(
    ("name", "key"),
    [("NVIDIA A100-SXM-64GB", "a100"), ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "a100-40gb"), ("Quadro 600", None),
     ("NVIDIA GeForce RTX 3090 Ti", "rtx3090"), ("NVIDIA H100 96GB HBM3", "h100"), ("GPU", None), ("", None)],
)  # fmt: skip
def test_variant_of_a_driver_is_recognized_by_its_model(name: str, key: str | None) -> None:
    found = recognize_gpu(name)
    assert (None if found is None else found.key) == key


@pytest.mark.parametrize(
    ("text", "closest"),
    [("h10", "h100"), ("a100-64gb", "a100"), ("NVIDIA A100-PG509-200", "a100"), ("RTX 4080", "rtx4090"),
     ("l40x", "l40"), ("mi300", "mi300x"), ("H20", "h200")],
)  # fmt: skip
def test_unknown_gpu_is_answered_with_the_closest_and_with_gpu_memory(text: str, closest: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(gpus=2, gpu=text)
    message = str(caught.value)
    assert repr(text) in message
    assert closest in message.partition("the closest are ")[2].partition(";")[0].split(", ")
    assert "--gpu-memory 80GiB" in message


def test_gpu_like_none_is_answered_with_all() -> None:
    with pytest.raises(UnknownGpuError, match=r"known are v100, .*, mi355x; .*--gpu-memory 80GiB"):
        find_gpu("TPU")


@pytest.mark.parametrize(
    ("text", "meant"),
    [("80", "80GiB"), ("80B", "80GiB"), (" 24 ", "24GiB"), ("1.5", "1.5GiB"), ("85899345920", "80GiB")],
)
def test_size_without_a_unit_is_an_error_that_suggests_one(text: str, meant: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(gpus=2, gpu_memory=text)
    assert f"given {text!r}; a size needs a unit: did you mean {meant}?" in str(caught.value)
