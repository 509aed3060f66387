"""A `ModelProfile` of the user's module: traced on fake tensors, else measured in a real step, else a bound."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_iter

from launcher.config.schema import RunConfig
from launcher.core.errors import describe_error
from launcher.planning.first_batch import count_samples, read_first_batch, resize_batch
from launcher.process.activity import doing
from launcher.user_code.classes import UserClasses, make_model
from strategies.fake_mode import FakeMode
from strategies.model_shape import OptimizerError, describe_model, describe_parameters, find_optimizer
from strategies.model_states import ModelShape
from strategies.precision import Precision
from strategies.step_trace import ModelProfile, StepTrace, Unprofiled
from strategies.trace import PlannedTrainer, TraceOptions, TraceTypes, attach, trace_step

T = TypeVar("T")
_CUDA_GRANULARITY = 512  # torch's caching allocator rounds up to it
MANUAL_OPTIMIZATION = "the module optimizes by hand, and ZeRO steps by itself"
SETTING_UP = "setting up the data (its `setup`) and reading a batch"
# Copies kept of an element of a layer's output, in traces: the product, its norm, activation and residual.
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
    """Measure what every strategy's memory depends on, without the device and, if tracing works, without memory.

    This runs the user's code: constructors, the data's `setup`, `training_step` and `configure_optimizers`.

    Args:
        config: what to train.
        classes: the user's.
        precision: of the training.
        micro_batch_size: samples that a rank processes at once; None for the batch of the user's loader.
        world_size: number of ranks, for the Trainer that the module sees.
        device_kind: 'cpu', 'cuda' or 'mps': determines allocator and optimizer implementation.

    Returns:
        `Unprofiled` if the module could not be created; the plan then has no memory, and a notice.
    """
    trainer = PlannedTrainer(world_size, config.trainer.max_epochs or 1, config.trainer.max_steps)

    def make() -> LightningModule:
        return make_model(config, classes, micro_batch_size)

    try:
        with doing(SETTING_UP):
            batch = read_first_batch(config, classes, micro_batch_size, trainer)
    except Exception as error:  # noqa: BLE001 -- the user's data; the training reports the error in full
        return bound_profile(make, None, 1, trainer, f"no batch could be read ({describe_error(error)})")
    return trace_profile(make, batch, precision, trainer, TraceTarget.of(config, device_kind))


@dataclass(frozen=True, slots=True)
class TraceTarget:
    """What a traced step stands for.

    Attributes:
        device_kind: 'cpu', 'cuda' or 'mps': determines allocator and optimizer implementation.
        device: of the traced step, 'cpu' or 'cuda'; None uses the GPU's kernels if there is a GPU.
        wrap: names of the classes of the blocks that FSDP2 gathers; empty finds them.
        checkpoint_activations: the blocks' activations are computed again in the backward pass.
    """

    device_kind: str
    device: str | None = None
    wrap: tuple[str, ...] = ()
    checkpoint_activations: bool = False

    @classmethod
    def of(cls, config: RunConfig, device_kind: str, device: str | None = None) -> TraceTarget:
        """With the config's `fsdp.wrap` and `activation_checkpointing: true`."""
        return cls(device_kind, device, config.fsdp.blocks, config.activation_checkpointing is True)

    @property
    def options(self) -> TraceOptions:
        """Of a trace on fake tensors."""
        device = self.device or ("cuda" if self.device_kind == "cuda" and torch.cuda.is_available() else "cpu")
        on_cuda = self.device_kind == "cuda"
        granularity = _CUDA_GRANULARITY if on_cuda else 1
        checkpointed = self.checkpoint_activations
        return TraceOptions(True, device, on_cuda, granularity, wrap=self.wrap, checkpoint_activations=checkpointed)


def trace_profile(
    make: Callable[[], LightningModule],
    batch: Any,
    precision: Precision,
    trainer: PlannedTrainer,
    target: TraceTarget,
) -> ModelProfile | Unprofiled:
    """The profile of a module and a batch.

    Args:
        make: creates a new module, also under a fake mode; if it raises without one, no real step is tried.
        batch: of the user's loader.
        precision: of the training.
        trainer: the Trainer that the module sees.
        target: what the step stands for.
    """
    fake = target.options
    try:
        with doing("tracing a training step"):
            return _trace(make, batch, precision, trainer, fake)
    except Exception as error:  # noqa: BLE001 -- the user's module; a real step is tried instead, with a note
        failure = f"the step could not be traced ({describe_error(error)})"
    try:
        with doing("tracing a training step"):
            return _trace(make, batch, precision, trainer, replace(fake, is_fake=False, device="cpu"), failure)
    except Exception:  # noqa: BLE001 -- as above; a bound is computed instead
        return bound_profile(make, batch, count_samples(batch), trainer, failure)


