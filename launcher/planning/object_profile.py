"""A `ModelProfile` of a model and data that are objects of the caller's, and stay as they are.

The step is traced on a copy of the module whose tensors are fake, with a batch from a copy of the data. What cannot be
copied, or might reach the caller's objects in spite of the copy, is not run: then its parameters alone are known. What
the caller's code prints or writes to files comes once more.
"""

from __future__ import annotations

import copy
import types
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from launcher.checkpoint.rng_state import capture, restore
from launcher.config.schema import RunConfig
from launcher.planning.profile import SETTING_UP, bound_of, bounded, profile_of, sum_of_bytes, told
from launcher.process.activity import doing
from launcher.user_code.objects import Loaders, UserObjects
from strategies.fake_mode import FakeMode, fake_copy
from strategies.model_states import ModelShape, ParameterShape
from strategies.precision import Precision
from strategies.step_trace import ModelProfile, Unprofiled
from strategies.trace import PlannedTrainer, attach

# More than this is neither copied nor looked through: planning should take no time and memory that one notices.
_MOST_OBJECTS = 100_000
_MOST_BYTES = 256 << 20
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Filled by whoever has a reference.
_SHARED = (list, dict, set, bytearray, deque, Tensor)
_LIBRARIES = ("torch", "lightning", "torchmetrics", "builtins", "typing", "launcher")
# What a deep copy shares.
_PLAIN = (str, bytes, int, float, complex, bool, type(None), type, types.FunctionType, types.ModuleType)


class _NotCopied(Exception):  # noqa: N818 -- says why the caller's objects are left alone
    pass


def profile_objects(
    config: RunConfig, given: UserObjects, precision: Precision, *, world_size: int, device_kind: str
) -> ModelProfile | Unprofiled:
    """Learn what every strategy's memory depends on, and leave the objects and all random generators as they are.

    Args:
        config: how long to train.
        given: the caller's objects.
        precision: what will be computed in.
        world_size: what the module may ask of its Trainer.
        device_kind: 'cpu', 'cuda' or 'mps': whose allocator and optimizer implementation count.

    Returns:
        Why nothing is known if not even the parameters have a shape.
    """
    if sum_of_bytes(given.model) is None:
        return Unprofiled("it has parameters that get their shape with the first batch")
    trainer = PlannedTrainer(world_size, config.trainer.max_epochs or 1, config.trainer.max_steps)
    with _untouched(given.model):
        try:
            found = _profiled(given, precision, trainer, device_kind)
        except Exception as error:  # noqa: BLE001 -- whatever the caller's objects do when they are looked at
            found = Unprofiled(told(error))
    if isinstance(found, ModelProfile):
        return found
    shapes = tuple(ParameterShape(p.numel(), p.requires_grad) for p in given.model.parameters())
    model = ModelShape(shapes, (tuple(range(len(shapes))),))
    by_hand = None if given.model.automatic_optimization else "the module optimizes by hand, and ZeRO steps by itself"
    failure = f"the module was not copied for a trace ({found.why}): Adam's states are assumed"
    return bound_of(given.model.parameters(), model, None, 1, failure, by_hand)


def _profiled(
    given: UserObjects, precision: Precision, trainer: PlannedTrainer, device_kind: str
) -> ModelProfile | Unprofiled:
    try:
        _check_module(given.model)
    except _NotCopied as reason:
        return Unprofiled(str(reason))

    def make() -> LightningModule:
        # No real step: outside of a fake mode there is no copy.
        return fake_copy(given.model)

    try:
        with doing(SETTING_UP):
            batch = _first_batch(given, trainer)
    except Exception as error:  # noqa: BLE001 -- the caller's data; the training itself will tell it whole
        why = str(error) if isinstance(error, _NotCopied) else told(error)
        return bounded(make, None, 1, trainer, f"no batch was read ({why})")
    on_gpu = any(p.is_cuda for p in given.model.parameters())
    return profile_of(make, batch, precision, trainer, device_kind, device="cuda" if on_gpu else "cpu")


