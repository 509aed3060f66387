"""The user's DeepSpeed config merged into the planned one: 'auto' filled, every contradiction listed. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from strategies.deepspeed_config import NVME, BatchAndClip, ZeroVariant, as_block, zero_config
from strategies.deepspeed_precision import AUTO
from strategies.registry import list_zero_variants

# Keys of DeepSpeed that repeat a setting of the run config.
_PLANNED = {
    "train_batch_size": "global_batch_size",
    "train_micro_batch_size_per_gpu": "the data's batch_size or global_batch_size",
    "gradient_accumulation_steps": "trainer.accumulate_grad_batches or global_batch_size",
    "gradient_clipping": "trainer.gradient_clip_val",
}
# Blocks that another part of the launcher replaces.
_REFUSED = {
    "optimizer": "the optimizer comes from the model's configure_optimizers; remove the block (return "
    "deepspeed.ops.adam.DeepSpeedCPUAdam or FusedAdam there for DeepSpeed's own)",
    "scheduler": "the scheduler comes from the model's configure_optimizers; remove the block",
    "wandb": "the launcher logs to W&B itself; remove the block",
    "tensor_parallel": "the launcher only trains data-parallel; remove the block",
    "expert_parallel": "the launcher only trains data-parallel; remove the block",
    "pipeline": "the launcher only trains data-parallel; remove the block",
}
# Filled by strategies.deepspeed_precision.
_PRECISION_BLOCKS = ("fp16", "bf16", "bfloat16")
_OFFLOADS = ("offload_optimizer", "offload_param")


def merge_config(
    user: Mapping[str, Any], planned: Mapping[str, Any], strategy: str, *, clip_is_set: bool
) -> tuple[dict[str, Any], list[str]]:
    """DeepSpeed's config, complete but for the blocks of the precision.

    Args:
        user: the user's settings, without unknown keys; not changed.
        planned: `strategies.deepspeed_config.zero_config` of the same strategy.
        strategy: name of a variant of ZeRO.
        clip_is_set: whether the run config sets clipping; if not, the value of `user` applies.

    Returns:
        The config, and one line for each conflict: dotted path, given value, value of the run config.
    """
    problems = [f"{key}: {why}" for key, why in _REFUSED.items() if _is_enabled(user.get(key))]
    if not clip_is_set:
        planned = {
            **planned,
            "gradient_clipping": _or_default(user.get("gradient_clipping"), planned["gradient_clipping"]),
        }
    for key, place in _PLANNED.items():
        given = user.get(key, AUTO)
        if given not in (AUTO, None) and key in planned and given != planned[key]:
            what = f"{key}: given {given}, but the plan has {planned[key]}"
            problems.append(f"{what}; set it to 'auto', or change {place}")
    if "train_micro_batch_size_per_gpu" not in planned:
        problems += _check_loader_batch(user)
    problems += _variant_conflicts(as_block(user.get("zero_optimization")), strategy)
    merged = _merge(planned, user)
    problems += _find_missing_folders(as_block(merged["zero_optimization"]))
    return {key: value for key, value in merged.items() if key not in (*_REFUSED, *_PRECISION_BLOCKS)}, problems


def nvme_paths(strategy: str, user: Mapping[str, Any]) -> tuple[str, ...]:
    """The folders on NVMe that a strategy offloads to, by the user's settings or the defaults; each once."""
    variant = list_zero_variants().get(strategy)
    if variant is None:
        return ()
    planned = zero_config(variant, "cuda", BatchAndClip(1, None, 1, 0.0))
    zero = as_block(_merge(planned, user)["zero_optimization"])
    blocks = (as_block(zero.get(name)) for name in _OFFLOADS)
    return tuple(dict.fromkeys(str(b["nvme_path"]) for b in blocks if b.get("device") == NVME and b.get("nvme_path")))


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Merge `over` into `base`, block by block; 'auto' and null keep the value of `base`, or DeepSpeed's default."""
    merged = dict(base)
    for key, value in over.items():
        if value == AUTO or value is None:
            continue
        if isinstance(value, Mapping):
            merged[key] = _merge(as_block(merged.get(key)), as_block(value))
        else:
            merged[key] = value
    return merged


def _variant_conflicts(zero: Mapping[str, Any], strategy: str) -> list[str]:
    """Stage and offload that describe another variant than the requested one."""
    variants = list_zero_variants()
    variant = variants[strategy]
    stage = _or_default(zero.get("stage"), variant.stage)
    meant = ZeroVariant(
        stage,
        _device(zero, "offload_optimizer", variant.offload_optimizer),
        _device(zero, "offload_param", variant.offload_parameters),
    )
    if stage == 0:
        return ["zero_optimization.stage: given 0, which is plain data parallelism; use `strategy: ddp`"]
    if meant.offload_parameters is not None and stage != 3:
        return ["zero_optimization.offload_param: only stage 3 offloads parameters; remove the block"]
    if meant == variant:
        return []
    named = next((name for name, other in variants.items() if other == meant), None)
    if named is None and stage == variant.stage:
        return []  # a combination of offloads that has no name
    what = f"stage {stage}" + "".join(
        f", {part} on {device}"
        for part, device in (("optimizer", meant.offload_optimizer), ("parameters", meant.offload_parameters))
        if device is not None
    )
    advice = f"use `strategy: {named}`" if named else "use the same stage in both"
    return [f"zero_optimization: given {what}, but the strategy is {strategy}; {advice}, or set these to 'auto'"]


def _find_missing_folders(zero: Mapping[str, Any]) -> list[str]:
    """Offload to NVMe in the user's settings without a path."""
    return [
        f"zero_optimization.{name}: given device nvme without nvme_path; name a folder on the node's NVMe"
        for name in _OFFLOADS
        if as_block(zero.get(name)).get("device") == NVME and not as_block(zero.get(name)).get("nvme_path")
    ]


def _device(zero: Mapping[str, Any], block: str, default: str | None) -> str | None:
    given = zero.get(block, AUTO)
    if given is None:
        return None
    device = as_block(given).get("device", AUTO)
    return default if device == AUTO else None if device == "none" else str(device)


def _check_loader_batch(user: Mapping[str, Any]) -> list[str]:
    """A conflict for a total batch size that cannot be checked, because only the loader knows the micro batch."""
    if user.get("train_batch_size", AUTO) in (AUTO, None):
        return []
    given = user["train_batch_size"]
    advice = f"set `global_batch_size: {given}`, and this to 'auto'"
    return [f"train_batch_size: given {given}, but global_batch_size is not set; {advice}"]


def _is_enabled(block: Any) -> bool:
    """Whether a block is there and not disabled."""
    if not isinstance(block, Mapping):
        return block is not None and block != AUTO
    return as_block(block).get("enabled") is not False


def _or_default(value: Any, default: Any) -> Any:
    return default if value is None or value == AUTO else value
