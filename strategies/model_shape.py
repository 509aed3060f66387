"""The shape of a module and its optimizer for the memory formulas; works on fake, meta and real tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from strategies.fake_mode import FakeMode
from strategies.fsdp_blocks import find_blocks
from strategies.fsdp_modules import find_whole
from strategies.model_states import ModelShape, OptimizerShape, ParameterShape
from strategies.storage_tracker import StorageTracker

_PROBE_NUMEL = 1 << 20


class OptimizerError(ValueError):
    """`configure_optimizers` did not return one optimizer."""


def find_optimizer(configured: Any) -> Optimizer:
    """The one optimizer in what `configure_optimizers` returned, in any of Lightning's forms.

    Raises:
        OptimizerError: none, or several.
    """
    found = list(_optimizers(configured))
    if len(found) != 1:
        count = "no optimizer" if not found else f"{len(found)} optimizers"
        raise OptimizerError(f"configure_optimizers returned {count}; expected one")
    return found[0]


def _optimizers(configured: Any) -> list[Optimizer]:
    if isinstance(configured, Optimizer):
        return [configured]
    if isinstance(configured, Mapping):
        return _optimizers(configured.get("optimizer"))
    if isinstance(configured, Sequence):
        if len(configured) == 2 and all(isinstance(part, Sequence) for part in configured):
            configured = configured[0]  # ([optimizers], [schedulers])
        return [optimizer for part in configured for optimizer in _optimizers(part)]
    return []


def describe_model(
    module: nn.Module, optimizer: Optimizer, *, foreach: bool = False, wrap: Sequence[str] = ()
) -> ModelShape:
    """Parameters, groups, buffers and FSDP2's blocks, and the result of a probe of the optimizer.

    With `foreach` torch's multi-tensor optimizer step is used unless the user sets another. `wrap` are the names of the
    classes that FSDP2 gathers one after another; empty finds them.
    """
    parameters = list(module.parameters())
    index = {id(p): i for i, p in enumerate(parameters)}
    groups = tuple(tuple(index[id(p)] for p in group["params"] if id(p) in index) for group in optimizer.param_groups)
    shapes, blocks = _describe_parameters(module, wrap)
    floating = [b for b in module.buffers() if b.is_floating_point()]
    return ModelShape(
        shapes,
        groups,
        probe_optimizer(optimizer, foreach=foreach),
        sum(_bytes(b) for b in floating),
        sum(_bytes(b) for b in module.buffers() if not b.is_floating_point()),
        blocks,
    )


def describe_parameters(module: nn.Module, wrap: Sequence[str] = ()) -> ModelShape:
    """The shape of a module whose optimizer could not be made: Adam's over all parameters is assumed."""
    shapes, blocks = _describe_parameters(module, wrap)
    return ModelShape(shapes, (tuple(range(len(shapes))),), blocks=blocks)


def _describe_parameters(
    module: nn.Module, wrap: Sequence[str]
) -> tuple[tuple[ParameterShape, ...], tuple[tuple[int, ...], ...]]:
    """The module's parameters, and which of them FSDP2 gathers together: of nested blocks, the inner one has them."""
    blocks = find_blocks(module, wrap)
    whole, in_mixed = (find_whole(module, blocks, is_mixed=is_mixed) for is_mixed in (False, True))
    outer_first = sorted(enumerate(blocks), key=lambda pair: -sum(1 for _ in pair[1].modules()))
    owner = {id(p): number for number, block in outer_first for p in block.parameters()}
    shapes: list[ParameterShape] = []
    owned: list[list[int]] = [[] for _ in range(len(blocks) + 1)]
    for index, p in enumerate(module.parameters()):
        rows = len(p) if p.ndim else 0
        shapes.append(ParameterShape(p.numel(), p.requires_grad, rows, p in whole, p in in_mixed))
        if p not in whole:
            owned[owner.get(id(p), len(blocks))].append(index)
    return tuple(shapes), tuple(map(tuple, owned))


def probe_optimizer(optimizer: Optimizer, *, foreach: bool = False) -> OptimizerShape:
    """The memory of a step of an optimizer of this class, measured on a flat fake fp32 tensor.

    Returns:
        Adam's numbers under the optimizer's name if it cannot step on such a tensor (LBFGS needs a closure).
    """
    name = type(optimizer).__name__
    fake = FakeMode()
    tracker = StorageTracker()
    with fake:
        flat = nn.Parameter(torch.zeros(_PROBE_NUMEL))
        flat.grad = torch.zeros(_PROBE_NUMEL)
    twin: Optimizer = object.__new__(type(optimizer))
    # A scheduler's wrapper of `step` is bound to the original.
    twin.__dict__.update({k: v for k, v in optimizer.__dict__.items() if k != "step"})
    twin.state = defaultdict(dict)
    twin.param_groups = [{**optimizer.param_groups[0], "params": [flat]}]
    original = optimizer.param_groups[0]["params"][0]
    if foreach:
        use_foreach(twin)
    try:
        with fake, tracker:
            # Some optimizers make their states in the constructor, as Adagrad before torch 2.12.
            twin.state[flat] |= {k: _flatten(v, original, flat) for k, v in optimizer.state.get(original, {}).items()}
            twin.step()
            states = [value for value in twin.state[flat].values() if isinstance(value, Tensor)]
            tracker.reset_peak()
            before = tracker.activations
            twin.step()
    except Exception:  # noqa: BLE001 -- any optimizer of the user; the plan then assumes Adam
        return OptimizerShape(name)
    full = [value for value in states if value.numel() == _PROBE_NUMEL]
    return OptimizerShape(
        name,
        sum(value.element_size() for value in full),
        sum(_bytes(value) for value in states if value.numel() != _PROBE_NUMEL),
        -(-(tracker.peak_activations - before) // _PROBE_NUMEL),
    )


def _flatten(value: Any, original: Tensor, flat: Tensor) -> Any:
    """A state of the original parameter, as a fake one of the flat parameter."""
    if not isinstance(value, Tensor):
        return value
    if value.ndim == 0:
        # A fake tensor whose value is known.
        return torch.tensor(0, dtype=value.dtype)
    shape = flat.shape if value.shape == original.shape else value.shape
    # One of the parameter's type has the flat one's.
    return torch.zeros(shape, dtype=flat.dtype if value.dtype == original.dtype else value.dtype)


def use_foreach(optimizer: Optimizer) -> list[int]:
    """Set multi-tensor steps for groups that do not set an implementation: torch's default on CUDA.

    Returns:
        The numbers of the groups.
    """
    return _set_implementation(optimizer, "foreach")


def use_fused(optimizer: Optimizer) -> list[int]:
    """Set fused steps of shards, which are many times as fast on a CPU; see `use_foreach`."""
    # SGD and Adagrad have them too, but not for sharded parameters.
    is_supported = isinstance(optimizer, torch.optim.Adam)
    is_real = all(p.is_floating_point() for group in optimizer.param_groups for p in group["params"])
    return _set_implementation(optimizer, "fused") if is_supported and is_real else []


def _set_implementation(optimizer: Optimizer, name: str) -> list[int]:
    chosen = [
        number
        for number, group in enumerate(optimizer.param_groups)
        if group.get("foreach", False) is None and group.get("fused", False) is None and not group.get("differentiable")
    ]
    for number in chosen:
        optimizer.param_groups[number][name] = True
    return chosen


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
