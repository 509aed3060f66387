"""Translate LightningCLI's `trainer.strategy`, a name or a class with arguments, to the launcher's settings."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.config import lightning_cli_fsdp
from launcher.config.deepspeed_file import read_deepspeed_file
from launcher.core.errors import ConfigError, Problem
from strategies.ddp import DDP_OPTIONS
from strategies.deepspeed_config import ZeroVariant
from strategies.registry import list_zero_variants

_PACKAGE = "lightning.pytorch.strategies"
_MODULES = {"DDPStrategy": "ddp", "DeepSpeedStrategy": "deepspeed", "SingleDeviceStrategy": "single_device",
            "FSDPStrategy": "fsdp", "ModelParallelStrategy": "model_parallel"}  # fmt: skip
_DDP, _FIND_UNUSED = "ddp", "ddp_find_unused_parameters_true"
# Lightning's names that differ in how processes are started, which the launcher does itself.
_NAMES = {
    **{f"{name}_find_unused_parameters_false": _DDP for name in ("ddp", "ddp_spawn", "ddp_fork", "ddp_notebook")},
    **{f"{name}_find_unused_parameters_true": _FIND_UNUSED for name in ("ddp_spawn", "ddp_fork", "ddp_notebook")},
    **dict.fromkeys(("ddp_spawn", "ddp_fork", "ddp_notebook"), _DDP),
    "deepspeed": "deepspeed_stage_2",
    **lightning_cli_fsdp.NAMES,
}
_REJECTED_NAMES = {
    **dict.fromkeys(("dp", "ddp2"), "Lightning 2 has no such strategy; write ddp"),
    "deepspeed_stage_1_offload": "write deepspeed_stage_2_offload, which keeps less on the GPU",
}
# Arguments of every strategy that the launcher sets.
_SET_HERE = ("accelerator", "parallel_devices", "cluster_environment", "checkpoint_io", "precision_plugin")
# Lightning's arguments that are keys of DeepSpeed's `zero_optimization`.
_ZERO = {
    **{key: key for key in ("contiguous_gradients", "overlap_comm", "allgather_partitions", "reduce_scatter",
                            "allgather_bucket_size", "reduce_bucket_size", "sub_group_size")},
    "params_buffer_count": "offload_param.buffer_count",
    "params_buffer_size": "offload_param.buffer_size",
    "max_in_cpu": "offload_param.max_in_cpu",
    "optimizer_buffer_count": "offload_optimizer.buffer_count",
}  # fmt: skip
# Defaults of the class, which LightningCLI writes out.
DEEPSPEED_DEFAULTS: Mapping[str, Any] = {
    "zero_optimization": True,
    "stage": 2,
    "remote_device": None,
    "offload_optimizer": False,
    "offload_parameters": False,
    "offload_params_device": "cpu",
    "offload_optimizer_device": "cpu",
    "nvme_path": "/local_nvme",
    "params_buffer_count": 5,
    "params_buffer_size": 100_000_000,
    "max_in_cpu": 1_000_000_000,
    "optimizer_buffer_count": 4,
    "block_size": 1048576,
    "queue_depth": 8,
    "single_submit": False,
    "overlap_events": True,
    "thread_count": 1,
    "pin_memory": False,
    "sub_group_size": 1_000_000_000_000,
    "contiguous_gradients": True,
    "overlap_comm": True,
    "allgather_partitions": True,
    "reduce_scatter": True,
    "allgather_bucket_size": 200_000_000,
    "reduce_bucket_size": 200_000_000,
    "zero_allow_untested_optimizer": True,
    "config": None,
    "loss_scale": 0,
    "initial_scale_power": 16,
    "loss_scale_window": 1000,
    "hysteresis": 2,
    "min_loss_scale": 1,
    "partition_activations": False,
    "cpu_checkpointing": False,
    "contiguous_memory_optimization": False,
    "synchronize_checkpoint_boundary": False,
    "load_full_weights": False,
    "exclude_frozen_parameters": False,
}
# Ignored: DeepSpeed's logging, and timeouts that the launcher sets.
_IGNORED = ("logging_level", "logging_batch_size_per_gpu", "timeout", "process_group_backend")


def translate_strategy(given: Any, path: str, accelerator: Any) -> tuple[dict[str, Any], list[Problem]]:
    """The launcher's top-level settings for a strategy of Lightning, and a problem for each unsupported argument.

    Args:
        given: a name, or `class_path` and `init_args`.
        path: its dotted path in the config.
        accelerator: of the config; None if not set.
    """
    if isinstance(given, str) and given in _REJECTED_NAMES:
        return {}, [Problem(path, f"given {given!r}; {_REJECTED_NAMES[given]}")]
    if not isinstance(given, Mapping):
        return {"strategy": _NAMES.get(given, given) if isinstance(given, str) else given}, []
    class_path = given.get("class_path")
    arguments = {**(given.get("init_args") or {}), **(given.get("dict_kwargs") or {})}
    name = str(class_path).rpartition(".")[2]
    if class_path not in (name, f"{_PACKAGE}.{name}", f"{_PACKAGE}.{_MODULES.get(name)}.{name}"):
        advice = "the launcher creates the strategy itself; write one of its names, as in `strategy: ddp`"
        return {}, [Problem(f"{path}.class_path", f"given {class_path!r}; {advice}")]
    set_here = {key: arguments.pop(key) for key in _SET_HERE if key in arguments}
    problems = [
        Problem(f"{path}.init_args.{key}", f"given {value!r}; the launcher sets it itself; remove it")
        for key, value in set_here.items()
        if value is not None
    ]
    try:
        if name == "DDPStrategy":
            return _ddp(arguments, path, accelerator), problems
        if name in lightning_cli_fsdp.CLASSES:
            common = _process_group(arguments, path, accelerator)
            return {**lightning_cli_fsdp.translate_fsdp(name, arguments, path), **common}, problems
        if name == "DeepSpeedStrategy":
            return _deepspeed(arguments, path), problems
        if name == "SingleDeviceStrategy":
            return {"strategy": "single_device", **_device(arguments.get("device"), path)}, problems
    except ConfigError as error:
        return {}, [*problems, *error.problems]
    return {}, [Problem(f"{path}.class_path", f"given {class_path!r}; write `strategy: ddp` or another name")]


def describe_translation(given: Any) -> list[str]:
    """Notices about a strategy of Lightning that has another name or effect here."""
    if not isinstance(given, str) or not re.match(r"ddp_(spawn|fork|notebook)(_|$)", given):
        return lightning_cli_fsdp.describe_fsdp(given)
    return [f"strategy {given} is {_NAMES.get(given, given)} here: the launcher starts the processes itself"]


def _ddp(arguments: dict[str, Any], path: str, accelerator: Any) -> dict[str, Any]:
    """DDPStrategy's arguments; the others are passed to DistributedDataParallel, as in Lightning."""
    found: dict[str, Any] = {"strategy": _FIND_UNUSED if arguments.pop("find_unused_parameters", False) else _DDP}
    static = arguments.pop("static_graph", None)
    if static is not None:
        found["static_graph"] = static
    found |= _process_group(arguments, path, accelerator)
    # The launcher starts the processes.
    arguments.pop("start_method", None)
    # LightningCLI writes out the defaults of DistributedDataParallel.
    more = {key: value for key, value in arguments.items() if value or (value is not None and key in DDP_OPTIONS)}
    return {**found, "ddp": more} if more else found


