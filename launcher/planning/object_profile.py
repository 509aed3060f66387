"""A `ModelProfile` of a model and data that are the caller's objects, without changing them.

The step is traced on a copy of the module with fake tensors, with a batch from a copy of the data. Code that cannot be
copied, or that could reach the caller's objects despite the copy, is not run: then only the parameters are known.
Output that the caller's code prints appears twice.
"""

from __future__ import annotations

import copy
import types
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from launcher.checkpoint.rng_state import capture, restore
from launcher.config.schema import RunConfig
from launcher.planning.profile import (
    MANUAL_OPTIMIZATION,
    SETTING_UP,
    TraceTarget,
    bound_profile,
    compute_bound,
    describe_error,
    sum_of_bytes,
    trace_profile,
)
from launcher.process.activity import doing
from launcher.user_code.objects import Loaders, UserObjects
from strategies.fake_mode import FakeMode, fake_copy
from strategies.model_shape import describe_parameters
from strategies.precision import Precision
from strategies.step_trace import ModelProfile, Unprofiled
from strategies.trace import PlannedTrainer, attach

# More is neither copied nor searched: planning should not take noticeable time and memory.
_MOST_OBJECTS = 100_000
_MOST_BYTES = 256 << 20
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Mutable through any reference.
_SHARED = (list, dict, set, bytearray, deque, Tensor)
_LIBRARIES = ("torch", "lightning", "torchmetrics", "builtins", "typing", "launcher")
# Not copied by a deep copy.
_PLAIN = (str, bytes, int, float, complex, bool, type(None), type, types.FunctionType, types.ModuleType)


class _NotCopyable(Exception):  # noqa: N818 -- gives the reason why objects are not copied
    pass


def profile_objects(
    config: RunConfig, given: UserObjects, precision: Precision, *, world_size: int, device_kind: str
) -> ModelProfile | Unprofiled:
    """Measure what every strategy's memory depends on, without changing the objects and random generators.

    Returns:
        `Unprofiled` if not even the parameters have a shape.
    """
    if sum_of_bytes(given.model) is None:
        return Unprofiled("it has parameters that get their shape with the first batch")
    trainer = PlannedTrainer(world_size, config.trainer.max_epochs or 1, config.trainer.max_steps)
    with _preserve_state(given.model):
        try:
            found = _profiled(given, precision, trainer, TraceTarget.of(config, device_kind))
        except Exception as error:  # noqa: BLE001 -- any error of the caller's objects
            found = Unprofiled(describe_error(error))
    if isinstance(found, ModelProfile):
        again = found.checkpointed
        return found if again is None else replace(found, checkpointed=cache(partial(_preserving, given.model, again)))
    model = describe_parameters(given.model)
    by_hand = None if given.model.automatic_optimization else MANUAL_OPTIMIZATION
    failure = f"the module was not copied for a trace ({found.why}): Adam's states are assumed"
    return compute_bound(given.model.parameters(), model, None, 1, failure, by_hand)


def _preserving(module: nn.Module, again: Callable[[], ModelProfile | None]) -> ModelProfile | None:
    with _preserve_state(module):
        return again()


def _profiled(
    given: UserObjects, precision: Precision, trainer: PlannedTrainer, target: TraceTarget
) -> ModelProfile | Unprofiled:
    try:
        _check_module(given.model)
    except _NotCopyable as reason:
        return Unprofiled(str(reason))

    def make() -> LightningModule:
        # Fails without a fake mode, so no real step is run.
        return fake_copy(given.model)

    try:
        with doing(SETTING_UP):
            batch = _first_batch(given, trainer)
    except Exception as error:  # noqa: BLE001 -- the caller's data; the training reports the error in full
        why = str(error) if isinstance(error, _NotCopyable) else describe_error(error)
        return bound_profile(make, None, 1, trainer, f"no batch was read ({why})")
    on_gpu = any(p.is_cuda for p in given.model.parameters())
    return trace_profile(make, batch, precision, trainer, replace(target, device="cuda" if on_gpu else "cpu"))


