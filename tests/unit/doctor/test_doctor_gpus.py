"""Findings about GPUs, for facts of other machines."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from launcher.doctor import gpu_probe, gpus
from launcher.doctor.gpus import DetectedGpu, GpuFacts, Link, gpu_findings, has_kernels

GIB = 2**30
CU128 = ("sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
CU130 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_110", "sm_120", "compute_120")
H100 = DetectedGpu(0, "NVIDIA H100 80GB HBM3", (9, 0), 80 * GIB, 79 * GIB, ("fp32", "fp64", "fp16", "bf16"))
V100 = DetectedGpu(0, "Tesla V100-SXM2-16GB", (7, 0), 16 * GIB, 16 * GIB, ("fp32", "fp64", "fp16"))
B200 = DetectedGpu(0, "NVIDIA B200", (10, 0), 180 * GIB, 179 * GIB, ("fp32", "fp64", "fp16", "bf16"))


def links(count: int, speed: float = 360e9, peer: bool = True) -> tuple[Link, ...]:
    return tuple(Link(a, b, peer, speed) for a in range(count) for b in range(a + 1, count))


def machine(gpu: DetectedGpu = H100, count: int = 8, **more: object) -> GpuFacts:
    facts = GpuFacts("570.86.15", (12, 8), "2.10.0+cu128", "12.8", CU128, "2.27.5", "2.27.5")
    gpus = tuple(dataclasses.replace(gpu, index=i) for i in range(count))
    return dataclasses.replace(facts, **{"gpus": gpus, "links": links(count), **more})  # type: ignore[arg-type]


def all_lines(facts: GpuFacts) -> list[tuple[str, str, str, str]]:
    findings = list(gpu_findings(facts))
    assert all(bool(f.advice) == (f.status != "ok") for f in findings), "every problem has advice"
    return [(f.name, f.status, f.found, f.advice) for f in findings]


def problems(facts: GpuFacts) -> list[tuple[str, str, str, str]]:
    return [line for line in all_lines(facts) if line[1] != "ok"]


def test_a_healthy_node_of_eight() -> None:
    lines = all_lines(machine())
    assert {line[1] for line in lines} == {"ok"}
    assert [line[0] for line in lines] == ["CUDA", "NCCL", *(f"cuda {i}" for i in range(8)), "GPU links"]
    assert lines[0][2] == "driver 570.86.15, CUDA up to 12.8; torch 2.10.0+cu128 is built for CUDA 12.8"
    assert "native: fp32, fp64, fp16, bf16, compute capability 9.0" in lines[2][2]
    assert lines[-1][2] == "0-1, 0-2, 0-3, 0-4, 0-5, 0-6 and 22 more: peer access, 360 GB/s"


def test_a_driver_of_the_same_major_version_runs_a_later_minor_one() -> None:
    assert problems(machine(driver="535.129.03", driver_cuda=(12, 2))) == []


@pytest.mark.parametrize(
    ("driver", "supported", "cuda", "needs"),
    [
        ("470.223.02", (11, 4), "12.8", "525.60.13"),
        ("525.60.12", (12, 0), "12.8", "525.60.13"),
        ("570.86.15", (12, 8), "13.0", "580.65.6"),
        ("440.33.01", (10, 2), "11.8", "450.80.2"),
    ],
)
def test_a_driver_that_is_too_old_for_torch(driver: str, supported: tuple[int, int], cuda: str, needs: str) -> None:
    facts = machine(
        count=0, driver=driver, driver_cuda=supported, torch_cuda=cuda, error="The NVIDIA driver is too old"
    )
    ((name, status, found, advice),) = all_lines(facts)
    assert (name, status) == ("CUDA", "failure")
    assert found.endswith(f"is built for CUDA {cuda}, which needs a newer driver")
    assert advice == f"update the driver to {needs} or later, or install torch for an older CUDA"


def test_a_driver_of_unknown_version_is_judged_by_its_cuda() -> None:
    ((_, status, _, advice),) = all_lines(machine(count=0, driver="", driver_cuda=(12, 4), torch_cuda="13.0"))
    assert (status, advice) == ("failure", "update the driver to one for CUDA 13, or install torch for CUDA 12")


@pytest.mark.parametrize(
    ("more", "status", "found", "advice"),
    [
        ({"torch": "2.10.0+cpu", "torch_cuda": None}, "failure", "is a build without CUDA",
         "install a CUDA build of torch"),
        ({"error": "Failed to initialize NVML: Driver/library version mismatch"}, "failure", "version mismatch",
         "reboot"),
        ({"hidden_by": ""}, "warning", "CUDA_VISIBLE_DEVICES='' leaves no GPU", "unset it"),
        ({"error": "CUDA unknown error"}, "failure", "but torch sees no GPU: CUDA unknown error", "--gpus all"),
    ],
)  # fmt: skip
def test_no_gpu_is_seen(more: dict[str, object], status: str, found: str, advice: str) -> None:
    ((name, *line),) = all_lines(machine(count=0, **more))
    assert (name, line[0]) == ("CUDA", status)
    assert found in line[1]
    assert advice in line[2]


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((8, 9), CU128, True),  # sm_86 runs on Ada
        ((6, 1), CU128, False),
        ((7, 0), CU130, False),
        ((9, 0), ("sm_90a",), True),
        ((10, 0), ("sm_90a",), False),
        ((10, 3), ("sm_100f",), True),
        ((12, 1), CU130, True),
        ((13, 0), CU130, True),  # PTX is compiled for it
        ((13, 0), CU128, False),
        ((8, 0), ("sm_86",), False),
        ((8, 0), ("nonsense", "sm_80"), True),
    ],
)
def test_kernels_for_a_gpu(capability: tuple[int, int], built: tuple[str, ...], runs: bool) -> None:
    assert has_kernels(capability, built) == runs


def test_a_gpu_without_kernels_and_a_gpu_in_use_are_reported() -> None:
    old, taken = problems(machine(count=0, architectures=CU130, gpus=(
        V100, dataclasses.replace(H100, index=1, free_bytes=30 * GIB), H100)))[:2]  # fmt: skip
    assert old[:2] == ("cuda 0", "failure")
    assert "has no kernels for it" in old[2]
    assert "sm_75" in old[3]
    assert taken[:2] == ("cuda 1", "warning")
    assert "50 GiB are in use" in taken[2]


def test_different_gpus_are_a_warning() -> None:
    ((name, status, found, _),) = problems(machine(count=0, gpus=(H100, V100)))
    assert (name, status, found) == ("GPUs", "warning", "different models: NVIDIA H100 80GB HBM3, Tesla V100-SXM2-16GB")


@pytest.mark.parametrize(
    ("gpu", "count", "nccl", "installed", "status"),
    [
        (H100, 8, "2.27.5", "2.27.5", "ok"),
        (H100, 8, "2.27.5", "", "ok"),
        (H100, 8, "2.18.1", "2.27.5", "warning"),
        (B200, 8, "2.21.5", "2.21.5", "failure"),
        (B200, 8, "2.25.1", "2.25.1", "ok"),
        (H100, 8, "", "", "warning"),
        (H100, 1, "", "", "ok"),
    ],
)
def test_nccl(gpu: DetectedGpu, count: int, nccl: str, installed: str, status: str) -> None:
    (line,) = [
        line for line in all_lines(machine(gpu, count, nccl=nccl, nccl_installed=installed)) if line[0] == "NCCL"
    ]
    assert line[1] == status


def test_a_slow_link_is_reported_and_pairs_over_pcie_are_not() -> None:
    slow = tuple(dataclasses.replace(li, bytes_per_second=8e9) if (li.one, li.other) == (2, 5) else li
                 for li in links(8))  # fmt: skip
    ((name, status, found, advice),) = problems(machine(links=slow))
    assert (name, status) == ("GPU links", "warning")
    assert found == "2-5: peer access, 8 GB/s, the median is 360 GB/s"
    assert "nvidia-smi topo -m" in advice
    # Two pairs with NVLink in a machine where the rest goes over PCIe.
    bridged = {(0, 1), (2, 3)}
    mixed = tuple(Link(a, b, (a, b) in bridged, 200e9 if (a, b) in bridged else 12e9)
                  for a in range(4) for b in range(a + 1, 4))  # fmt: skip
    assert problems(machine(count=4, links=mixed)) == []
    assert [line[2] for line in all_lines(machine(count=4, links=mixed)) if line[0] == "GPU links"] == [
        "0-1, 2-3: peer access, 200 GB/s",
        "0-2, 0-3, 1-2, 1-3: through host memory, 12 GB/s",
    ]


def test_corrupted_copies_are_a_failure() -> None:
    bad = (dataclasses.replace(links(2)[0], exact=False),)
    ((_, status, found, advice),) = problems(machine(count=2, links=bad))
    assert (status, found) == ("failure", "copies between GPUs 0-1 are corrupted")
    assert "NCCL_P2P_DISABLE=1" in advice


def test_a_link_that_was_not_measured_has_no_speed() -> None:
    lines = all_lines(machine(count=2, links=(Link(0, 1, False, None),)))
    assert lines[-1][2] == "0-1: through host memory"


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19\nGCC version:  11.4.0", "535.129.03"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (dvs-builder@U16)",
         "570.86.15"),
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65  Wed", "580.65"),
        ("", ""),
    ],
)  # fmt: skip
def test_the_driver_version_is_read_from_the_kernel(text: str, version: str) -> None:
    assert gpu_probe.read_driver(text) == version


def test_facts_survive_json() -> None:
    facts = machine(count=2)
    assert GpuFacts.from_dict(json.loads(json.dumps(dataclasses.asdict(facts)))) == facts
    bare = machine(count=0, driver_cuda=None)
    assert GpuFacts.from_dict(json.loads(json.dumps(dataclasses.asdict(bare)))) == bare


def test_a_driver_that_hangs_or_kills_the_probe_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(TimeoutError, match=r"the NVIDIA driver did not answer within 0\.2 s"):
        gpus.probe_gpus(0.2)
    program.write_text("#!/bin/sh\necho noise; echo 'Xid 79: GPU has fallen off the bus' >&2; exit 3\n")
    with pytest.raises(RuntimeError, match="exit code 3: Xid 79: GPU has fallen off the bus"):
        gpus.probe_gpus(30)


@pytest.mark.slow
def test_the_probe_reads_this_machine() -> None:
    import torch

    facts = gpus.probe_gpus(120)
    assert facts.torch == torch.__version__
    assert facts.torch_cuda == torch.version.cuda
    assert len(facts.gpus) == torch.cuda.device_count()
