"""The ZeRO variants by Lightning's names, and the DeepSpeed config that each means. Dicts in, dicts out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CPU = "cpu"
NVME = "nvme"


@dataclass(frozen=True, slots=True)
class ZeroVariant:
    """One of DeepSpeed's ways to share the model's states among the ranks (Rajbhandari et al. 2020, 2021).

    Attributes:
        stage: 1 shares the optimizer's states, 2 the gradients too, 3 the parameters too.
        offload_optimizer: where optimizer states lie instead of on the GPU: 'cpu', 'nvme' or None.
        offload_parameters: the same for parameters; stage 3 alone.
    """

    stage: int
    offload_optimizer: str | None = None
    offload_parameters: str | None = None

    @property
    def offloads(self) -> bool:
        """Whether anything lies outside the GPU, which is of use to a single rank too."""
        return self.offload_optimizer is not None or self.offload_parameters is not None


# ZeRO gives each rank a piece of all parameters laid end to end, whose shapes are gone.
NOT_BY_ELEMENT: Mapping[str, str] = {
    "LBFGS": "asks for the loss again within a step",
    "SparseAdam": "needs sparse gradients",
    "Adafactor": "factors each matrix's second moments, and ZeRO's pieces have no rows and columns",
    "Muon": "orthogonalizes each matrix, and ZeRO's pieces have no rows and columns",
    "Shampoo": "preconditions each matrix, and ZeRO's pieces have no rows and columns",
    "Lamb": "scales by each layer's norm, and ZeRO's pieces have no layers",
    "LAMB": "scales by each layer's norm, and ZeRO's pieces have no layers",
    "LARS": "scales by each layer's norm, and ZeRO's pieces have no layers",
}

# Lightning's DeepSpeedStrategy takes its own DeepSpeedPrecision alone.
BESIDE_DEEPSPEED = "a precision plugin was given, but DeepSpeed's engine computes by one of its own"

# Elements in a bucket of gradients or gathered parameters. DeepSpeed allocates whole buckets: Lightning's 200 million
# are right for a GPU, and 1.6 GB of every rank of a laptop.
GPU_BUCKET = 200_000_000
CPU_BUCKET = 5_000_000
NVME_PATH = "/local_nvme"


@dataclass(frozen=True, slots=True)
class BatchAndClip:
    """What the plan fixes of DeepSpeed's config.

    Attributes:
        world_size: number of ranks.
        micro_batch_size: samples a rank takes at once; None if only the user's loader knows.
        accumulate: micro batches of one optimizer step.
        gradient_clip_val: largest norm of all gradients, 0 for none.
    """

    world_size: int
    micro_batch_size: int | None
    accumulate: int
    gradient_clip_val: float

    def values(self) -> dict[str, Any]:
        """By DeepSpeed's names; the sizes of batches only where they are known."""
        values: dict[str, Any] = {
            "gradient_accumulation_steps": self.accumulate,
            "gradient_clipping": self.gradient_clip_val,
        }
        if self.micro_batch_size is not None:
            values["train_micro_batch_size_per_gpu"] = self.micro_batch_size
            values["train_batch_size"] = self.micro_batch_size * self.world_size * self.accumulate
        return values


def zero_config(variant: ZeroVariant, device_kind: str, planned: BatchAndClip) -> dict[str, Any]:
    """The whole DeepSpeed config of a variant, without a block for the precision.

    Args:
        variant: stage and offload.
        device_kind: 'cpu' or 'cuda'.
        planned: batch and clipping.
    """
    bucket = GPU_BUCKET if device_kind == "cuda" else CPU_BUCKET
    zero: dict[str, Any] = {
        "stage": variant.stage,
        "contiguous_gradients": True,
        # A CPU has no second stream to overlap on.
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
        # Else DeepSpeed refuses every optimizer but its own CPU Adam; a slower one is told to the user instead.
        config["zero_force_ds_cpu_optimizer"] = False
    return config


def _offload(device: str, pinned: bool) -> dict[str, Any]:
    values: dict[str, Any] = {"device": device, "pin_memory": pinned}
    if device == NVME:
        values["nvme_path"] = NVME_PATH
    return values