def _process_group(arguments: dict[str, Any], path: str, accelerator: Any) -> dict[str, Any]:
    """Take the arguments of the process group out of a strategy's, and return their settings."""
    timeout = arguments.pop("timeout", None)
    _check_backend(arguments.pop("process_group_backend", None), path, accelerator)
    return {} if timeout is None else {"process_group_timeout": _seconds(timeout, f"{path}.init_args.timeout")}


def _check_backend(backend: Any, path: str, accelerator: Any) -> None:
    """Reject a backend of another device."""
    expected = {"cpu": ("gloo",), "gpu": ("nccl",), "cuda": ("nccl",)}.get(str(accelerator), ("nccl",))
    if backend is not None and backend not in expected:
        advice = "the launcher uses nccl for GPUs and gloo for CPUs; remove it"
        raise ConfigError([Problem(f"{path}.init_args.process_group_backend", f"given {backend!r}; {advice}")])


def _seconds(given: Any, path: str) -> float:
    """A timedelta as jsonargparse writes it: `H:MM:SS`, `D days, H:MM:SS`, or seconds."""
    if isinstance(given, int | float):
        return float(given)
    days, comma, rest = str(given).partition(" day")
    try:
        hours, minutes, seconds = map(float, (rest.partition(",")[2] if comma else str(given)).split(":"))
        span = datetime.timedelta(days=int(days) if comma else 0, hours=hours, minutes=minutes, seconds=seconds)
    except ValueError:
        raise ConfigError([Problem(path, f"given {given!r}; expected H:MM:SS, or process_group_timeout")]) from None
    return span.total_seconds()


