"""The keys of a DeepSpeed config and the type of each value, to report misspelled keys before anything is loaded.

DeepSpeed ignores unknown keys at the top level. Taken from `deepspeed/runtime/config.py` and
`deepspeed/runtime/zero/config.py` of DeepSpeed 0.19; a test compares them with the installed one.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from typing import Any, cast

from strategies.deepspeed_precision import AUTO

_TYPES = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "block": "a block"}


def _typed(**names: str) -> dict[str, str]:
    """A type for each of the names, which are separated by blanks."""
    return {name: kind for kind, text in names.items() for name in text.split()}


TOP: Mapping[str, str] = _typed(
    int="train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps steps_per_print vocabulary_size",
    float="gradient_clipping gradient_predivide_factor",
    bool="managed_gradient_accumulation prescale_gradients disable_allgather dump_state disable_python_gc "
    "wall_clock_breakdown memory_breakdown zero_allow_untested_optimizer zero_force_ds_cpu_optimizer "
    "dataloader_drop_last use_data_before_expert_parallelism",
    str="communication_data_type seq_parallel_communication_data_type gradient_allreduce_op log_level",
    block="zero_optimization activation_checkpointing aio checkpoint data_types fp16 bf16 bfloat16 torch_autocast "
    "optimizer scheduler flops_profiler comms_logger autotuning hybrid_engine pipeline data_efficiency datastates_ckpt "
    "weight_quantization compile timers tensor_parallel expert_parallel tensorboard wandb csv_monitor comet",
)
# Keys of ZeRO-3, which DeepSpeed accepts with and without this prefix.
_STAGE_3 = "stage3_"
_STAGE_3_KEYS = _typed(
    int="prefetch_bucket_size param_persistence_threshold model_persistence_threshold max_live_parameters "
    "max_reuse_distance module_granularity_threshold",
    bool="gather_16bit_weights_on_model_save use_all_reduce_for_fetch_params allgather_sequential",
)
ZERO: Mapping[str, str] = {
    **_typed(
        int="stage reduce_bucket_size allgather_bucket_size sub_group_size zero_hpz_partition_size",
        bool="contiguous_gradients reduce_scatter use_multi_rank_bucket_allreduce allgather_partitions overlap_comm "
        "compute_grad_norm load_from_fp32_weights elastic_checkpoint cpu_offload_param cpu_offload_use_pin_memory "
        "cpu_offload stage3_gather_fp16_weights_on_model_save ignore_unused_parameters legacy_stage1 "
        "round_robin_gradients parameter_alignment zero_quantized_weights zero_quantized_nontrainable_weights "
        "zero_quantized_gradients memory_efficient_linear pipeline_loading_checkpoint override_module_apply "
        "log_trace_cache_warnings enable_sanity_checks save_muon_momentum_buffer_in_memory",
        block="offload_param offload_optimizer zenflow leaf_module",
    ),
    **_STAGE_3_KEYS,
    **{_STAGE_3 + key: kind for key, kind in _STAGE_3_KEYS.items()},
}
OFFLOAD_PARAM: Mapping[str, str] = _typed(
    str="device nvme_path", int="buffer_count buffer_size max_in_cpu", bool="pin_memory"
)
OFFLOAD_OPTIMIZER: Mapping[str, str] = _typed(
    str="device nvme_path",
    int="buffer_count",
    bool="pin_memory pipeline_read pipeline_write fast_init super_offload",
    float="ratio cpuadam_cores_perc",
)
_ACTIVATIONS = _typed(
    int="number_checkpoints",
    bool="partition_activations contiguous_memory_optimization cpu_checkpointing synchronize_checkpoint_boundary "
    "profile",
)
# `thread_count` is Lightning's name in its default config; DeepSpeed reads `intra_op_parallelism`.
_AIO = _typed(
    int="block_size queue_depth intra_op_parallelism thread_count", bool="single_submit overlap_events use_gds"
)
_BLOCKS: Mapping[str, Mapping[str, str]] = {
    "": TOP,
    "zero_optimization": ZERO,
    "zero_optimization.offload_param": OFFLOAD_PARAM,
    "zero_optimization.offload_optimizer": OFFLOAD_OPTIMIZER,
    "activation_checkpointing": _ACTIVATIONS,
    "aio": _AIO,
}
_DEVICES = ("none", "cpu", "nvme")
# Keys that DeepSpeed no longer accepts, by path: what to do instead.
REMOVED: Mapping[str, str] = {
    **dict.fromkeys(("nebula", "compression_training", "quantize_training", "sparse_gradients", "eigenvalue",
                     "sparse_attention", "graph_harvesting", "progressive_layer_drop",
                     "zero_optimization.mics_shard_size", "zero_optimization.mics_hierarchical_params_gather",
                     "zero_optimization.zeropp_loco_param"), "remove it"),
    "amp": "remove it, and set `precision`",
    "elasticity": "remove it; `global_batch_size` keeps the batch on any number of ranks",
    "curriculum_learning": "use data_efficiency.data_sampling.curriculum_learning",
}  # fmt: skip


def find_broken_keys(config: Mapping[str, Any], block: str = "") -> Iterator[tuple[str, str]]:
    """Every key that DeepSpeed does not know, and every value of the wrong type.

    `strategies.deepspeed_precision` checks the blocks of the precision.

    Args:
        config: DeepSpeed's settings, or one block of them.
        block: dotted path of that block.

    Yields:
        The dotted path, and what was given and expected.
    """
    known = _BLOCKS[block]
    for key, value in config.items():
        path = f"{block}.{key}" if block else str(key)
        kind = known.get(key)
        if path in REMOVED:
            yield path, f"DeepSpeed 0.19 no longer has it: {REMOVED[path]}"
        elif kind is None:
            yield path, _unknown(str(key), known, block)
        elif value != AUTO and value is not None:
            yield from _check_value(path, kind, value)


def _check_value(path: str, kind: str, value: Any) -> Iterator[tuple[str, str]]:
    if not _has_type(kind, value):
        yield path, f"given {value!r}; expected {_TYPES[kind]}, or 'auto'"
    elif path in _BLOCKS:
        yield from find_broken_keys(cast(Mapping[str, Any], value), path)
    elif path == "zero_optimization.stage":
        if value not in (0, 1, 2, 3):
            yield path, f"given {value!r}; expected 0, 1, 2 or 3"
    elif path.endswith(".device") and value not in _DEVICES:
        yield path, f"given {value!r}; expected one of {', '.join(_DEVICES)}"


def _unknown(key: str, known: Mapping[str, str], block: str) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.7)
    if close:
        return f"unknown key; did you mean {close[0]}?"
    elsewhere = [f"{name}.{key}" if name else key for name, keys in _BLOCKS.items() if key in keys and name != block]
    if elsewhere:
        return f"unknown key; did you mean {elsewhere[0]}?"
    return "unknown key; DeepSpeed 0.19 has none of that name"


def _has_type(kind: str, value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind == "int":
        # 5e8 is how people write a bucket's size.
        return is_number and value == int(value)
    if kind == "float":
        return is_number
    return isinstance(value, {"bool": bool, "str": str, "block": Mapping}[kind])