def _first_batch(given: UserObjects, trainer: PlannedTrainer) -> Any:
    """A batch of samples from copies: no iterator of the caller's is asked for anything."""
    if isinstance(given.data, Loaders):
        return _batch_of(given.data.train_dataloader())
    if given.data is None:
        with FakeMode():
            source: Any = fake_copy(given.model)
        attach(source, trainer)
    else:
        # An earlier training's Trainer is no part of the data.
        source = copy.copy(given.data)
        source.trainer = None
        source = _copied(source, "the data")
        source.trainer = trainer
    source.setup("fit")
    return _batch_of(source.train_dataloader())


def _batch_of(loader: Any) -> Any:
    """The first samples by their indices; the sampler, which may draw and count, is not asked."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset) or loader.batch_size is None:
        raise _NotCopied("reading an iterable might take samples from the training")
    dataset, collate = _copied((loader.dataset, loader.collate_fn), "the dataset")
    return collate([dataset[index] for index in range(min(loader.batch_size, len(dataset)))])


def _copied(thing: Any, name: str) -> Any:
    _check_copyable(thing, name)
    return copy.deepcopy(thing)


def _check_module(module: nn.Module) -> None:
    """Whether a step of the copy leaves the original alone.

    Raises:
        _NotCopied: a hook may tell of it, or see `_check_copyable`.
    """
    for part in module.modules():
        _check_class(type(part))
        for hook in (each for name in _HOOKS for each in getattr(part, name).values()):
            # A callable object is copied with the module; a function is not, nor is what it writes to.
            if isinstance(hook, types.FunctionType) and not _of_libraries(hook.__module__):
                raise _NotCopied(f"its hook {hook.__qualname__} may write to your own objects")
    _check_copyable(module, "it", tensors=False)


def _check_class(kind: type) -> None:
    """Whether a class of the caller's has, or its methods name, something that all its objects share and may fill.

    Raises:
        _NotCopied: it has.
    """
    for owner in (each for each in kind.__mro__ if not _of_libraries(each.__module__)):
        for name, value in vars(owner).items():
            if isinstance(value, types.FunctionType):
                used = (n for n in value.__code__.co_names if isinstance(value.__globals__.get(n), _SHARED))
                for outside in used:
                    raise _NotCopied(f"{owner.__name__}.{name} uses {outside}, which is outside of it")
            elif isinstance(value, _SHARED) and not name.startswith("__"):
                raise _NotCopied(f"its class attribute {owner.__name__}.{name} is one for all objects")


def _of_libraries(module: str | None) -> bool:
    """Whether what a Python module defines holds nothing of the caller's."""
    return (module or "").partition(".")[0] in _LIBRARIES


def _check_copyable(thing: Any, name: str, *, tensors: bool = True) -> None:
    """Whether a copy is apart from the original, and takes little time and memory.

    Args:
        thing: whatever is to be copied.
        name: what it is called.
        tensors: whether its tensors are copied too.

    Raises:
        _NotCopied: it is large, or a function in it may hold what the copy should not reach.
    """
    # What is kept here keeps its id.
    seen: dict[int, Any] = {}
    rest, size = [thing], 0
    while rest:
        value = rest.pop()
        if isinstance(value, types.FunctionType) and value.__closure__ and not _of_libraries(value.__module__):
            raise _NotCopied(f"{name} has a function ({value.__qualname__}) that may hold your own objects")
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if tensors or not isinstance(value, Tensor):
            size += len(value) if isinstance(value, str | bytes) else _bytes(value)
        rest += [] if isinstance(value, _PLAIN) else _inside(value)
        if len(seen) + len(rest) > _MOST_OBJECTS or size > _MOST_BYTES:
            raise _NotCopied(f"{name} is too large to copy")


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor) and value.layout is not torch.strided:
        return 0  # its indices and values are small against what it stands for
    count = getattr(value, "nbytes", 0)
    return count if isinstance(count, int) else 0


def _inside(value: Any) -> list[Any]:
    """What a deep copy of it copies too."""
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
    except Exception:  # noqa: BLE001 -- what cannot be copied says so when it is
        return []
    return [*reduced[1:3]] if isinstance(reduced, tuple) else []


@contextmanager
def _untouched(module: nn.Module) -> Iterator[None]:
    """Random generators go on as before, and no gradient of the caller's parameters comes or goes."""
    states = capture()
    gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
    try:
        yield
    finally:
        restore(states)
        for parameter, gradient in gradients:
            if parameter.grad is not gradient:
                parameter.grad = gradient
