"""Translate Lightning's FSDPStrategy (FSDP1) and ModelParallelStrategy to the launcher's FSDP2 strategies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.core.errors import ConfigError, Problem

NAMES = {"fsdp": "fsdp2", "fsdp_cpu_offload": "fsdp2_offload", "model_parallel": "fsdp2"}
CLASSES = ("FSDPStrategy", "ModelParallelStrategy")
_BY_SHARDING = {"FULL_SHARD": "fsdp2", "SHARD_GRAD_OP": "fsdp2_grad_op", "HYBRID_SHARD": "hsdp", "NO_SHARD": "ddp"}
# Arguments that change nothing here: FSDP2 prefetches, limits gathers and copies rank zero's weights by itself.
_NOT_NEEDED = ("use_orig_params", "sync_module_states", "limit_all_gathers", "forward_prefetch", "backward_prefetch",
               "device_id", "param_init_fn", "process_group")  # fmt: skip
_FULL = "checkpoints are sharded here; `launcher convert` writes one file"


def translate_fsdp(name: str, arguments: dict[str, Any], path: str) -> dict[str, Any]:
    """The launcher's settings for the arguments of one of the two classes, without timeout and backend.

    Raises:
        ConfigError: lists each argument that has no equivalent, with what to write.
    """
    found = _Translation(path)
    if name == "FSDPStrategy":
        _translate_fsdp1(dict(arguments), found)
    else:
        _translate_model_parallel(dict(arguments), found)
    if found.problems:
        raise ConfigError(found.problems)
    return found.settings


def describe_fsdp(given: Any) -> list[str]:
    """Notices about valid settings of Lightning's strategies that have another effect here."""
    if isinstance(given, str):
        return [f"strategy {given} is {NAMES[given]} here ({_REPLACED})"] if given in NAMES else []
    name = str(given.get("class_path")).rpartition(".")[2] if isinstance(given, Mapping) else ""
    if name not in CLASSES:
        return []
    arguments = {**(given.get("init_args") or {}), **(given.get("dict_kwargs") or {})}
    try:
        strategy = translate_fsdp(name, arguments, "")["strategy"]
    except ConfigError:
        return []  # reported as an error
    why = _REPLACED if name == "FSDPStrategy" else "it shards any module"
    notices = [f"{name} is `strategy: {strategy}` here ({why})"]
    if arguments.get("state_dict_type") == "full" or arguments.get("save_distributed_checkpoint") is False:
        notices.append(_FULL)
    unused = [key for key in _NOT_NEEDED if arguments.get(key) is not None]
    if unused:
        notices.append(f"{', '.join(unused)} of {name} {'have' if len(unused) > 1 else 'has'} no effect on FSDP2")
    return notices


_REPLACED = "FSDP2 replaces FSDP1"


class _Translation:
    """Settings found so far, and problems of arguments."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.settings: dict[str, Any] = {}
        self.problems: list[Problem] = []

    def set_option(self, key: str, value: Any) -> None:
        """Set a key of the group `fsdp`."""
        self.settings.setdefault("fsdp", {})[key] = value

    def reject(self, argument: str, value: Any, advice: str) -> None:
        """Report an argument that has no equivalent."""
        self.problems.append(Problem(f"{self._path}.init_args.{argument}", f"given {value!r}; {advice}"))


def _translate_fsdp1(arguments: dict[str, Any], found: _Translation) -> None:
    for key in (*_NOT_NEEDED, "state_dict_type"):
        arguments.pop(key, None)
    sharding = arguments.pop("sharding_strategy", None) or "FULL_SHARD"
    name = str(sharding).rpartition(".")[2].upper()
    strategy = _BY_SHARDING.get(name, "fsdp2")
    if name not in _BY_SHARDING:
        found.reject("sharding_strategy", sharding, f"write one of {', '.join(_BY_SHARDING)}")
        # Whether a mesh fits depends on it.
        arguments.pop("device_mesh", None)
    offload = arguments.pop("cpu_offload", None)
    if _wants_offload(offload):
        if strategy != "fsdp2":
            found.reject("cpu_offload", offload, f"{strategy} has no offload; write `strategy: fsdp2_offload` instead")
        strategy = "fsdp2_offload"
    found.settings["strategy"] = strategy
    wrap = _read_classes("auto_wrap_policy", arguments, found)
    checkpointed = [*_read_classes("activation_checkpointing_policy", arguments, found),
                    *_read_classes("activation_checkpointing", arguments, found)]  # fmt: skip
    if checkpointed:
        found.settings["activation_checkpointing"] = True
        if wrap and {*wrap} != {*checkpointed}:
            advice = f"the blocks of auto_wrap_policy ({', '.join(wrap)}) are checkpointed here; name the same classes"
            found.reject("activation_checkpointing_policy", checkpointed, advice)
    if checkpointed or (wrap and strategy != "ddp"):
        found.set_option("wrap", wrap or checkpointed)
    _translate_mesh(arguments.pop("device_mesh", None), strategy, found)
    mixed = arguments.pop("mixed_precision", None)
    if mixed is not None:
        found.reject("mixed_precision", mixed, "write `precision: bf16-mixed`, and `fsdp.reduce_dtype`")
    for key, value in arguments.items():
        if value:
            found.reject(key, value, "FSDP2 has no such argument; remove it")


def _translate_model_parallel(arguments: dict[str, Any], found: _Translation) -> None:
    found.settings["strategy"] = "fsdp2"
    arguments.pop("save_distributed_checkpoint", None)
    tensor = arguments.pop("tensor_parallel_size", "auto")
    if str(tensor) != "1":
        advice = "tensor parallelism is not available; write 1, so that all ranks share the model"
        found.reject("tensor_parallel_size", tensor, advice)
    size = arguments.pop("data_parallel_size", "auto")
    if size not in ("auto", None):
        found.reject("data_parallel_size", size, "it is the number of ranks here; write auto, and set `devices`")
    for key, value in arguments.items():
        if value:
            found.reject(key, value, "ModelParallelStrategy has no such argument; remove it")


def _translate_mesh(mesh: Any, strategy: str, found: _Translation) -> None:
    if mesh is None:
        return
    is_pair = isinstance(mesh, list | tuple) and [type(size) for size in mesh] == [int, int]
    if strategy != "hsdp" or not is_pair:
        found.reject("device_mesh", mesh, "write the ranks of one replica as `fsdp.shard_ranks`, and `strategy: hsdp`")
    else:
        found.set_option("shard_ranks", mesh[1])


def _wants_offload(given: Any) -> bool:
    """Whether `cpu_offload` is true, or a CPUOffload that offloads parameters."""
    if isinstance(given, Mapping):
        return bool({**given, **(given.get("init_args") or {})}.get("offload_params"))
    return bool(given)


def _read_classes(argument: str, arguments: dict[str, Any], found: _Translation) -> list[str]:
    """The names of the classes of a wrapping policy: a class, several, or a ModuleWrapPolicy."""
    given = policy = arguments.pop(argument, None)
    if given is None or given is False:
        return []
    if isinstance(given, Mapping):
        policy = {**given, **(given.get("init_args") or {})}
        policy = policy.get("module_classes") or policy.get("transformer_layer_cls")
    paths = [policy] if isinstance(policy, str) else policy
    if isinstance(paths, list | tuple | set) and paths and all(_names_class(each) for each in paths):
        return [str(each).rpartition(".")[2] for each in paths]
    found.reject(argument, given, "name the classes of the blocks in `fsdp.wrap`, or remove it: they are found")
    return []


def _names_class(given: Any) -> bool:
    return isinstance(given, str) and given.rpartition(".")[2][:1].isupper()