def _first_batch(given: UserObjects, trainer: PlannedTrainer) -> Any:
    """A batch of samples from copies, without advancing any iterator of the caller's."""
    if isinstance(given.data, Loaders):
        return _batch_of(given.data.train_dataloader())
    if given.data is None:
        with FakeMode():
            source: Any = fake_copy(given.model)
        attach(source, trainer)
    else:
        # The Trainer of an earlier training is not part of the data.
        source = copy.copy(given.data)
        source.trainer = None
        source = _copied(source, "the data")
        source.trainer = trainer
    source.setup("fit")
    return _batch_of(source.train_dataloader())


def _batch_of(loader: Any) -> Any:
    """The first samples by index. The sampler is not used, as it may draw random numbers and count."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset) or loader.batch_size is None:
        raise _NotCopyable("reading an iterable might take samples from the training")
    dataset, collate = _copied((loader.dataset, loader.collate_fn), "the dataset")
    return collate([dataset[index] for index in range(min(loader.batch_size, len(dataset)))])


def _copied(thing: Any, name: str) -> Any:
    _check_copyable(thing, name)
    return copy.deepcopy(thing)


def _check_module(module: nn.Module) -> None:
    """Check that a step of the copy does not change the original: no hook may write to other objects."""
    for part in module.modules():
        _check_class(type(part))
        for hook in (each for name in _HOOKS for each in getattr(part, name).values()):
            # Callable objects are copied with the module; functions and the objects they write to are not.
            if isinstance(hook, types.FunctionType) and not _of_libraries(hook.__module__):
                raise _NotCopyable(f"its hook {hook.__qualname__} may write to your own objects")
    _check_copyable(module, "it", tensors=False)


def _check_class(kind: type) -> None:
    """Check that a class of the caller's has no mutable state that its objects share, and that its methods use none."""
    for owner in (each for each in kind.__mro__ if not _of_libraries(each.__module__)):
        for name, value in vars(owner).items():
            if isinstance(value, types.FunctionType):
                used = (n for n in value.__code__.co_names if isinstance(value.__globals__.get(n), _SHARED))
                for outside in used:
                    raise _NotCopyable(f"{owner.__name__}.{name} uses {outside}, which is outside of it")
            elif isinstance(value, _SHARED) and not name.startswith("__"):
                raise _NotCopyable(f"its class attribute {owner.__name__}.{name} is one for all objects")


def _of_libraries(module: str | None) -> bool:
    """Whether a Python module belongs to a library, and not to the caller."""
    return (module or "").partition(".")[0] in _LIBRARIES


def _check_copyable(thing: Any, name: str, *, tensors: bool = True) -> None:
    """Check that a copy shares nothing with the original, and takes little time and memory.

    `name` is the object's in a message; without `tensors` its tensors are not copied.
    """
    # The references keep the ids unique.
    seen: dict[int, Any] = {}
    rest, size = [thing], 0
    while rest:
        value = rest.pop()
        if isinstance(value, types.FunctionType) and value.__closure__ and not _of_libraries(value.__module__):
            raise _NotCopyable(f"{name} has a function ({value.__qualname__}) that may hold your own objects")
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if tensors or not isinstance(value, Tensor):
            size += len(value) if isinstance(value, str | bytes) else _bytes(value)
        rest += [] if isinstance(value, _PLAIN) else _inside(value)
        if len(seen) + len(rest) > _MOST_OBJECTS or size > _MOST_BYTES:
            raise _NotCopyable(f"{name} is too large to copy")


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor) and value.layout is not torch.strided:
        return 0  # its indices and values are small
    count = getattr(value, "nbytes", 0)
    return count if isinstance(count, int) else 0


def _inside(value: Any) -> list[Any]:
    """The objects that a deep copy of it copies too."""
    if isinstance(value, Tensor):
        return []
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if isinstance(value, list | tuple | set | frozenset):
        return [*value]
    if hasattr(value, "nbytes"):
        return []
    try:
        reduced = value.__reduce_ex__(4)
    except Exception:  # noqa: BLE001 -- the copy itself raises the error later
        return []
    return [*reduced[1:3]] if isinstance(reduced, tuple) else []


@contextmanager
def _preserve_state(module: nn.Module) -> Iterator[None]:
    """Restore random generators and the gradients of the caller's parameters afterwards."""
    states = capture()
    gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
    try:
        yield
    finally:
        restore(states)
        for parameter, gradient in gradients:
            if parameter.grad is not gradient:
                parameter.grad = gradient
