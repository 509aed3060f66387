"""`launcher.hardware.devices`: what this process has; only what cannot be on this machine is put in torch's place."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from launcher.core.errors import TopologyError
from launcher.hardware import devices
from launcher.hardware.devices import (
    BUILD_TOOLS,
    Hardware,
    available_kind,
    detect_hardware,
    device_count,
    library_versions,
)


def show_gpus(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> None:
    """Let torch show GPUs of these compute capabilities; as torch does, bf16 is there everywhere by emulation."""
    current = [0]

    @contextlib.contextmanager
    def device(index: int) -> object:
        current.append(index)
        yield
        current.pop()

    def is_bf16_supported(including_emulation: bool = True) -> bool:
        return including_emulation or capabilities[current[-1]][0] >= 8

    def properties(index: int) -> SimpleNamespace:
        major, minor = capabilities[index]
        return SimpleNamespace(name=f"GPU {major}.{minor}", total_memory=16 * 2**30, major=major, minor=minor)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)


def test_a_cpu_has_a_name_its_memory_and_no_native_half_precision() -> None:
    hardware = detect_hardware("cpu", local_rank=3)
    device = hardware.device
    assert (device.kind, device.index, hardware.local_device_count) == ("cpu", 0, 1)
    assert device.name
    assert device.memory_bytes == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert set(device.native_dtypes) == {"fp32", "fp64"}


def test_versions_are_those_of_the_installed_packages() -> None:
    versions = library_versions()
    assert versions["torch"] == importlib.metadata.version("torch")
    assert versions["lightning"] == importlib.metadata.version("lightning")
    assert versions["python"] == platform.python_version()
    assert {"torch", "lightning", "deepspeed", "python", *BUILD_TOOLS} == set(versions)


def test_a_library_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    keep = vars(devices)["_installed_version"]
    keep.cache_clear()
    assert library_versions()["deepspeed"] is None
    keep.cache_clear()


def test_the_version_of_an_imported_library_stays_when_another_one_is_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = library_versions()["torch"]
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.0.1")
    assert library_versions()["torch"] == before


def test_hardware_survives_json() -> None:
    hardware = detect_hardware("cpu", 0)
    assert Hardware.from_dict(json.loads(json.dumps(hardware.to_dict()))) == hardware


def test_auto_selects_the_cpu_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    show_gpus(monkeypatch)
    assert available_kind("auto") == "cpu"
    assert device_count("cpu") == 1


def test_auto_selects_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    show_gpus(monkeypatch, (9, 0))
    assert [available_kind(name) for name in ("auto", "gpu", "cuda", "cpu")] == ["cuda", "cuda", "cuda", "cpu"]


@pytest.mark.parametrize("accelerator", ["gpu", "cuda", "mps"])
def test_a_missing_accelerator_lists_those_of_this_machine(accelerator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    show_gpus(monkeypatch)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(TopologyError, match=f"'{accelerator}' was requested, but this machine has only cpu"):
        available_kind(accelerator)


def test_an_accelerator_that_does_not_exist_lists_the_valid_ones() -> None:
    with pytest.raises(TopologyError, match="'tpu' does not exist; valid are auto, cpu, gpu, cuda, mps"):
        available_kind("tpu")


@pytest.mark.parametrize(
    ("capability", "native"),
    [
        ((9, 0), {"fp16", "bf16", "fp32", "fp64"}),
        ((8, 0), {"fp16", "bf16", "fp32", "fp64"}),
        ((7, 0), {"fp16", "fp32", "fp64"}),
        ((5, 3), {"fp16", "fp32", "fp64"}),
        ((5, 2), {"fp32", "fp64"}),
    ],
)
def test_emulated_bf16_is_not_native(
    capability: tuple[int, int], native: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    show_gpus(monkeypatch, capability)
    hardware = detect_hardware("auto", 0)
    assert set(hardware.device.native_dtypes) == native
    assert (hardware.device.name, hardware.device.memory_bytes) == (f"GPU {capability[0]}.{capability[1]}", 2**34)


def test_each_rank_detects_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    show_gpus(monkeypatch, (9, 0), (7, 0))
    first, second = (detect_hardware("cuda", rank) for rank in range(2))
    assert ("bf16" in first.device.native_dtypes, "bf16" in second.device.native_dtypes) == (True, False)
    assert (second.device.index, second.local_device_count) == (1, 2)


@pytest.mark.parametrize(("count", "text"), [(1, "sees 1 CUDA device;"), (2, "sees 2 CUDA devices;")])
def test_more_ranks_than_gpus_is_an_error_with_both_numbers(
    count: int, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    show_gpus(monkeypatch, *[(9, 0)] * count)
    with pytest.raises(TopologyError) as caught:
        detect_hardware("cuda", local_rank=count)
    assert f"LOCAL_RANK={count}" in str(caught.value)
    assert text in str(caught.value)


def test_the_gpu_of_apple_has_no_native_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    show_gpus(monkeypatch)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    device = detect_hardware("auto", 0).device
    assert (device.kind, set(device.native_dtypes)) == ("mps", {"fp16", "fp32"})


def test_build_tools_are_found_as_in_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [library_versions()[tool] for tool in BUILD_TOOLS] == [None, None]
    for name in ("my-c++", "ninja"):
        (tmp_path / name).touch(mode=0o700)
    monkeypatch.setenv("CXX", "my-c++")
    assert [library_versions()[tool] for tool in BUILD_TOOLS] == [str(tmp_path / "my-c++"), str(tmp_path / "ninja")]
