"""Finds the blocks of a model that are sharded and gathered one after another."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from torch import nn

from strategies.base import StrategyError
from strategies.units import join_some

# Their forward passes only call their children, or they have none.
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# Attention reads the weights of this layer without calling it.
_NEVER_CALLED = (nn.modules.linear.NonDynamicallyQuantizableLinear,)
_LEAST_SHARE = 0.05


def find_blocks(model: nn.Module, wrap: Sequence[str] = ()) -> list[nn.Module]:
    """The modules whose parameters are gathered together for their forward pass, and freed after it.

    By default they are the outermost modules of a class that occurs at least twice and has at least 5 % of all
    parameters, such as the layers of a transformer. Layers without children are taken only if no class with children
    qualifies, as in an MLP. Modules that are never called themselves (lists) do not qualify, nor do modules that share
    a parameter with another one (tied weights), nor experts: a rank may have no tokens for one that others call. All
    other parameters are gathered for the whole step.

    Args:
        model: the LightningModule; never a block itself.
        wrap: names of classes, whose modules and those of subclasses are taken instead.

    Returns:
        In the model's order. A block that contains another one is before it; `fully_shard` needs the reverse.
    """
    if wrap:
        return [m for m in model.modules() if m is not model and _matches(m, wrap) and _has_parameters(m)]
    composite = _repeated(model, has_children=True)
    return composite or _repeated(model, has_children=False)


def check_wrap(model: nn.Module, names: Sequence[str]) -> None:
    """Check the config's `fsdp.wrap` against a model.

    Raises:
        StrategyError: a name is no class of a module in the model, or the class cannot be gathered by itself.
    """
    shared = _shared(model)
    inside = [module for module in model.modules() if module is not model]
    for name in names:
        found = [module for module in inside if _matches(module, [name])]
        if not found:
            known = sorted({type(m).__name__ for m in inside if _has_parameters(m) and is_called(m)})
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"its classes are {join_some(known)}"
            where = f"{type(model).__name__} has no module of that class"
            raise StrategyError(f"fsdp.wrap has {name!r}, but {where}; {hint}")
        if not all(is_called(module) for module in found):
            raise StrategyError(
                f"fsdp.wrap has {name!r}, whose modules are never called, so that nothing would gather their "
                "parameters; name the class of the modules in them"
            )
        for module in found:
            own = Counter(id(p) for m in module.modules() for p in m._parameters.values() if p is not None)
            if any(shared[key] > own[key] for key in own):
                raise StrategyError(
                    f"fsdp.wrap has {name!r}, a module of which shares a parameter with a module outside of it; leave "
                    "it out, so that the parameter is gathered for the whole step"
                )


def is_called(module: nn.Module) -> bool:
    """Whether the module has a forward pass of its own; lists of modules have none."""
    return type(module).forward is not nn.Module.forward and not isinstance(module, _NEVER_CALLED)


def _matches(module: nn.Module, names: Sequence[str]) -> bool:
    return any(kind.__name__ in names for kind in type(module).__mro__ if kind not in (nn.Module, object))


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _repeated(model: nn.Module, *, has_children: bool) -> list[nn.Module]:
    total = sum(map(_numel, model.parameters())) or 1
    shared = _shared(model)
    counts: Counter[type] = Counter()
    sizes: Counter[type] = Counter()
    for module in model.modules():
        counts[type(module)] += 1
        sizes[type(module)] += sum(map(_numel, module.parameters()))

    def is_block(module: nn.Module) -> bool:
        kind = type(module)
        if module is model or kind in _CONTAINERS or counts[kind] < 2 or sizes[kind] < _LEAST_SHARE * total:
            return False
        if not is_called(module) or has_children != any(True for _ in module.children()):
            return False
        own = list(module.parameters())
        return bool(own) and not any(shared[id(p)] > 1 for p in own)

    return list({id(block): block for block in _outermost(model, is_block)}.values())


def _numel(parameter: nn.Parameter) -> int:
    """Elements, of a parameter that DeepSpeed has partitioned too."""
    return getattr(parameter, "ds_numel", parameter.numel())


def _outermost(module: nn.Module, is_block: Callable[[nn.Module], bool]) -> Iterator[nn.Module]:
    for name, child in module.named_children():
        if _is_expert(name, child):
            continue
        if is_block(child):
            yield child
        else:
            yield from _outermost(child, is_block)


def _is_expert(name: str, module: nn.Module) -> bool:
    """Whether it is an expert of a mixture, or a list of them."""
    return "expert" in name.lower() or "expert" in type(module).__name__.lower()


def _shared(model: nn.Module) -> Counter[int]:
    """How many modules hold each parameter, by its id."""
    return Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
