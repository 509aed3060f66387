"""Reads facts of NVIDIA driver, torch build, GPUs and GPU links in a separate process, because a driver may hang.

`python -m launcher.doctor.gpu_probe` prints the facts as JSON.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from typing import Any

import torch
import torch.distributed as dist

from launcher.doctor.gpus import DRIVER_FILE, DetectedGpu, GpuFacts, Link
from launcher.hardware.devices import detect_hardware

_SMI_TIMEOUT_S = 20.0
_LINK_BYTES = 64 * 2**20
_LINK_COPIES = 3


def read_driver(text: str) -> str:
    """The driver version in the text of /proc/driver/nvidia/version; empty if there is none."""
    found = re.search(r"NVRM version:.*?\b(\d{3,}\.\d+(?:\.\d+)?)\b", text)
    return found[1] if found else ""


def read_facts() -> GpuFacts:
    """The facts of this machine, read in this process; initializes CUDA."""
    error = _nvidia_smi_error()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count and caught:
        error = error or str(caught[-1].message).splitlines()[0]
    return GpuFacts(
        driver=read_driver(DRIVER_FILE.read_text() if DRIVER_FILE.exists() else ""),
        driver_cuda=_read_driver_cuda(),
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        architectures=tuple(torch.cuda.get_arch_list()) if count else (),
        nccl=_nccl_version(),
        nccl_installed=_installed_nccl(torch.version.cuda),
        hidden_by=os.environ.get("CUDA_VISIBLE_DEVICES"),
        error=error,
        gpus=tuple(_read_gpu(index) for index in range(count)),
        links=tuple(_measure_link(one, other) for one in range(count) for other in range(one + 1, count)),
    )


def _nvidia_smi_error() -> str:
    """The error of `nvidia-smi`, for example after an update of the driver under the running kernel; else empty."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    try:
        done = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=_SMI_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi: {error}"
    return "" if done.returncode == 0 else (done.stdout + done.stderr).strip().partition("\n")[0]


def _read_driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA that the driver supports: cuDriverGetVersion of the CUDA driver API."""
    version = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) or not version.value:
            return None
    except (OSError, AttributeError):
        return None
    return version.value // 1000, version.value % 1000 // 10


def _nccl_version() -> str:
    if not dist.is_nccl_available():
        return ""
    import torch.cuda.nccl

    version: Any = torch.cuda.nccl.version()
    return ".".join(map(str, version[:3]))


def _installed_nccl(cuda: str | None) -> str:
    major = (cuda or "").partition(".")[0]
    try:
        return importlib.metadata.version(f"nvidia-nccl-cu{major}")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _read_gpu(index: int) -> DetectedGpu:
    device = detect_hardware("cuda", index).device
    free, _ = torch.cuda.mem_get_info(index)
    major, minor = torch.cuda.get_device_capability(index)
    return DetectedGpu(index, device.name, (major, minor), device.memory_bytes, free, device.native_dtypes)


def _measure_link(one: int, other: int) -> Link:
    peer = torch.cuda.can_device_access_peer(one, other) and torch.cuda.can_device_access_peer(other, one)
    try:
        ways = [_measure_copy(one, other), _measure_copy(other, one)]
    except torch.OutOfMemoryError:
        return Link(one, other, peer, None)  # in use: cannot be measured
    return Link(one, other, peer, min(speed for speed, _ in ways), all(exact for _, exact in ways))


def _measure_copy(source: int, target: int) -> tuple[float, bool]:
    """Bytes per second of the fastest copy, and whether the last copy is correct."""
    count = _LINK_BYTES // 4
    sent = torch.arange(count, dtype=torch.int32, device=f"cuda:{source}")
    received = torch.zeros(count, dtype=torch.int32, device=f"cuda:{target}")
    best = float("inf")
    # The first copy sets up the connection.
    for _ in range(1 + _LINK_COPIES):
        received.zero_()
        torch.cuda.synchronize(source)
        torch.cuda.synchronize(target)
        start = time.perf_counter()
        received.copy_(sent, non_blocking=True)
        torch.cuda.synchronize(source)
        torch.cuda.synchronize(target)
        best = min(best, time.perf_counter() - start)
    expected = torch.arange(count, dtype=torch.int32, device=f"cuda:{target}")
    return _LINK_BYTES / best, bool(torch.equal(received, expected))


if __name__ == "__main__":
    sys.stdout.write(json.dumps(dataclasses.asdict(read_facts())) + "\n")
