"""The part of a sharded checkpoint that is not weights or optimizer states: callbacks, loops, values of the user."""

from __future__ import annotations

import copyreg
import functools
import inspect
import pickle
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from typing_extensions import override

from strategies.base import StrategyError

# The key of other sharded tensors among the weights' and optimizers', and of the reference in their place.
OTHERS = "launcher_sharded"
# What `fully_shard` adds to a module's attributes.
_ADDED = (STATE_KEY, REGISTRY_KEY, "_is_fsdp_managed_module", "_fsdp_use_orig_params")
# The key of values of the state dict whose structure torch's sharded checkpoints do not keep, such as numbers as keys.
NESTED = "launcher_extra_states"
# The key of the structures of optimizers' states that they do not keep either, by optimizer, parameter and state.
STRUCTURES = "launcher_state_structures"


def split_content(checkpoint: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Lightning's content as the values for torch's sharded checkpoints, and the rest; the inverse of `put_back`.

    Weights and optimizer states are removed from `checkpoint`, as Lightning does.
    """
    weights = checkpoint.pop("state_dict")
    tensors: dict[str, Any] = {"state_dict": weights}
    added: dict[str, Any] = {
        NESTED: {name: value for name, value in weights.items() if isinstance(value, Mapping | list)}
    }
    structures: dict[str, Any] = {}
    for number, state in enumerate(checkpoint.pop("optimizer_states", [])):
        key = f"optimizer_{number}"
        values = {name: {each: to_storable(value) for each, value in own.items()} if isinstance(own, dict) else own
                  for name, own in state.get("state", {}).items()}  # fmt: skip
        tensors[key] = {**state, "state": values} if values else state
        structures[key] = _structures(state.get("state", {}))
    added[STRUCTURES] = {key: value for key, value in structures.items() if value}
    meta, others = take_out({**checkpoint, **{key: value for key, value in added.items() if value}})
    return {**tensors, OTHERS: others} if others else tensors, meta


def take_out(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A copy of the content with references in place of sharded tensors, and these by the references."""
    found: dict[str, Tensor] = {}

    def reference(value: Any, _: Any) -> Any:
        if not isinstance(value, DTensor):
            return None
        key = str(len(found))
        found[key] = value.detach()
        return {OTHERS: key}

    return dict(replace_values(dict(checkpoint), reference)), found


def put_back(meta: Mapping[str, Any], weights: dict[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The content as Lightning saves it, from what `take_out` has left, the weights, and the tensors taken out."""

    def tensor(value: Any, _: Any) -> Any:
        is_reference = type(value) is dict and value.keys() == {OTHERS} and isinstance(value[OTHERS], str)
        return tensors.get(value[OTHERS]) if is_reference else None

    content: dict[str, Any] = dict(replace_values(dict(meta), tensor))
    content.pop(STRUCTURES, None)
    return {**content, "state_dict": {**weights, **content.pop(NESTED, {})}}


def replace_values(
    value: Any, replace: Callable[[Any, Any], Any], key: Any = None, inside: tuple[Any, ...] = ()
) -> Any:
    """Values in dicts, lists and tuples replaced unless `replace` returns None; the same object if none is.

    `replace` gets a value and its key in a dict. `inside` are the containers around it, as one may contain itself.
    """
    made = replace(value, key)
    if made is not None:
        return made
    if any(value is each for each in inside):
        return value
    inside = (*inside, value)
    if isinstance(value, dict):
        pairs = {name: replace_values(each, replace, name, inside) for name, each in value.items()}
        if all(pairs[name] is each for name, each in value.items()):
            return value
        if type(value) is dict:
            return pairs
        copied = value.copy()
        copied.update(pairs)
        return copied
    if type(value) in (list, tuple):
        items = [replace_values(each, replace, None, inside) for each in value]
        return value if all(a is b for a, b in zip(items, value, strict=True)) else type(value)(items)
    return value


def to_storable(value: Any) -> Any:
    """Lists in place of tuples, of which torch's sharded checkpoints save no tensor by itself, None of empty dicts."""
    if isinstance(value, dict):
        return {key: to_storable(each) for key, each in value.items()} or None
    return [to_storable(each) for each in value] if isinstance(value, list | tuple) else value


def put_structures(meta: Mapping[str, Any], key: str, saved: Mapping[str, Any]) -> dict[str, Any]:
    """A saved optimizer with its states as the optimizer had them; the inverse of what `split_content` does to it."""
    states: dict[str, Any] = {name: dict(values) for name, values in saved.get("state", {}).items()}
    for name, structures in meta.get(STRUCTURES, {}).get(key, {}).items():
        own = states.setdefault(name, {})
        own.update({each: _structured(own.get(each), like) for each, like in structures.items()})
    return {**saved, "state": states} if states else dict(saved)


def _structures(states: Mapping[str, Any]) -> dict[str, Any]:
    """Containers of the states that are not as they were when they are read, without what is in them."""
    found = {name: {key: value for key, value in values.items() if not _is_kept(value)}
             for name, values in states.items() if isinstance(values, Mapping)}  # fmt: skip
    return {name: {key: _containers(each) for key, each in values.items()} for name, values in found.items() if values}


def _is_kept(value: Any) -> bool:
    if isinstance(value, Mapping):
        return bool(value) and all(isinstance(key, str) and _is_kept(each) for key, each in value.items())
    return all(map(_is_kept, value)) if isinstance(value, list) else not isinstance(value, tuple)


def _containers(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _containers(each) for key, each in value.items()}
    made = [_containers(each) for each in value] if isinstance(value, list | tuple) else None
    return tuple(made) if isinstance(value, tuple) and made is not None else made


def _structured(value: Any, like: Any) -> Any:
    if isinstance(like, dict):
        found = value or {}
        return {key: _structured(found.get(str(key)), each) for key, each in like.items()}
    if isinstance(like, list | tuple):
        return type(like)(_structured(*each) for each in zip(value or (), like, strict=True))
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


def allocate_modules(meta: Mapping[str, Any]) -> None:
    """Give modules among the hyperparameters zeros in place of the weights that `write_meta` has left out.

    The model that has such a module loads its weights into it.
    """
    made: dict[int, nn.Parameter] = {}
    for part in (each for module in _modules_in(meta.get("hyper_parameters")) for each in module.modules()):
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.is_meta:
                zeros = torch.zeros(parameter.shape, dtype=parameter.dtype)
                part._parameters[name] = made.setdefault(id(parameter), nn.Parameter(zeros, parameter.requires_grad))


def _modules_in(values: Any) -> list[nn.Module]:
    if isinstance(values, nn.Module):
        return [values]
    inside = values.values() if isinstance(values, Mapping) else values if isinstance(values, list | tuple) else ()
    return [part for value in inside for part in _modules_in(value)]


def _reduced(module: nn.Module) -> Any:
    """How a module is pickled, without the class, the hooks and the methods that FSDP2 has given it."""
    if type(module).__reduce__ is not object.__reduce__ or type(module).__reduce_ex__ is not object.__reduce_ex__:
        return NotImplemented
    function, args, state, *more = module.__reduce_ex__(2)
    if function is not copyreg.__newobj__ or not isinstance(state, dict):  # type: ignore[attr-defined]
        return NotImplemented
    own = type(module)
    if isinstance(module, FSDPModule):
        # FSDP2 puts itself before the module's own class. `__newobj__` would require the class of the object.
        own = own.__mro__[2]
        function, args = copyreg._reconstructor, (own, object, None)  # type: ignore[attr-defined]
    # A method of a block is replaced by one that gathers its weights first, or a compiled one.
    replaced = [key for key in state if own is not type(module) and inspect.isfunction(getattr(own, key, None))]
    state = {key: value for key, value in state.items() if key not in (*replaced, *_ADDED)}
    hooks = {key: {n: hook for n, hook in value.items() if not _is_fsdp(hook)} for key, value in state.items()
             if key.endswith("_hooks") and isinstance(value, dict)}  # fmt: skip
    changed = {key: type(state[key])(value) for key, value in hooks.items() if len(value) < len(state[key])}
    return (function, args, {**state, **changed}, *more)


def _is_fsdp(hook: Any) -> bool:
    found = getattr(hook, "hook", hook)  # Module wraps the hooks of a state dict
    found = found.func if isinstance(found, functools.partial) else found
    return (getattr(found, "__module__", None) or "").startswith(("torch.distributed", "strategies."))
