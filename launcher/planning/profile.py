"""A `ModelProfile` of the user's module: traced on fake tensors, else probed by a real step, else bounded."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.data import DataLoader, IterableDataset

from launcher.config.schema import RunConfig
from launcher.process.activity import doing
from launcher.user_code.classes import UserClasses, make_data, make_model
from strategies.fake_mode import FakeMode
from strategies.model_shape import OptimizerError, describe_model, optimizer_of
from strategies.model_states import ModelShape, ParameterShape
from strategies.precision import Precision
from strategies.step_trace import ModelProfile, StepTrace, Unprofiled
from strategies.trace import PlannedTrainer, TraceTypes, attach, trace_step

T = TypeVar("T")
_CUDA_GRANULARITY = 512  # torch's caching allocator rounds up to it
SETTING_UP = "setting up the data (its `setup`) and reading a batch"
# A traced element of a layer's output is kept about this often: the product, its norm, activation and residual.
_KEPT_PER_OUTPUT = 4
_HALF = {Precision.FP16_TRUE: torch.float16, Precision.BF16_TRUE: torch.bfloat16}
_AUTOCAST = {Precision.FP16_MIXED: torch.float16, Precision.BF16_MIXED: torch.bfloat16}


def profile_model(
    config: RunConfig,
    classes: UserClasses,
    precision: Precision,
    micro_batch_size: int | None,
    *,
    world_size: int,
    device_kind: str,
) -> ModelProfile | Unprofiled:
    """Learn what every strategy's memory depends on, without the device and, where tracing works, without memory.

    The user's code runs: its constructors, the data's `setup`, `training_step` and `configure_optimizers`.

    Args:
        config: what to train.
        classes: the user's.
        precision: what it will compute in.
        micro_batch_size: samples that a rank takes at once; None takes what the user's loader gives.
        world_size: what the module may ask of its Trainer.
        device_kind: 'cpu', 'cuda' or 'mps': whose allocator and optimizer implementation count.

    Returns:
        `Unprofiled` if not even the module could be made; the plan then says that memory is not known, and why.
    """
    trainer = PlannedTrainer(world_size, config.trainer.max_epochs or 1, config.trainer.max_steps)

    def make() -> LightningModule:
        return make_model(config, classes, micro_batch_size)

    try:
        with doing(SETTING_UP):
            batch = first_batch(config, classes, micro_batch_size, trainer)
    except Exception as error:  # noqa: BLE001 -- the user's data; the training itself will tell it whole
        return bounded(make, None, 1, trainer, f"no batch could be read ({told(error)})")
    return profile_of(make, batch, precision, trainer, device_kind)


def profile_of(
    make: Callable[[], LightningModule],
    batch: Any,
    precision: Precision,
    trainer: PlannedTrainer,
    device_kind: str,
    *,
    device: str | None = None,
) -> ModelProfile | Unprofiled:
    """The profile of a module that can be made anew, and a batch.

    Args:
        make: makes the module anew, under a fake mode too; what it raises outside of one rules a real step out.
        batch: of the user's loader.
        precision: what it will compute in.
        trainer: what the module may ask of its Trainer.
        device_kind: see `profile_model`.
        device: where the traced step computes, 'cpu' or 'cuda'; None takes the GPU's own kernels where there are any.
    """
    size = samples_in(batch)
    failure = ""
    if device is None:
        device = "cuda" if device_kind == "cuda" and torch.cuda.is_available() else "cpu"
    for fake in (True, False):
        try:
            with doing("tracing a training step"):
                return _traced(make, batch, size, precision, trainer, fake, device_kind, device, failure)
        except Exception as error:  # noqa: BLE001 -- the user's module; the next method is tried, and told
            failure = failure or f"the step could not be traced ({told(error)})"
    return bounded(make, batch, size, trainer, failure)


def _traced(
    make: Callable[[], LightningModule],
    batch: Any,
    size: int,
    precision: Precision,
    trainer: PlannedTrainer,
    fake: bool,
    device_kind: str,
    device: str,
    failure: str,
) -> ModelProfile:
    on_cuda = device_kind == "cuda"
    device = device if fake else "cpu"
    half = _HALF.get(precision) or (torch.float64 if precision is Precision.FP64_TRUE else None)
    plain = TraceTypes(half, _AUTOCAST.get(precision))
    sharded = TraceTypes(half or _AUTOCAST.get(precision))
    other = size // 2 if size > 1 else 2

    def traced(types: TraceTypes, samples: int, whole: bool = False) -> tuple[StepTrace, ModelShape]:
        return trace_step(
            make,
            resized(batch, size, samples),
            samples,
            types=types,
            trainer=trainer,
            fake=fake,
            foreach=on_cuda,
            granularity=_CUDA_GRANULARITY if on_cuda else 1,
            device=device,
            whole=whole,
        )

    small, large = sorted((size, other))
    # The optimizer's step does not depend on the batch, and ZeRO's is known from the formulas.
    first, model = traced(plain, small, whole=True)

    def completed(trace: StepTrace) -> StepTrace:
        flops = first.flops * trace.batch_size // first.batch_size
        return replace(trace, step=first.step, optimizer_states=first.optimizer_states, flops=flops)

    traces = first, completed(traced(plain, large)[0])
    halved = traces
    if sharded != plain:
        halved = completed(traced(sharded, small)[0]), completed(traced(sharded, large)[0])
    notes = [] if fake else [f"{failure}; one real step was measured instead"]
    if on_cuda and device == "cpu":
        notes.append("activations were traced as a CPU computes them: kernels of a GPU may keep other temporaries")
    return ModelProfile(model, traces, halved, "traced" if fake else "probed", tuple(notes))


def bounded(
    make: Callable[[], LightningModule], batch: Any, size: int, trainer: PlannedTrainer, failure: str
) -> ModelProfile | Unprofiled:
    """Activations from the widths of the layers and the rows of the batch alone: crude, and meant to be too high."""
    fake = FakeMode()
    try:
        with fake, torch.random.fork_rng(devices=[]):
            module = make()
    except Exception as error:  # noqa: BLE001 -- the training itself will tell it whole
        return Unprofiled(told(error))
    obstacle = None if module.automatic_optimization else "the module optimizes by hand, and ZeRO steps by itself"
    try:
        with fake:
            attach(module, trainer)
            model = describe_model(module, optimizer_of(module.configure_optimizers()))
    except Exception as error:  # noqa: BLE001 -- as above; Adam's states are assumed
        if isinstance(error, OptimizerError):
            obstacle = f"ZeRO takes one optimizer: {error}"
        failure += f"; no optimizer could be made ({told(error)}): Adam's states are assumed"
        shapes = tuple(ParameterShape(p.numel(), p.requires_grad) for p in module.parameters())
        model = ModelShape(shapes, (tuple(range(len(shapes))),))
    return bound_of(module.parameters(), model, batch, size, failure, obstacle)


def bound_of(
    parameters: Iterable[Tensor], model: ModelShape, batch: Any, size: int, failure: str, obstacle: str | None
) -> ModelProfile:
    """The bound by the shapes of parameters and batch.

    Args:
        parameters: the module's; only their shapes are read.
        model: the same with the optimizer.
        batch: of the user's loader; None if none could be read.
        size: its samples.
        failure: why there is no better way.
        obstacle: see `ModelProfile.zero_obstacle`.
    """
    rows = max((_rows(t) for t in tree_iter(batch) if isinstance(t, Tensor)), default=size)
    matrices = [p for p in parameters if p.ndim > 1]
    outputs = sum(max(p.shape) for p in matrices)
    activations = _KEPT_PER_OUTPUT * 4 * rows * outputs
    gradients = 4 * model.trainable_numel
    step = model.trainable_numel * model.optimizer.temporary_bytes_per_element
    flops = 6 * rows * sum(p.numel() for p in matrices)
    inputs = sum(t.numel() * t.element_size() for t in tree_iter(batch) if isinstance(t, Tensor))
    trace = StepTrace(
        batch_size=size,
        forward=activations + inputs,
        backward=activations + inputs,
        backward_with_gradients=activations + inputs + gradients,
        inputs=inputs,
        step=step,
        optimizer_states=0,
        flops=flops,
    )
    known = "bounded by the layers' widths" if batch is not None else "not known, and not counted"
    notes = (f"{failure}; activations are {known}",)
    return ModelProfile(model, (trace, trace), (trace, trace), "bound", notes, obstacle)


def first_batch(config: RunConfig, classes: UserClasses, micro_batch_size: int | None, trainer: PlannedTrainer) -> Any:
    """The training loader's first batch, read in this process, without the loader's workers.

    `prepare_data` is not called: it may download. Whatever the user's code raises comes out as it is.
    """
    with torch.random.fork_rng(devices=[]):
        data = make_data(config, classes, micro_batch_size)
        if data is None:
            with FakeMode():
                source: Any = make_model(config, classes, micro_batch_size)
            attach(source, trainer)
        else:
            source = data
            source.trainer = trainer
        source.setup("fit")
        loader = source.train_dataloader()
        by_index = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
        if by_index and loader.batch_sampler is not None:
            indices = next(iter(loader.batch_sampler))
            return loader.collate_fn([loader.dataset[i] for i in indices])
        return next(iter(loader))


def samples_in(batch: Any) -> int:
    """Samples of a batch: the length of its first tensor."""
    return next((len(leaf) for leaf in tree_iter(batch) if isinstance(leaf, Tensor) and leaf.ndim), 1)


def resized(batch: Any, size: int, wanted: int) -> Any:
    """The batch with `wanted` samples: every tensor as long as the batch is cut, or repeated."""

    def one(leaf: Any) -> Any:
        if not (isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == size) or wanted == size:
            return leaf
        return leaf[torch.arange(wanted) % size]

    return tree_map(one, batch)


def parameter_bytes(config: RunConfig, classes: UserClasses, micro_batch_size: int | None) -> int | None:
    """Bytes of the module's parameters, made without memory; None if it cannot be made so."""
    try:
        with doing("counting the model's parameters"), torch.device("meta"), torch.random.fork_rng(devices=[]):
            module = make_model(config, classes, micro_batch_size)
    except Exception:  # noqa: BLE001 -- the training itself will tell it whole
        return None
    return sum_of_bytes(module)


def sum_of_bytes(module: nn.Module) -> int | None:
    """Bytes of the module's parameters; None if it has some that get their shape with the first batch."""
    if any(is_lazy(p) for p in module.parameters()):
        return None
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _rows(tensor: Tensor) -> int:
    """Vectors that a layer sees: tokens of whole numbers, pixels of images, else all but the last dimension."""
    if not tensor.is_floating_point() or tensor.ndim >= 4 or tensor.ndim < 2:
        return tensor.numel()
    return tensor.numel() // max(tensor.shape[-1], 1)


def told(error: Exception) -> str:
    """An error's kind and the first line of its text."""
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:200]}" if first else type(error).__name__
