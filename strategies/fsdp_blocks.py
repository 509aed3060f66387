"""Finds the blocks of a model that are sharded and gathered one after another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from torch import nn

# Their forward passes only call their children, or they have none.
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_LEAST_SHARE = 0.05


def find_blocks(model: nn.Module, wrap: Sequence[str] = ()) -> list[nn.Module]:
    """The modules that get a group of their own, in the model's order; the rest is the root's group.

    They are the outermost modules of a class that occurs at least twice and has at least 5 % of the parameters.
    Layers without children are taken only if no such class has children.
    """
    if wrap:
        return [module for module in model.modules() if type(module).__name__ in wrap and module is not model]
    composite = _repeated(model, composite=True)
    return composite or _repeated(model, composite=False)


def _repeated(model: nn.Module, *, composite: bool) -> list[nn.Module]:
    total = sum(p.numel() for p in model.parameters()) or 1
    shared = _shared(model)
    counts: Counter[type] = Counter()
    sizes: Counter[type] = Counter()
    for module in model.modules():
        counts[type(module)] += 1
        sizes[type(module)] += sum(p.numel() for p in module.parameters())

    def is_block(module: nn.Module) -> bool:
        kind = type(module)
        if module is model or kind in _CONTAINERS or counts[kind] < 2 or sizes[kind] < _LEAST_SHARE * total:
            return False
        if composite != any(True for _ in module.children()):
            return False
        own = list(module.parameters())
        return bool(own) and not any(id(p) in shared for p in own)

    return list(_outermost(model, is_block))


def _outermost(module: nn.Module, is_block) -> Iterator[nn.Module]:
    for child in module.children():
        if is_block(child):
            yield child
        else:
            yield from _outermost(child, is_block)


def _shared(model: nn.Module) -> set[int]:
    """Ids of parameters that several modules hold."""
    held: Counter[int] = Counter(
        id(p) for module in model.modules() for p in module._parameters.values() if p is not None
    )
    return {key for key, count in held.items() if count > 1}
