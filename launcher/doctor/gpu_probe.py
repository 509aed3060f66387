"""Looks at NVIDIA driver, torch build, GPUs and the links between them, in a process of its own: a driver may hang.

`python -m launcher.doctor.gpu_probe` prints the facts as JSON.
"""

from __future__ import annotations

import contextlib
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
from pathlib import Path
from typing import Any

from launcher.core.own_modules import module_command
from launcher.doctor.gpus import DetectedGpu, GpuFacts, Link

_DRIVER_FILE = Path("/proc/driver/nvidia/version")
_SMI_TIMEOUT_S = 20.0
_LINK_BYTES = 64 * 2**20
_LINK_COPIES = 3


def has_nvidia_driver(file: Path = _DRIVER_FILE) -> bool:
    """Whether an NVIDIA driver is on this machine, whatever torch says."""
    return file.exists() or shutil.which("nvidia-smi") is not None


def probe_gpus(timeout: float) -> GpuFacts:
    """Look, in another process.

    Args:
        timeout: seconds.

    Raises:
        TimeoutError: the driver did not answer.
        RuntimeError: the other process ended without an answer; with its last line.
    """
    words = module_command("launcher.doctor.gpu_probe")
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"the NVIDIA driver did not answer within {timeout:g} s") from None
    with contextlib.suppress(ValueError, KeyError, TypeError, IndexError):
        return GpuFacts.from_dict(json.loads(done.stdout.splitlines()[-1]))
    said = (done.stderr or done.stdout).strip().splitlines()
    raise RuntimeError(f"looking at the GPUs ended with exit code {done.returncode}: {said[-1] if said else 'no word'}")


def read_driver(text: str) -> str:
    """The version in /proc/driver/nvidia/version; empty if there is none."""
    found = re.search(r"NVRM version:.*?\b(\d{3,}\.\d+(?:\.\d+)?)\b", text)
    return found[1] if found else ""


def look() -> GpuFacts:
    """The facts of this machine, found in this process; initialises CUDA."""
    import warnings

    import torch

    said = _smi_complaint()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count and caught:
        said = said or str(caught[-1].message).splitlines()[0]
    return GpuFacts(
        driver=read_driver(_DRIVER_FILE.read_text() if _DRIVER_FILE.exists() else ""),
        driver_cuda=_driver_cuda(),
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        architectures=tuple(torch.cuda.get_arch_list()) if count else (),
        nccl=_nccl(),
        nccl_installed=_nccl_installed(torch.version.cuda),
        hidden_by=os.environ.get("CUDA_VISIBLE_DEVICES"),
        said=said,
        gpus=tuple(_gpu(index) for index in range(count)),
        links=tuple(_link(one, other) for one in range(count) for other in range(one + 1, count)),
    )


def _smi_complaint() -> str:
    """What `nvidia-smi` says where it fails, as of a driver that was updated under the running kernel."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    try:
        done = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=_SMI_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi: {error}"
    return "" if done.returncode == 0 else (done.stdout + done.stderr).strip().partition("\n")[0]


def _driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA of the driver's library: cuDriverGetVersion of CUDA's driver API."""
    version = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) or not version.value:
            return None
    except (OSError, AttributeError):
        return None
    return version.value // 1000, version.value % 1000 // 10


def _nccl() -> str:
    import torch.distributed as dist

    if not dist.is_nccl_available():
        return ""
    import torch.cuda.nccl

    version: Any = torch.cuda.nccl.version()
    return ".".join(map(str, version[:3]))


def _nccl_installed(cuda: str | None) -> str:
    major = (cuda or "").partition(".")[0]
    try:
        return importlib.metadata.version(f"nvidia-nccl-cu{major}")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _gpu(index: int) -> DetectedGpu:
    import torch

    from launcher.hardware.devices import detect_hardware

    device = detect_hardware("cuda", index).device
    free, _ = torch.cuda.mem_get_info(index)
    major, minor = torch.cuda.get_device_capability(index)
    return DetectedGpu(index, device.name, (major, minor), device.memory_bytes, free, device.native_dtypes)


def _link(one: int, other: int) -> Link:
    import torch

    peer = torch.cuda.can_device_access_peer(one, other) and torch.cuda.can_device_access_peer(other, one)
    try:
        ways = [_copy(one, other), _copy(other, one)]
    except torch.OutOfMemoryError:
        return Link(one, other, peer, None)  # in use: nothing is measured
    return Link(one, other, peer, min(speed for speed, _ in ways), all(exact for _, exact in ways))


def _copy(source: int, target: int) -> tuple[float, bool]:
    """Bytes per second of the fastest of some copies, and whether the last arrived as it was."""
    import torch

    count = _LINK_BYTES // 4
    there = torch.arange(count, dtype=torch.int32, device=f"cuda:{source}")
    here = torch.zeros(count, dtype=torch.int32, device=f"cuda:{target}")
    best = float("inf")
    # The first sets the way up.
    for _ in range(1 + _LINK_COPIES):
        here.zero_()
        torch.cuda.synchronize(source)
        torch.cuda.synchronize(target)
        began = time.perf_counter()
        here.copy_(there, non_blocking=True)
        torch.cuda.synchronize(source)
        torch.cuda.synchronize(target)
        best = min(best, time.perf_counter() - began)
    expected = torch.arange(count, dtype=torch.int32, device=f"cuda:{target}")
    return _LINK_BYTES / best, bool(torch.equal(here, expected))


if __name__ == "__main__":
    sys.stdout.write(json.dumps(dataclasses.asdict(look())) + "\n")