def _device(device: Any, path: str) -> dict[str, Any]:
    kind, _, number = str(device if device is not None else "cpu").partition(":")
    if number not in ("", "0"):
        advice = f"write CUDA_VISIBLE_DEVICES={number} before the command, and `accelerator: {kind}`"
        raise ConfigError([Problem(f"{path}.init_args.device", f"given {device!r}; {advice}")])
    return {"accelerator": kind} if device is not None else {}


def _deepspeed(arguments: Mapping[str, Any], path: str) -> dict[str, Any]:
    config = arguments.get("config")
    if config is not None:
        # Lightning then ignores all other arguments.
        content = read_deepspeed_file(Path(config)) if isinstance(config, str) else config
        return {"strategy": find_zero_strategy(content, path), "deepspeed_config": content}
    given = {key: value for key, value in arguments.items()
             if key not in _IGNORED and value != DEEPSPEED_DEFAULTS.get(key)}  # fmt: skip
    zero: dict[str, Any] = {"stage": given.pop("stage", 2)}
    folder = given.pop("nvme_path", None)
    for block, switch, device_key in (("offload_optimizer", "offload_optimizer", "offload_optimizer_device"),
                               ("offload_param", "offload_parameters", "offload_params_device")):  # fmt: skip
        device = given.pop(device_key, "cpu")
        if given.pop(switch, False):
            zero[block] = {"device": device, **({"nvme_path": folder} if folder and device == "nvme" else {})}
    problems: list[Problem] = []
    for key, value in given.items():
        block, _, name = _ZERO.get(key, "").rpartition(".")
        if not name:
            advice = "write it under DeepSpeed's name in `deepspeed_config`"
            problems.append(Problem(f"{path}.init_args.{key}", f"given {value!r}; {advice}"))
        elif not block:
            zero[name] = value
        elif block in zero:
            zero[block][name] = value
    if problems:
        raise ConfigError(problems)
    strategy = find_zero_strategy({"zero_optimization": zero}, path)
    variant = list_zero_variants()[strategy]
    by_name = {"stage": variant.stage, "offload_optimizer": {"device": variant.offload_optimizer},
               "offload_param": {"device": variant.offload_parameters}}  # fmt: skip
    more = {key: value for key, value in zero.items() if value != by_name.get(key)}
    return {"strategy": strategy, **({"deepspeed_config": {"zero_optimization": more}} if more else {})}


def find_zero_strategy(content: Any, path: str) -> str:
    """The strategy for the stage and offload of a DeepSpeed config; if none has this offload, the one of its stage."""
    zero = (content.get("zero_optimization") or {}) if isinstance(content, Mapping) else {}
    blocks = [zero.get(block) or {} for block in ("offload_optimizer", "offload_param")]
    stage, parts = zero.get("stage", 0), [block.get("device") for block in blocks]
    wanted = ZeroVariant(stage, *(None if part == "none" else part for part in parts))
    variants = list_zero_variants()
    for name, variant in variants.items():
        if variant == wanted:
            return name
    if f"deepspeed_stage_{stage}" in variants:
        return f"deepspeed_stage_{stage}"
    raise ConfigError([Problem(path, f"given ZeRO stage {stage!r}; write `strategy: ddp`, or stage 1, 2 or 3")])
