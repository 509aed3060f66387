"""Common GPUs, for plans for other machines.

Numbers are the vendors' peaks from the data sheet of each: dense (no sparsity), tensor cores for fp16 and bf16 with
fp32 accumulation, other cores for fp32 (torch does not use TF32 by default), links in one direction. Where a sheet has
only sparse numbers (H100, H200, L4, RTX 6000), or those of several dies or GPUs (MI250X, HGX B200 and B300, GB200),
they are divided.
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
_A10G = "https://d1.awsstatic.com/product-marketing/ec2/NVIDIA_AWS_A10G_DataSheet_FINAL_02_17_2022.pdf"
_L4 = "https://www.nvidia.com/en-us/data-center/l4/"
_L40 = "https://www.nvidia.com/en-us/data-center/l40/"
_L40S = "https://www.nvidia.com/en-us/data-center/l40s/"
_GA102 = "https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf"
_ADA = "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"
_RTX6000 = "https://www.nvidia.com/en-us/design-visualization/rtx-6000/"
_GB202 = "https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf"
_H100 = "https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet"
_H200 = "https://www.nvidia.com/en-us/data-center/h200/"
_GH200 = "https://resources.nvidia.com/en-us-grace-cpu/grace-hopper-superchip"
_B200 = "https://images.nvidia.com/aem-dam/Solutions/documents/HGX-B200-PCF-Summary.pdf"
_GB200 = "https://www.nvidia.com/en-us/data-center/gb200-nvl72/"
_B300 = "https://www.nvidia.com/en-us/data-center/hgx/"
_MI250X = "https://www.amd.com/en/products/server-accelerators/instinct-mi250x"
_MI300X = (
    "https://www.amd.com/content/dam/amd/en/documents/instinct-tech-docs/data-sheets/amd-instinct-mi300x-data-sheet.pdf"
)
_MI325X = "https://www.amd.com/en/products/accelerators/instinct/mi300/mi325x.html"
_MI355X = "https://www.amd.com/en/products/accelerators/instinct/mi350/mi355x.html"


# In the data sheets' units: GiB, types, TFLOP/s in 16 and 32 bits, GB/s of memory, link and host. Names are those that
# `nvidia-smi` or torch prints. Of several variants the first is the one that a name without further terms means.
_TABLE = (
    ("v100", "Tesla V100-SXM2-32GB", 32, _FP16, 125, 15.7, 900, 150, _PCIE3, _V100),
    ("v100-16gb", "Tesla V100-SXM2-16GB", 16, _FP16, 125, 15.7, 900, 150, _PCIE3, _V100),
    ("v100-pcie", "Tesla V100-PCIE-32GB", 32, _FP16, 112, 14, 900, _PCIE3, _PCIE3, _V100),
    ("v100-pcie-16gb", "Tesla V100-PCIE-16GB", 16, _FP16, 112, 14, 900, _PCIE3, _PCIE3, _V100),
    ("t4", "Tesla T4", 15, _FP16, 65, 8.1, 300, _PCIE3, _PCIE3, _T4),
    ("a10", "NVIDIA A10", 24, _BF16, 125, 31.2, 600, _PCIE4, _PCIE4, _A10),
    ("a10g", "NVIDIA A10G", 24, _BF16, 70, 35, 600, _PCIE4, _PCIE4, _A10G),
    ("a30", "NVIDIA A30", 24, _BF16, 165, 10.3, 933, 100, _PCIE4, _A30),
    ("a40", "NVIDIA A40", 48, _BF16, 149.7, 37.4, 696, 56, _PCIE4, _A40),
    ("a100", "NVIDIA A100-SXM4-80GB", 80, _BF16, 312, 19.5, 2039, 300, _PCIE4, _A100_80),
    ("a100-40gb", "NVIDIA A100-SXM4-40GB", 40, _BF16, 312, 19.5, 1555, 300, _PCIE4, _A100_40),
    ("a100-pcie", "NVIDIA A100 80GB PCIe", 80, _BF16, 312, 19.5, 1935, 300, _PCIE4, _A100_80),
    ("a100-pcie-40gb", "NVIDIA A100-PCIE-40GB", 40, _BF16, 312, 19.5, 1555, 300, _PCIE4, _A100_40),
    ("l4", "NVIDIA L4", 24, _BF16, 121, 30.3, 300, _PCIE4, _PCIE4, _L4),
    ("l40", "NVIDIA L40", 48, _BF16, 181, 90.5, 864, _PCIE4, _PCIE4, _L40),
    ("l40s", "NVIDIA L40S", 48, _BF16, 362, 91.6, 864, _PCIE4, _PCIE4, _L40S),
    ("rtx3090", "NVIDIA GeForce RTX 3090", 24, _BF16, 71, 35.6, 936, _PCIE4, _PCIE4, _GA102),
    ("rtx4090", "NVIDIA GeForce RTX 4090", 24, _BF16, 165, 82.6, 1008, _PCIE4, _PCIE4, _ADA),
    ("rtx5090", "NVIDIA GeForce RTX 5090", 32, _BF16, 209.5, 104.8, 1792, _PCIE5, _PCIE5, _GB202),
    ("rtxa6000", "NVIDIA RTX A6000", 48, _BF16, 154.8, 38.7, 768, 56, _PCIE4, _GA102),
    ("rtx6000ada", "NVIDIA RTX 6000 Ada Generation", 48, _BF16, 364, 91.1, 960, _PCIE4, _PCIE4, _RTX6000),
    ("h100", "NVIDIA H100 80GB HBM3", 80, _BF16, 989, 67, 3350, 450, _PCIE5, _H100),
    ("h100-pcie", "NVIDIA H100 PCIe", 80, _BF16, 756, 51, 2000, 300, _PCIE5, _H100),
    ("h100-nvl", "NVIDIA H100 NVL", 94e9 / GIB, _BF16, 835, 60, 3900, 300, _PCIE5, _H100),
    ("h200", "NVIDIA H200", 141e9 / GIB, _BF16, 989, 67, 4800, 450, _PCIE5, _H200),
    ("h200-nvl", "NVIDIA H200 NVL", 141e9 / GIB, _BF16, 835, 60, 4800, 450, _PCIE5, _H200),
    ("gh200", "NVIDIA GH200 480GB", 96e9 / GIB, _BF16, 990, 67, 4000, 450, 450, _GH200),
    ("b200", "NVIDIA B200", 180e9 / GIB, _BF16, 2250, 75, 7750, 900, _PCIE5, _B200),
    ("gb200", "NVIDIA GB200", 186e9 / GIB, _BF16, 2500, 80, 8000, 900, 450, _GB200),
    ("b300", "NVIDIA B300 SXM6 AC", 288e9 / GIB, _BF16, 2250, 75, 8000, 900, _PCIE5, _B300),
    ("mi250x", "AMD Instinct MI250X (one die)", 64, _BF16, 191.5, 23.9, 1638, 100, _PCIE4, _MI250X),
    ("mi300x", "AMD Instinct MI300X", 192, _BF16, 1307, 163.4, 5300, 448, _PCIE5, _MI300X),
    ("mi325x", "AMD Instinct MI325X", 256, _BF16, 1307, 163.4, 6000, 448, _PCIE5, _MI325X),
    ("mi355x", "AMD Instinct MI355X", 288e9 / GIB, _BF16, 2516, 157.3, 8000, 537, _PCIE5, _MI355X),
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


# Terms of a name that do not distinguish GPUs.
_NOISE = {"nvidia", "amd", "tesla", "geforce", "instinct", "gpu", "generation", "ac", "one", "die", "oam", "tensor",
          "core", "superchip", "nvl72", "hbm2", "hbm2e", "hbm3", "hbm3e", "gddr6", "gddr6x", "gddr7"}  # fmt: skip
# Parts that are also written without a space: 'RTX4090', 'a100sxm'.
_PARTS = re.compile(r"(rtx|sxm|pcie|ada|(?<=[0-9])nvl(?![0-9]))")
_MEMORY = re.compile(r"(?<![a-z0-9])([0-9]+) ?(?:gib|gb|g)(?![a-z0-9])")
_VARIANTS = {"sxm", "pcie", "nvl", "rtx"}
_SXM_LINK = 150e9  # GPUs with slower links are cards


def find_gpu(text: str) -> GpuSpec:
    """The GPU of a key, of the name that a driver prints, or of another common spelling: 'A100-80GB', 'rtx 4090'.

    Raises:
        UnknownGpuError: lists the closest keys.
    """
    found = _match(_read_terms(text))
    if found is not None:
        return found
    same_model = [gpu.key for gpu in GPUS if _read_model(gpu) <= _read_terms(text)]
    spellings = {spelling: gpu.key for gpu in GPUS for spelling in (_plain(gpu.key), _plain(gpu.name))}
    similar = difflib.get_close_matches(_plain(text), spellings, n=6, cutoff=0.55)
    keys = list(dict.fromkeys([*same_model, *(spellings[spelling] for spelling in similar)]))[:4]
    hint = f"the closest are {', '.join(keys)}" if keys else f"known are {', '.join(gpu.key for gpu in GPUS)}"
    raise UnknownGpuError(f"given {text!r}; {hint}; for any other GPU give its memory, as in --gpu-memory 80GiB")


def recognize_gpu(name: str) -> GpuSpec | None:
    """The GPU with this name from a driver; None if it is not in the table."""
    terms = _read_terms(name)
    # The driver knows the memory, so a variant with another size will do.
    found = _match(terms) or _match({term for term in terms if not _MEMORY.fullmatch(term)})
    if found is not None:
        return found
    plain = _plain(name)
    return next((gpu for gpu in sorted(GPUS, key=lambda g: -len(g.name)) if _plain(gpu.name) in plain), None)


def _match(terms: set[str]) -> GpuSpec | None:
    """The first GPU of the table whose model is in the terms, and that has all other terms."""
    for gpu in GPUS:
        known = _read_terms(gpu.name) | _read_terms(gpu.key)
        known |= {f"{round(gpu.memory_bytes / unit)}gb" for unit in (GIB, _GIGA)}
        if not known & {"pcie", "nvl"}:
            known.add("sxm" if gpu.link_bandwidth >= _SXM_LINK else "pcie")
        if _read_model(gpu) <= terms <= known | {"rtx"}:
            return gpu
    return None


def _read_model(gpu: GpuSpec) -> set[str]:
    """The terms of the model, without its variant: {'a100'}."""
    return {term for term in _read_terms(gpu.key) - _VARIANTS if not _MEMORY.fullmatch(term)}


def _read_terms(text: str) -> set[str]:
    """The terms that distinguish a GPU: 'NVIDIA A100-SXM4-80GB' is {'a100', 'sxm', '80gb'}."""
    spaced = _PARTS.sub(r" \1 ", re.sub(r"[^a-z0-9]+", " ", re.sub(r"sxm[0-9]", "sxm", text.lower())))
    return set(_MEMORY.sub(r"\1gb", spaced).split()) - _NOISE


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("nvidia", "").replace("tesla", ""))
