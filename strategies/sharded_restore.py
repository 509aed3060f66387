"""Saves and loads checkpoints of sharded modules by torch's distributed checkpoints, each rank its own shards."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.strategies import ParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, SavePlan, save
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DeviceMesh, DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement
from torch.optim import Optimizer
from typing_extensions import override

from strategies.base import CheckpointHooks
from strategies.folder_save import saved_folder
from strategies.sharded_files import empty_value, nest, own_errors, read_values, to_plain_optimizer
from strategies.sharded_meta import OTHERS, put_back, put_structures, replace_values, split_content, write_meta
from strategies.sharded_metadata import META, read_metadata

# Parts of names that wrappers of a block add, which its state dict does not have.
_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")


def save_sharded(
    strategy: ParallelStrategy, checkpoint: dict[str, Any], path: str | Path, hooks: CheckpointHooks | None
) -> None:
    """Every rank saves its shards in one folder, and rank zero what is not sharded."""
    tensors, meta = split_content(checkpoint)
    with saved_folder(strategy, path, checkpoint, hooks) as fresh, own_errors():
        save(_whole(tensors), storage_writer=ShardedWriter(fresh, meta), planner=_SavePlanner())


class _SavePlanner(DefaultSavePlanner):
    """torch's planner, which would take an ordinary tensor, such as a buffer, from any rank: as DDP, from rank zero."""

    @override
    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        if not self.is_coordinator:
            items = [item for item in plan.items if isinstance(self.state_dict[item.index.fqn], DTensor)]
            plan = replace(plan, items=items)
        self.plan = plan
        return plan


class ShardedWriter(FileSystemWriter):
    """torch's writer; rank zero writes the rest in its last step, whose errors all ranks raise."""

    def __init__(self, path: Path, meta: Mapping[str, Any]) -> None:
        super().__init__(path)
        self._file, self._meta = path / META, meta

    @override
    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        write_meta(self._meta, self._file)
        super().finish(metadata, results)


