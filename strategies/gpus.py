"""Common GPUs, for plans for other machines.

Numbers are the vendors' peaks from the data sheet of each: dense (no sparsity), tensor cores for fp16 and bf16 with
fp32 accumulation, other cores for fp32 (torch does not use TF32 by default), links in one direction. Where a sheet has
only sparse numbers (H100, H200, L4), or those of several dies or GPUs (MI250X, HGX B200), they are divided.
`tests/benchmarks/RESULTS.md` lists the comparisons.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from strategies.units import GIB

_TERA, _GIGA = 10**12, 10**9


@dataclass(frozen=True, slots=True)
class GpuSpec:
    """One GPU.

    Attributes:
        key: value of `--gpu`.
        native_dtypes: those of fp16, bf16, fp32, fp64 that it trains in without emulation.
        half_flops: peak FLOP/s in fp16 and, where native, bf16.
        fp32_flops: peak FLOP/s in fp32.
        link_bandwidth: bytes/s to the GPUs of the same node, one direction.
        host_bandwidth: bytes/s to host memory, one direction.
        source: URL of the vendor's data sheet, white paper or product page.
    """

    key: str
    name: str
    memory_bytes: int
    native_dtypes: tuple[str, ...]
    half_flops: float
    fp32_flops: float
    memory_bandwidth: float
    link_bandwidth: float
    host_bandwidth: float
    source: str


_FP16 = ("fp16", "fp32", "fp64")
_BF16 = ("bf16", "fp16", "fp32", "fp64")
_PCIE3, _PCIE4, _PCIE5 = 16, 32, 64  # x16, GB/s in one direction

_NVIDIA = "https://www.nvidia.com/content/dam/en-zz/Solutions/"
_V100 = "https://images.nvidia.com/content/technologies/volta/pdf/volta-v100-datasheet-update-us-1165301-r5.pdf"
_T4 = f"{_NVIDIA}Data-Center/tesla-t4/t4-tensor-core-datasheet-951643.pdf"
_A10 = f"{_NVIDIA}Data-Center/a10/pdf/a10-datasheet.pdf"
_A30 = f"{_NVIDIA}data-center/products/a30-gpu/pdf/a30-datasheet.pdf"
_A40 = "https://images.nvidia.com/content/Solutions/data-center/a40/nvidia-a40-datasheet.pdf"
_A100_40 = f"{_NVIDIA}Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf"
_A100_80 = f"{_NVIDIA}Data-Center/a100/pdf/nvidia-a100-datasheet-nvidia-us-2188504-web.pdf"
_L4 = "https://www.nvidia.com/en-us/data-center/l4/"
_L40S = "https://www.nvidia.com/en-us/data-center/l40s/"
_GA102 = "https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf"
_ADA = "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"
_H100 = "https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet"
_H200 = "https://www.nvidia.com/en-us/data-center/h200/"
_B200 = "https://images.nvidia.com/aem-dam/Solutions/documents/HGX-B200-PCF-Summary.pdf"
_MI250X = "https://www.amd.com/en/products/server-accelerators/instinct-mi250x"
_MI300X = (
    "https://www.amd.com/content/dam/amd/en/documents/instinct-tech-docs/data-sheets/amd-instinct-mi300x-data-sheet.pdf"
)


# In the data sheets' units: GiB, types, TFLOP/s in 16 and 32 bits, GB/s of memory, link and host.
_TABLE = (
    ("v100", "Tesla V100-SXM2-32GB", 32, _FP16, 125, 15.7, 900, 150, _PCIE3, _V100),
    ("v100-16gb", "Tesla V100-SXM2-16GB", 16, _FP16, 125, 15.7, 900, 150, _PCIE3, _V100),
    ("t4", "Tesla T4", 15, _FP16, 65, 8.1, 300, _PCIE3, _PCIE3, _T4),
    ("a10", "NVIDIA A10", 24, _BF16, 125, 31.2, 600, _PCIE4, _PCIE4, _A10),
    ("a30", "NVIDIA A30", 24, _BF16, 165, 10.3, 933, 100, _PCIE4, _A30),
    ("a40", "NVIDIA A40", 48, _BF16, 149.7, 37.4, 696, 56, _PCIE4, _A40),
    ("a100-40gb", "NVIDIA A100-SXM4-40GB", 40, _BF16, 312, 19.5, 1555, 300, _PCIE4, _A100_40),
    ("a100", "NVIDIA A100-SXM4-80GB", 80, _BF16, 312, 19.5, 2039, 300, _PCIE4, _A100_80),
    ("l4", "NVIDIA L4", 24, _BF16, 121, 30.3, 300, _PCIE4, _PCIE4, _L4),
    ("l40s", "NVIDIA L40S", 48, _BF16, 362, 91.6, 864, _PCIE4, _PCIE4, _L40S),
    ("rtx3090", "NVIDIA GeForce RTX 3090", 24, _BF16, 71, 35.6, 936, _PCIE4, _PCIE4, _GA102),
    ("rtx4090", "NVIDIA GeForce RTX 4090", 24, _BF16, 165, 82.6, 1008, _PCIE4, _PCIE4, _ADA),
    ("h100", "NVIDIA H100 80GB HBM3", 80, _BF16, 989, 67, 3350, 450, _PCIE5, _H100),
    ("h100-pcie", "NVIDIA H100 PCIe", 80, _BF16, 756, 51, 2000, 300, _PCIE5, _H100),
    ("h200", "NVIDIA H200", 141e9 / GIB, _BF16, 989, 67, 4800, 450, _PCIE5, _H200),
    ("b200", "NVIDIA B200", 180e9 / GIB, _BF16, 2250, 75, 7750, 900, _PCIE5, _B200),
    ("mi250x", "AMD Instinct MI250X (one die)", 64, _BF16, 191.5, 23.9, 1638, 100, _PCIE4, _MI250X),
    ("mi300x", "AMD Instinct MI300X", 192, _BF16, 1307, 163.4, 5300, 448, _PCIE5, _MI300X),
)  # fmt: skip
GPUS: tuple[GpuSpec, ...] = tuple(
    GpuSpec(key, name, int(gib * GIB), dtypes, half * _TERA, fp32 * _TERA, memory * _GIGA, link * _GIGA, host * _GIGA,
            source)
    for key, name, gib, dtypes, half, fp32, memory, link, host, source in _TABLE
)  # fmt: skip
# For a GPU that is not in the table.
TYPICAL = next(gpu for gpu in GPUS if gpu.key == "a100")


class UnknownGpuError(ValueError):
    """A `--gpu` that is not in the table."""


def find_gpu(key: str) -> GpuSpec:
    """The GPU with this key.

    Raises:
        UnknownGpuError: lists the nearest key, or all.
    """
    wanted = key.strip().lower().replace("_", "-").replace(" ", "")
    for gpu in GPUS:
        if wanted == gpu.key:
            return gpu
    known = [gpu.key for gpu in GPUS]
    close = difflib.get_close_matches(wanted, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}; any other: give --gpu-memory alone"
    raise UnknownGpuError(f"--gpu: given {key!r}; {hint}")


def recognize_gpu(name: str) -> GpuSpec | None:
    """The GPU with this name from a driver; None if it is not in the table."""
    plain = _plain(name)
    for gpu in sorted(GPUS, key=lambda g: -len(g.name)):
        if _plain(gpu.name) in plain:
            return gpu
    # A driver may omit the size of the memory: 'NVIDIA H100'.
    return next((gpu for gpu in GPUS if len(plain) > 2 and _plain(gpu.name).startswith(plain)), None)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("nvidia", "").replace("tesla", ""))
