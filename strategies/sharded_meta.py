"""The part of a sharded checkpoint that is not weights or optimizer states: callbacks, loops, values of the user."""

from __future__ import annotations

import copyreg
import pickle
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from typing_extensions import override

from strategies.base import StrategyError

# The key of other sharded tensors among the weights' and optimizers', and of the reference in their place.
OTHERS = "launcher_sharded"


# The key of values of the state dict whose structure torch's sharded checkpoints do not keep, such as numbers as keys.
NESTED = "launcher_extra_states"


def split_content(checkpoint: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Lightning's content as the values for torch's sharded checkpoints, and the rest; the inverse of `put_back`.

    Weights and optimizer states are removed from `checkpoint`, as Lightning does.
    """
    weights = checkpoint.pop("state_dict")
    tensors: dict[str, Any] = {"state_dict": weights}
    for number, state in enumerate(checkpoint.pop("optimizer_states", [])):
        tensors[f"optimizer_{number}"] = state
    nested = {name: value for name, value in weights.items() if isinstance(value, Mapping | list)}
    meta, others = take_out({**checkpoint, NESTED: nested} if nested else checkpoint)
    return {**tensors, OTHERS: others} if others else tensors, meta


def take_out(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A copy of the content with references in place of sharded tensors, and these by the references."""
    found: dict[str, Tensor] = {}

    def replaced(value: Any) -> Any:
        if isinstance(value, DTensor):
            key = str(len(found))
            found[key] = value.detach()
            return {OTHERS: key}
        return _mapped(value, replaced)

    return replaced(dict(checkpoint)), found


def put_back(meta: Mapping[str, Any], weights: dict[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The content as Lightning saves it, from what `take_out` has left, the weights, and the tensors taken out."""

    def replaced(value: Any) -> Any:
        if type(value) is dict and value.keys() == {OTHERS} and value[OTHERS] in tensors:
            return tensors[value[OTHERS]]
        return _mapped(value, replaced)

    content: dict[str, Any] = dict(replaced(dict(meta)))
    return {**content, "state_dict": {**weights, **content.pop(NESTED, {})}}


def _mapped(value: Any, change: Any) -> Any:
    """Values in dicts, lists and tuples changed; the same object if none is."""
    if isinstance(value, dict):
        made = {key: change(each) for key, each in value.items()}
        if all(made[key] is each for key, each in value.items()):
            return value
        if type(value) is dict:
            return made
        copied = value.copy()
        copied.update(made)
        return copied
    if type(value) in (list, tuple):
        items = [change(each) for each in value]
        return value if all(a is b for a, b in zip(items, value, strict=True)) else type(value)(items)
    return value


def write_meta(meta: Mapping[str, Any], file: Path) -> None:
    """Save the content; modules among the hyperparameters have no weights in it, as the checkpoint has them already.

    Raises:
        StrategyError: an object of the user's holds a shard, which is not the tensor.
    """
    kept = {id(p) for part in _modules_in(meta.get("hyper_parameters")) for p in part.parameters()}

    class ShardPickler(pickle.Pickler):
        """Writes modules as they were before they were sharded."""

        @override
        def reducer_override(self, obj: Any) -> Any:
            if isinstance(obj, DTensor):
                if id(obj) not in kept:
                    raise StrategyError(
                        "the checkpoint cannot be saved: an object in it holds a sharded tensor (DTensor) of shape "
                        f"{tuple(obj.shape)}; put the tensor itself in a dict or a list, or save `tensor.full_tensor()`"
                    )
                whole = torch.empty(obj.shape, dtype=obj.dtype, device="meta")
                return nn.Parameter(whole, requires_grad=obj.requires_grad).__reduce_ex__(2)
            return _reduced(obj) if isinstance(obj, nn.Module) else NotImplemented

    torch.save(meta, file, pickle_module=types.SimpleNamespace(__name__="pickle", Pickler=ShardPickler))


def _modules_in(values: Any) -> list[nn.Module]:
    if isinstance(values, nn.Module):
        return [values]
    inside = values.values() if isinstance(values, Mapping) else values if isinstance(values, list | tuple) else ()
    return [part for value in inside for part in _modules_in(value)]


def _reduced(module: nn.Module) -> Any:
    """How a module is pickled, without the class and the hooks that FSDP2 has given it."""
    if type(module).__reduce__ is not object.__reduce__ or type(module).__reduce_ex__ is not object.__reduce_ex__:
        return NotImplemented
    function, args, state, *more = module.__reduce_ex__(2)
    if function is not copyreg.__newobj__ or not isinstance(state, dict):  # type: ignore[attr-defined]
        return NotImplemented
    if isinstance(module, FSDPModule):
        # FSDP2 puts itself before the module's own class.
        args = (type(module).__mro__[2], *args[1:])
    hooks = {key: {n: hook for n, hook in value.items() if not _is_fsdp(hook)} for key, value in state.items()
             if key.endswith("_hooks") and isinstance(value, dict)}  # fmt: skip
    changed = {key: type(state[key])(value) for key, value in hooks.items() if len(value) < len(state[key])}
    return (function, args, {**state, **changed}, *more)


def _is_fsdp(hook: Any) -> bool:
    found = getattr(hook, "hook", hook)  # Module wraps the hooks of a state dict
    return (getattr(found, "__module__", None) or "").startswith(("torch.distributed", "strategies."))
