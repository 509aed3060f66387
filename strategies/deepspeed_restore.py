"""Loads a checkpoint of one file, as Lightning saves it without DeepSpeed, into the shards of a ZeRO training."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from strategies.base import StrategyError
from strategies.loss_scale import state_problem

_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@contextlib.contextmanager
def weights_only_loads() -> Iterator[None]:
    """Every `torch.load` within is `weights_only`, also those of DeepSpeed, which request the opposite.

    The classes of DeepSpeed in its checkpoints are allowed: they only hold values.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before


def parameter_names(module: nn.Module, param_groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of an optimizer's parameters, in the order of the indices in its state dict.

    `param_groups` are those before ZeRO replaces their content.
    """
    name_of = {id(parameter): name for name, parameter in module.named_parameters()}
    return [name_of.get(id(parameter), "") for group in param_groups for parameter in group["params"]]


def restore_consolidated(engine: Any, checkpoint: Mapping[str, Any], names: Sequence[str], *, strict: bool) -> None:
    """Load weights, optimizer states and hyperparameters of a consolidated checkpoint into the shards of every rank.

    Every rank calls it. Weights are set in fp32, so that the master copy is exact if the model trains in 16 bits.

    Args:
        engine: of DeepSpeed, before its first step.
        checkpoint: of Lightning: `state_dict`, one of `optimizer_states`, `global_step`.
        names: of the optimizer's parameters, from `parameter_names`; those in the checkpoint take precedence.
        strict: whether a parameter or buffer that is missing from the checkpoint is an error.

    Raises:
        StrategyError: something is missing from the checkpoint, or it has several optimizers.
    """
    state: Mapping[str, Tensor] = checkpoint["state_dict"]
    module: nn.Module = engine.module
    parameters = dict(module.named_parameters())
    wanted = {**parameters, **dict(module.named_buffers())}
    missing = [name for name in module.state_dict() if name in wanted and name not in state]
    if missing and strict:
        raise StrategyError(f"the checkpoint lacks {', '.join(missing[:5])}, which the model has")
    for name, buffer in module.named_buffers():
        if name in state:
            buffer.data.copy_(state[name])
    for name, parameter in parameters.items():
        if name in state:
            _set_weight(parameter, state[name])
    saved = checkpoint.get("optimizer_states") or []
    if len(saved) != 1:
        raise StrategyError(f"the checkpoint has the states of {len(saved)} optimizers; DeepSpeed takes one")
    _restore_optimizer(engine.optimizer, parameters, saved[0], checkpoint.get("parameter_names") or names)
    _restore_loss_scale(engine.optimizer, checkpoint.get("MixedPrecision"))
    engine.global_steps = checkpoint["global_step"]


def restore_weights(engine: Any, read_consolidated: Callable[[Path], Mapping[str, Any]], path: Path) -> dict[str, Any]:
    """Load the weights of a checkpoint folder into the shards of every rank, to evaluate in stage 3. All ranks call it.

    Args:
        engine: of DeepSpeed, without an optimizer.
        read_consolidated: returns Lightning's checkpoint with complete weights; called on rank zero only.
        path: the folder.

    Raises:
        StrategyError: rank zero cannot read it.
    """
    import deepspeed

    module: nn.Module = engine.module
    state: Mapping[str, Tensor] = {}
    answer: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            checkpoint = read_consolidated(path)
            state = checkpoint["state_dict"]
            content = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
            answer = [(None, content, {name: state[name] for name, _ in module.named_buffers() if name in state})]
        except Exception as error:  # noqa: BLE001 -- raised below on every rank: the others wait for the answer
            answer = [(str(error), {}, {})]
    dist.broadcast_object_list(answer, src=0)
    failure, content, buffers = answer[0]
    if failure is not None:
        raise StrategyError(failure)
    for name, buffer in module.named_buffers():
        if name in buffers:
            buffer.data.copy_(buffers[name])
    for name, parameter in module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if name in state:
                parameter.data.copy_(state[name])
    return {**content, "state_dict": {}}


def _restore_optimizer(
    zero: Any, parameters: Mapping[str, nn.Parameter], saved: Mapping[str, Any], names: Sequence[str]
) -> None:
    """Set the states of the torch optimizer inside ZeRO's."""
    # DeepSpeed has no empty groups.
    groups = [group for group in saved["param_groups"] if group["params"]]
    for group, values in zip(zero.param_groups, groups, strict=True):
        group.update({key: value for key, value in values.items() if key != "params"})
    states: dict[str, Mapping[str, Any]] = {
        name: saved["state"][n] for n, name in enumerate(names) if n in saved["state"]
    }
    if not states:
        return  # saved before the first step, or an optimizer without states
    first, example = next(iter(states.items()))
    _make_states(zero, example, _numel(parameters[first]))
    for name, values in states.items():
        parameter = parameters.get(name)
        if parameter is None or not parameter.requires_grad:
            continue
        for key, value in values.items():
            if isinstance(value, Tensor) and value.dim() > 0 and value.numel() == _numel(parameter):
                _set_state(parameter, value, key)


def _restore_loss_scale(zero: Any, saved: Any) -> None:
    """Set DeepSpeed's dynamic loss scale to that of torch's scaler, and the steps since its last change."""
    scaler: Any = getattr(zero, "loss_scaler", None)
    if saved and getattr(scaler, "dynamic", False) and state_problem(saved) is None:
        scaler.cur_scale = saved["scale"]
        scaler.cur_iter = scaler.last_overflow_iter + 1 + saved.get("_growth_tracker", 0)


def _make_states(zero: Any, example: Mapping[str, Any], numel: int) -> None:
    """Create the states of ZeRO's shards, which torch's optimizers create only in their first step.

    `example` has the states of one parameter with `numel` elements.
    """
    # Of stage 3, of bf16 weights with fp32 gradients in stage 1, and of stages 1 and 2.
    names = ("fp32_partitioned_groups_flat", "fp32_groups_flat_partition", "single_partition_of_fp32_groups")
    for piece in next(getattr(zero, name) for name in names if hasattr(zero, name)):
        own = zero.optimizer.state[piece]
        for key, value in example.items():
            if not isinstance(value, Tensor):
                own[key] = value
            elif value.dim() > 0 and value.numel() == numel:
                own.setdefault(key, torch.zeros_like(piece))
            else:
                # A step counter: a separate tensor for each shard, as in torch's optimizers.
                own[key] = value.clone()
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._lazy_init_hp_params_optimizer_state()


def _set_weight(parameter: nn.Parameter, value: Tensor) -> None:
    if not hasattr(parameter, "ds_id"):
        from deepspeed.utils import safe_set_full_fp32_param

        parameter.data.copy_(value)
        if parameter.requires_grad:
            safe_set_full_fp32_param(parameter, value.to(parameter.device))
        return
    import deepspeed
    from deepspeed.utils import safe_set_local_fp32_param

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        if dist.get_rank() == 0:
            parameter.data.copy_(value)
    if parameter.requires_grad:
        safe_set_local_fp32_param(parameter, _own_shard(parameter, value))


def _set_state(parameter: nn.Parameter, value: Tensor, key: str) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    if hasattr(parameter, "ds_id"):
        safe_set_local_optimizer_state(parameter, _own_shard(parameter, value), key)
    else:
        safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)


def _own_shard(parameter: Any, value: Tensor) -> Tensor:
    """This rank's shard of a ZeRO-3 parameter; the last ones are padded with zeros."""
    size = parameter.ds_tensor.numel()
    start = size * dist.get_rank()
    piece = torch.zeros(size, dtype=value.dtype)
    part = value.flatten()[start : start + size]
    piece[: part.numel()] = part
    return piece


def _numel(parameter: Any) -> int:
    """Elements of the complete parameter; ZeRO-3 leaves an empty tensor in its place."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def remove_hooks(kept: Any) -> None:
    """Remove DeepSpeed's hooks from losses that the user's objects keep, so that they can be saved.

    DeepSpeed adds functions to each loss, and a metric or a criterion among the hyperparameters may still hold one.
    Between two steps they are not needed.
    """
    if isinstance(kept, Tensor):
        vars(kept).pop("_backward_hook_managers", None)
    elif isinstance(kept, nn.Module):
        for part in kept.modules():
            for value in vars(part).values():
                if not isinstance(value, nn.Module):
                    remove_hooks(value)
    elif isinstance(kept, Mapping):
        for value in kept.values():
            remove_hooks(value)
    elif isinstance(kept, list | tuple):
        for value in kept:
            remove_hooks(value)
