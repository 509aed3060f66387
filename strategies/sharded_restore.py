"""Saves and loads checkpoints of sharded modules by torch's distributed checkpoints, each rank its own shards."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.checkpoint import load, save
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from strategies.base import CheckpointHooks
from strategies.deepspeed_restore import remove_hooks
from strategies.deepspeed_strategy import replace_folder
from strategies.sharded_files import SafePlanner, SafeReader

META = "meta.pt"


def save_sharded(
    strategy: ParallelStrategy, checkpoint: dict[str, Any], path: Path, hooks: CheckpointHooks | None
) -> None:
    """Every rank saves its shards in a temporary folder, which is renamed: a kill leaves no partial checkpoint."""
    fresh = path.with_name(f".{path.name}.new")
    if strategy.is_global_zero:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True, mode=0o700)
    strategy.barrier()
    remove_hooks([checkpoint, strategy.lightning_module])
    tensors: dict[str, Any] = {"state_dict": checkpoint.pop("state_dict")}
    for number, state in enumerate(checkpoint.pop("optimizer_states", [])):
        tensors[f"optimizer_{number}"] = state
    with contextlib.nullcontext() if hooks is None else hooks.writing(fresh):
        save(tensors, checkpoint_id=fresh)
        if strategy.is_global_zero:
            torch.save(checkpoint, fresh / META)
    strategy.barrier()
    if strategy.is_global_zero:
        if hooks is not None:
            hooks.on_written(fresh, path, checkpoint.get("global_step"))
        replace_folder(fresh, path)
    strategy.barrier()


class ShardedRestore:
    """Loads a folder of a sharded training, or a file that Lightning saved, into the shards of every rank."""

    def __init__(self, hooks: CheckpointHooks | None) -> None:
        self._hooks = hooks
        self._is_file = False

    def load(self, strategy: Strategy, path: Path, weights_only: bool | None) -> dict[str, Any]:
        """The checkpoint's content; of a folder, weights and states are loaded at once."""
        self._is_file = not path.is_dir()
        if self._is_file:
            return Strategy.load_checkpoint(strategy, path, weights_only)
        module = strategy.lightning_module
        assert module is not None  # noqa: S101 -- Lightning connects it first
        state: dict[str, Any] = {"state_dict": get_model_state_dict(module)}
        _load(state, path)
        module.load_state_dict(state["state_dict"], strict=module.strict_loading)
        for number, optimizer in enumerate(strategy.optimizers):
            key = f"optimizer_{number}"
            state = {key: get_optimizer_state_dict(module, optimizer)}
            _load(state, path)
            set_optimizer_state_dict(module, optimizer, optim_state_dict=state[key])
        with contextlib.nullcontext() if self._hooks is None else self._hooks.reading(path):
            meta = torch.load(path / META, weights_only=True)
        meta.setdefault("state_dict", {})
        return meta

    def load_weights(self, module: nn.Module, checkpoint: Mapping[str, Any], *, strict: bool) -> None:
        """Load the weights of a file."""
        if self._is_file:
            own = module.state_dict()
            weights = {name: _shard_like(value, own.get(name)) for name, value in checkpoint["state_dict"].items()}
            module.load_state_dict(weights, strict=strict)

    def load_optimizers(self, optimizers: Sequence[Optimizer], checkpoint: Mapping[str, Any]) -> None:
        """Load the optimizers' states of a file."""
        if not self._is_file:
            return
        self._is_file = False
        for optimizer, saved in zip(optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state = {
                key: {name: _shard_state(value, parameters[key]) for name, value in values.items()}
                for key, values in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})


def _load(state: dict[str, Any], path: Path) -> None:
    load(state, storage_reader=SafeReader(path), planner=SafePlanner())


def _shard_state(value: Any, parameter: Tensor) -> Any:
    has_shape = isinstance(value, Tensor) and value.dim() > 0 and value.shape == parameter.shape
    return _shard_like(value, parameter) if has_shape else value


def _shard_like(value: Any, like: Any) -> Any:
    """This rank's shard of a complete tensor, if `like` is sharded."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor):
        return value
    whole = value.to(like.device_mesh.device_type)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