def _trace(
    make: Callable[[], LightningModule],
    batch: Any,
    precision: Precision,
    trainer: PlannedTrainer,
    options: TraceOptions,
    failure: str = "",
) -> ModelProfile:
    size = count_samples(batch)
    half = _HALF.get(precision) or (torch.float64 if precision is Precision.FP64_TRUE else None)
    plain = TraceTypes(half, _AUTOCAST.get(precision))
    sharded = TraceTypes(half or _AUTOCAST.get(precision))
    gathered = replace(plain, parameters=_AUTOCAST.get(precision))
    other = size // 2 if size > 1 else 2

    def traced(types: TraceTypes, samples: int, *, with_optimizer: bool = False) -> tuple[StepTrace, ModelShape]:
        how = replace(options, with_optimizer=with_optimizer)
        return trace_step(make, resize_batch(batch, size, samples), samples, types=types, trainer=trainer, options=how)

    small, large = sorted((size, other))
    # The optimizer's step does not depend on the batch, and ZeRO's is known from the formulas.
    first, model = traced(plain, small, with_optimizer=True)

    def completed(trace: StepTrace) -> StepTrace:
        flops = first.flops * trace.batch_size // first.batch_size
        return replace(trace, step=first.step, optimizer_states=first.optimizer_states, flops=flops)

    traces = first, completed(traced(plain, large)[0])
    halved = traces
    if sharded != plain:
        halved = completed(traced(sharded, small)[0]), completed(traced(sharded, large)[0])
    cast, obstacle = None, None
    if gathered != plain:
        try:
            cast = completed(traced(gathered, small)[0]), completed(traced(gathered, large)[0])
        except Exception as error:  # noqa: BLE001 -- the user's module, which works with parameters in 32 bits
            obstacle = f"its step fails with parameters in 16 bits ({describe_error(error)})"
    notes = [] if options.is_fake else [f"{failure}; one real step was measured instead"]
    if options.foreach and options.device == "cpu":
        notes.append("activations were traced as a CPU computes them: kernels of a GPU may keep other temporaries")
    again = None
    if not options.checkpoint_activations:
        again = cache(partial(_trace_checkpointed, make, batch, precision, trainer, options))
    counted = first
    if options.checkpoint_activations:
        plainly = replace(options, checkpoint_activations=False, with_optimizer=True)
        counted, _ = trace_step(make, resize_batch(batch, size, small), small, types=plain, trainer=trainer,
                                options=plainly)  # fmt: skip
    method = "traced" if options.is_fake else "probed"
    return ModelProfile(
        model, traces, halved, method, tuple(notes), fsdp_obstacle=obstacle, gathered=cast, checkpointed=again,
        flops_per_sample=counted.flops / counted.batch_size,
    )  # fmt: skip


def _trace_checkpointed(
    make: Callable[[], LightningModule],
    batch: Any,
    precision: Precision,
    trainer: PlannedTrainer,
    options: TraceOptions,
) -> ModelProfile | None:
    """The profile with activation checkpointing; None if such a step cannot be traced."""
    try:
        with doing("tracing a training step with activation checkpointing"):
            return _trace(make, batch, precision, trainer, replace(options, checkpoint_activations=True))
    except Exception:  # noqa: BLE001 -- the user's module, whose step was traced without; the plan then has none with it
        return None


def bound_profile(
    make: Callable[[], LightningModule], batch: Any, size: int, trainer: PlannedTrainer, failure: str
) -> ModelProfile | Unprofiled:
    """An upper bound of activations from the widths of the layers and the rows of the batch."""
    fake = FakeMode()
    try:
        with fake, torch.random.fork_rng(devices=[]):
            module = make()
    except Exception as error:  # noqa: BLE001 -- the training reports the error in full
        return Unprofiled(describe_error(error))
    obstacle = None if module.automatic_optimization else MANUAL_OPTIMIZATION
    try:
        with fake:
            attach(module, trainer)
            model = describe_model(module, find_optimizer(module.configure_optimizers()))
    except Exception as error:  # noqa: BLE001 -- as above; Adam's states are assumed
        if isinstance(error, OptimizerError):
            obstacle = f"ZeRO takes one optimizer: {error}"
        failure += f"; no optimizer could be made ({describe_error(error)}): Adam's states are assumed"
        model = describe_parameters(module)
    return compute_bound(module.parameters(), model, batch, size, failure, obstacle)


def compute_bound(
    parameters: Iterable[Tensor], model: ModelShape, batch: Any, size: int, failure: str, obstacle: str | None
) -> ModelProfile:
    """The bound by the shapes of parameters and batch; `failure` is why the step was not traced."""
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


def parameter_bytes(config: RunConfig, classes: UserClasses, micro_batch_size: int | None) -> int | None:
    """Bytes of the module's parameters, created without memory; None if that fails."""
    module = make_without_memory(config, classes, micro_batch_size)
    return None if module is None else sum_of_bytes(module)


def make_without_memory(
    config: RunConfig, classes: UserClasses, micro_batch_size: int | None
) -> LightningModule | None:
    """The module, created without memory; None if that fails."""
    try:
        with doing("counting the model's parameters"), torch.device("meta"), torch.random.fork_rng(devices=[]):
            return make_model(config, classes, micro_batch_size)
    except Exception:  # noqa: BLE001 -- the training reports the error in full
        return None


def sum_of_bytes(module: nn.Module) -> int | None:
    """Bytes of the module's parameters; None if some get their shape with the first batch."""
    if any(is_lazy(p) for p in module.parameters()):
        return None
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _rows(tensor: Tensor) -> int:
    """Number of vectors for a layer: integers are tokens, images have pixels, else all but the last dimension."""
    if not tensor.is_floating_point() or tensor.ndim >= 4 or tensor.ndim < 2:
        return tensor.numel()
    return tensor.numel() // max(tensor.shape[-1], 1)
