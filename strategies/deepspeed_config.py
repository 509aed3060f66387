"""The variants of ZeRO, and the DeepSpeed config of each. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

CPU = "cpu"
NVME = "nvme"


@dataclass(frozen=True, slots=True)
class ZeroVariant:
    """How DeepSpeed shards the model's states over the ranks (Rajbhandari et al. 2020, 2021).

    Attributes:
        stage: 1 shards the optimizer's states, 2 the gradients too, 3 the parameters too.
        offload_optimizer: where optimizer states are kept instead of on the GPU: 'cpu', 'nvme' or None.
        offload_parameters: the same for parameters; only in stage 3.
    """

    stage: int
    offload_optimizer: str | None = None
    offload_parameters: str | None = None

    @property
    def offloads(self) -> bool:
        """Whether any state is kept outside the GPU, which helps a single rank too."""
        return self.offload_optimizer is not None or self.offload_parameters is not None


# ZeRO flattens all parameters into one buffer and gives each rank a slice of it, without shapes.
NOT_ELEMENTWISE: Mapping[str, str] = {
    "LBFGS": "asks for the loss again within a step",
    "SparseAdam": "needs sparse gradients",
    "Adafactor": "factors each matrix's second moments, and ZeRO's pieces have no rows and columns",
    "Muon": "orthogonalizes each matrix, and ZeRO's pieces have no rows and columns",
    "Shampoo": "preconditions each matrix, and ZeRO's pieces have no rows and columns",
    "Lamb": "scales by each layer's norm, and ZeRO's pieces have no layers",
    "LAMB": "scales by each layer's norm, and ZeRO's pieces have no layers",
    "LARS": "scales by each layer's norm, and ZeRO's pieces have no layers",
}

# Lightning's DeepSpeedStrategy accepts only its own DeepSpeedPrecision.
BESIDE_DEEPSPEED = "a precision plugin was given, but DeepSpeed's engine uses its own"

# Elements in a bucket of gradients or gathered parameters. DeepSpeed allocates complete buckets: Lightning's
# 200 million suit a GPU, but take 1.6 GB for every rank on a laptop.
GPU_BUCKET = 200_000_000
CPU_BUCKET = 5_000_000
NVME_PATH = "/local_nvme"


def as_block(value: Any) -> Mapping[str, Any]:
    """A block of DeepSpeed settings; empty if the value is missing or not a block."""
    return cast(Mapping[str, Any], value) if isinstance(value, Mapping) else {}


@dataclass(frozen=True, slots=True)
class BatchAndClip:
    """The part of DeepSpeed's config that the plan determines.

    Attributes:
        micro_batch_size: samples that a rank processes at once; None if only the user's loader knows.
        gradient_clip_val: maximum norm of all gradients, 0 for no clipping.
    """

    world_size: int
    micro_batch_size: int | None
    accumulate: int
    gradient_clip_val: float

    def values(self) -> dict[str, Any]:
        """By DeepSpeed's names; batch sizes only if they are known."""
        values: dict[str, Any] = {
            "gradient_accumulation_steps": self.accumulate,
            "gradient_clipping": self.gradient_clip_val,
        }
        if self.micro_batch_size is not None:
            values["train_micro_batch_size_per_gpu"] = self.micro_batch_size
            values["train_batch_size"] = self.micro_batch_size * self.world_size * self.accumulate
        return values


def zero_config(variant: ZeroVariant, device_kind: str, planned: BatchAndClip) -> dict[str, Any]:
    """The DeepSpeed config of a variant without the blocks of the precision; `device_kind` is 'cpu' or 'cuda'."""
    bucket = GPU_BUCKET if device_kind == "cuda" else CPU_BUCKET
    zero: dict[str, Any] = {
        "stage": variant.stage,
        "contiguous_gradients": True,
        # A CPU has no second stream.
        "overlap_comm": device_kind == "cuda",
        "reduce_scatter": True,
        "allgather_partitions": True,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if variant.stage == 3:
        zero.update(stage3_prefetch_bucket_size=bucket // 4, stage3_param_persistence_threshold=100_000)
    pinned = device_kind == "cuda"
    if variant.offload_optimizer is not None:
        zero["offload_optimizer"] = _offload(variant.offload_optimizer, pinned)
    if variant.offload_parameters is not None:
        zero["offload_param"] = _offload(variant.offload_parameters, pinned)
    config = {**planned.values(), "zero_allow_untested_optimizer": True, "zero_optimization": zero}
    if variant.offloads:
        # Otherwise DeepSpeed accepts only its own CPU Adam. The user gets a notice about a slower optimizer instead.
        config["zero_force_ds_cpu_optimizer"] = False
    return config


def _offload(device: str, pinned: bool) -> dict[str, Any]:
    values: dict[str, Any] = {"device": device, "pin_memory": pinned}
    if device == NVME:
        values["nvme_path"] = NVME_PATH
    return values