def optimizer_by_names(module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's state dict with the names of parameters in place of numbers, as torch's sharded checkpoints."""
    names = {id(parameter): _plain_name(name) for name, parameter in module.named_parameters()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    name_of = [names.get(id(parameter), str(n)) for n, parameter in enumerate(parameters)]
    state = optimizer.state_dict()
    if "state" not in state:
        # Lightning's stand-in for an optimizer if `configure_optimizers` returns None.
        return state
    return {
        "state": {name_of[n]: values for n, values in state["state"].items()},
        "param_groups": [{**group, "params": [name_of[n] for n in group["params"]]} for group in state["param_groups"]],
    }


class ShardedRestore:
    """Loads a folder of a sharded training, or a file that Lightning saved, into the shards of every rank."""

    def __init__(self, hooks: CheckpointHooks | None) -> None:
        self._hooks = hooks

    def load(
        self, strategy: Strategy, path: Path, mesh: DeviceMesh | None, weights_only: bool | None
    ) -> dict[str, Any]:
        """The content as from one file. Weights and states of a folder are this rank's shards where shapes match.

        `mesh` shards the other tensors that were sharded.
        """
        if not path.is_dir():
            return _shard_named(Strategy.load_checkpoint(strategy, path, weights_only), strategy.lightning_module)
        module = strategy.lightning_module
        assert module is not None  # noqa: S101 -- Lightning connects it first
        folder = _Folder(path, read_metadata(path))
        with contextlib.nullcontext() if self._hooks is None else self._hooks.reading(path):
            meta: dict[str, Any] = torch.load(path / META, weights_only=True)
            checkpoint = put_back(meta, folder.read_weights(module), folder.read_others(mesh))
            if "lr_schedulers" in meta:
                states = [folder.read_optimizer(meta, n, optimizer) for n, optimizer in enumerate(strategy.optimizers)]
                checkpoint["optimizer_states"] = states
        return checkpoint


@dataclass(frozen=True, slots=True)
class _Folder:
    """A checkpoint folder whose values every rank reads at the same time."""

    path: Path
    metadata: Metadata

    def read_weights(self, module: nn.Module) -> Any:
        """Shards as of the parameter of the same name and shape; other values complete."""
        own = {_plain_name(name): p for name, p in module.named_parameters(remove_duplicate=False)}
        return self._read("state_dict", lambda entry, where: _template(entry, own.get(str(where[0]))))

    def read_others(self, mesh: DeviceMesh | None) -> Any:
        """The sharded tensors that are neither weights nor states, by their references."""
        return self._read(OTHERS, lambda entry, where: _sharded(empty_value(entry), mesh))

    def read_optimizer(self, meta: Mapping[str, Any], number: int, optimizer: Optimizer) -> dict[str, Any]:
        """The state dict of an optimizer. As in one file, its parameters are known by their positions."""
        key = f"optimizer_{number}"
        groups = self._read(key, lambda entry, where: empty_value(entry), only="param_groups").get("param_groups", [])
        names = [name for group in groups for name in group["params"]]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        like = dict(zip(names, parameters, strict=False))
        state = self._read(key, lambda entry, where: _template(entry, like.get(where[1])), only="state")
        return to_plain_optimizer(put_structures(meta, key, {"param_groups": groups, **state}))[0]

    def _read(self, key: str, make: Callable[[Any, Any], Any], only: str | None = None) -> Any:
        """What is saved under a key; `make` returns what a value is read into, from its entry and its path below."""
        paths: Mapping[str, Any] = self.metadata.planner_data
        flat = {
            name: make(self.metadata.state_dict_metadata[name], where[1:])
            for name, where in paths.items()
            if where[0] == key and only in (None, *where[1:2])
        }
        if flat:
            read_values(self.path, self.metadata, flat)
        return nest(flat, self.metadata).get(key, {})


def load_weights(module: nn.Module, checkpoint: Mapping[str, Any], *, strict: bool) -> None:
    """Load weights into the shards; complete tensors are sharded when the module has the names that it loads."""
    handles = [
        part.register_load_state_dict_pre_hook(_shard_weights)
        for part in module.modules()
        if any(isinstance(p, DTensor) for p in part._parameters.values())
    ]
    try:
        module.load_state_dict(checkpoint["state_dict"], strict=strict)
    finally:
        for handle in handles:
            handle.remove()


def restore_finetuning(module: LightningModule) -> None:
    """Restore parameter groups that callbacks add to the optimizers, before the states of those are loaded.

    BaseFinetuning restores them in `on_fit_start`, which under FSDP2 comes before its own state is loaded.
    """
    for callback in module.trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(callback, BaseFinetuning) and callback._restarting:
            callback.on_fit_start(module.trainer, module)


def load_optimizers(optimizers: Sequence[Optimizer], checkpoint: Mapping[str, Any]) -> None:
    """Load the optimizers' states, as Lightning does, into the shards."""
    for optimizer, saved in zip(optimizers, checkpoint["optimizer_states"], strict=False):
        if "state" not in saved:
            optimizer.load_state_dict(saved)
            continue
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        state = {
            key: {name: _shard_state(value, parameters[key]) for name, value in values.items()}
            for key, values in saved["state"].items()
            if key < len(parameters)
        }
        optimizer.load_state_dict({**saved, "state": state})


def _shard_named(checkpoint: dict[str, Any], module: nn.Module | None) -> dict[str, Any]:
    """Shard a file's weights, and what the user's code has saved like them, such as averages, as in a folder.

    These are tensors with the name and shape of a parameter, and lists with one tensor for each parameter.
    """
    named = {} if module is None else {_plain_name(n): p for n, p in module.named_parameters(remove_duplicate=False)}
    whole = [] if module is None else list(module.parameters())
    lists = [whole, [p for p in whole if p.requires_grad]]

    def sharded(value: Any, key: Any) -> Any:
        if isinstance(value, Tensor):
            like = named.get(key) if isinstance(key, str) else None
            return _shard_like(value, like) if isinstance(like, DTensor) else None
        if type(value) is not list or not value or not all(isinstance(each, Tensor) for each in value):
            return None
        shapes = [each.shape for each in value]
        likes = next((like for like in lists if [p.shape for p in like] == shapes), None)
        if likes is None:
            return None
        return [_shard_like(a, b) if isinstance(b, DTensor) else a for a, b in zip(value, likes, strict=True)]

    shared = {key: value for key, value in checkpoint.items() if key != "optimizer_states"}
    return {**checkpoint, **replace_values(shared, sharded)}


def _template(entry: Any, like: Any) -> Any:
    if isinstance(entry, TensorStorageMetadata) and isinstance(like, DTensor) and like.shape == entry.size:
        return torch.empty_like(like, dtype=entry.properties.dtype, requires_grad=False)
    return empty_value(entry)


def _sharded(value: Tensor, mesh: DeviceMesh | None) -> Tensor:
    """As FSDP2 shards: by rows over the last dimension of the mesh."""
    if mesh is None:
        return value
    placements = [*[Replicate()] * (mesh.ndim - 1), Shard(0) if value.dim() else Replicate()]
    return _distributed(value, mesh, placements)


def _shard_weights(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, parameter in module._parameters.items():
        key = prefix + name
        if key in state and isinstance(parameter, DTensor):
            state[key] = _shard_like(state[key], parameter)


def _shard_state(value: Any, parameter: Tensor) -> Any:
    """A state of the parameter's shape is sharded as the parameter, another one is on every rank, as torch makes it.

    It may be a list or a dict of several, as that of LBFGS.
    """
    if isinstance(value, dict):
        return {key: _shard_state(each, parameter) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)([_shard_state(each, parameter) for each in value])
    if not isinstance(value, Tensor) or value.dim() == 0 or not isinstance(parameter, DTensor):
        return value
    if value.shape == parameter.shape:
        return _shard_like(value, parameter)
    if isinstance(value, DTensor):
        return value
    return _distributed(value, parameter.device_mesh, [Replicate()] * parameter.device_mesh.ndim)


def _shard_like(value: Any, like: DTensor) -> Any:
    """This rank's shard of a complete tensor, if it has the shape."""
    if isinstance(value, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    return _distributed(value, like.device_mesh, like.placements, device=like.to_local().device)


def _distributed(
    value: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], *, device: torch.device | None = None
) -> DTensor:
    """Slice without communication: every rank has the complete tensor, maybe as a mapped file."""
    local = value.detach()
    for dim, placement in enumerate(placements):
        if isinstance(placement, Shard):
            pieces = local.chunk(mesh.size(dim), placement.dim)
            rank = mesh.get_local_rank(dim)
            local = pieces[rank] if rank < len(pieces) else local.narrow(placement.dim, 0, 0)
    # A copy, so that no state refers to the whole tensor or to the file.
    local = local.to(device or mesh.device_type, copy=True, memory_format=torch.contiguous_format)
    stride = torch.empty(value.shape, device="meta").stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=value.shape, stride=stride)


def _whole(value: Any) -> Any:
    """DTensors that are partial sums, such as a norm in an optimizer's state, are summed: they cannot be saved."""
    if isinstance(value, DTensor) and any(isinstance(each, Partial) for each in value.placements):
        return value.redistribute(placements=[Replicate() if isinstance(p, Partial) else p for p in value.placements])
    if isinstance(value, dict):
        return {key: _whole(each) for key, each in value.items()}
    return [_whole(each) for each in value] if isinstance(value, list) else value


def _plain_name(name: str) -> str:
    return functools.reduce(lambda text, part: text.replace(part, ""), _WRAPPERS, name)
