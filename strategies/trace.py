"""Traces one training step of a LightningModule on fake tensors: without memory, device or computation."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from typing_extensions import override

from strategies.block_checkpoints import checkpoint_blocks
from strategies.block_hooks import BlockHooks
from strategies.cpu_workspaces import CpuWorkspaces
from strategies.fake_mode import FakeMode
from strategies.fsdp_blocks import find_blocks
from strategies.fsdp_modules import find_whole
from strategies.model_shape import describe_model, find_optimizer, use_foreach
from strategies.model_states import ModelShape
from strategies.step_trace import BlockEvent, GradientArrival, StepTrace
from strategies.storage_tracker import StorageTracker


@dataclass(frozen=True, slots=True)
class TraceTypes:
    """The types that the step computes in.

    Attributes:
        module: type that parameters, buffers and floating-point inputs are cast to; None for no cast.
        autocast: type of `torch.autocast`; None for no autocast.
        parameters: type that only the parameters are cast to, as FSDP2 gathers them; None for no cast.
    """

    module: torch.dtype | None = None
    autocast: torch.dtype | None = None
    parameters: torch.dtype | None = None


@dataclass(frozen=True, slots=True)
class TraceOptions:
    """The device of the step, the device that it represents, and the parts that are traced.

    Attributes:
        is_fake: on fake tensors; else a real step on this machine, with real numbers and memory.
        device: 'cpu', or 'cuda' where this torch sees one: then the workspaces of its kernels are traced.
        foreach: use torch's multi-tensor optimizer step unless the user sets another, as torch does on a GPU.
        granularity: bytes that the device's allocator rounds up to.
        with_optimizer: trace the optimizer's step and count operations; else `step`, `optimizer_states` and `flops`
            of the trace are 0.
        checkpoint_activations: the blocks' activations are computed again in the backward pass.
        wrap: names of the classes that FSDP2 gathers one after another; empty finds them.
    """

    is_fake: bool = True
    device: str = "cpu"
    foreach: bool = False
    granularity: int = 1
    with_optimizer: bool = True
    checkpoint_activations: bool = False
    wrap: tuple[str, ...] = ()


FAKE_CPU = TraceOptions()


def _count_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _count_attention_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape)


# torch has formulas for the fused attention of GPUs only.
CPU_FORMULAS: Mapping[Any, Callable[..., int]] = MappingProxyType(
    {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _count_attention,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _count_attention_backward,
    }
)


class _FlopCount(TorchDispatchMode):
    """Counts the operations of matrix products, convolutions and attention by torch's formulas."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket) or CPU_FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self.flops += int(formula(*args, **(kwargs or {}), out_val=out))
        return out


class PlannedTrainer:
    """The attributes of a Trainer that a module may use during planning; others raise AttributeError."""

    def __init__(self, world_size: int = 1, max_epochs: int = 1, max_steps: int = -1) -> None:
        self.world_size = world_size
        self.num_devices = world_size
        self.num_nodes = 1
        self.max_epochs = max_epochs
        self.max_steps = max_steps
        self.estimated_stepping_batches = max_steps if max_steps > 0 else 1000
        self.global_step = 0
        self.current_epoch = 0
        self.global_rank = self.local_rank = self.node_rank = 0
        self.accumulate_grad_batches = 1
        self.num_training_batches = self.estimated_stepping_batches
        self.training = True
        self.validating = self.testing = self.predicting = self.sanity_checking = False
        self.is_global_zero = True
        self.loggers: list[Any] = []
        self.logger = None
        self.callbacks: list[Any] = []
        self.callback_metrics: dict[str, Any] = {}
        self.logged_metrics: dict[str, Any] = {}


def trace_step(
    make_module: Callable[[], LightningModule],
    batch: Any,
    batch_size: int,
    *,
    types: TraceTypes = TraceTypes(),
    trainer: PlannedTrainer | None = None,
    options: TraceOptions = FAKE_CPU,
) -> tuple[StepTrace, ModelShape]:
    """Run one training step as Lightning's automatic optimization does, and measure its phases.

    Gradients are counted separately from activations, so it does not matter that the first forward pass has none.
    Errors of the user's code are raised unchanged.
    """
    mode = FakeMode(allow_non_fake_inputs=True) if options.is_fake else None
    device, granularity = options.device, options.granularity
    within: Callable[[], AbstractContextManager[Any]] = nullcontext if mode is None else (lambda: mode)
    tracker, count = StorageTracker(granularity), _FlopCount()
    # A real step on real tensors has real ones.
    onednn = CpuWorkspaces()
    workspaces: AbstractContextManager[Any] = onednn if options.is_fake and device == "cpu" else nullcontext()
    with _quiet(), within():
        with torch.device(device):
            module = make_module()
        blocks = find_blocks(module, options.wrap)
        kept = () if types.parameters is None else find_whole(module, blocks, is_mixed=True)
        _cast(module, types.module or types.parameters, kept, buffers=types.module is not None)
        inputs = tree_map(lambda leaf: _prepare(leaf, mode, types.module, device), batch)
        attach(module, trainer or PlannedTrainer())
        module.train()
        if options.checkpoint_activations:
            checkpoint_blocks(module, options.wrap)
        optimizer = find_optimizer(module.configure_optimizers())
        if options.foreach:
            use_foreach(optimizer)
        tensors = [leaf for leaf in tree_iter(inputs) if isinstance(leaf, Tensor)]
        tracker.ignore([*module.parameters(), *module.buffers(), *tensors])
        hooks = [
            p.register_post_accumulate_grad_hook(_gradient_counter(tracker, number))
            for number, p in enumerate(module.parameters())
            if p.requires_grad
        ]
        ends = BlockHooks(blocks, tracker.record)
        with tracker, workspaces, count if options.with_optimizer else nullcontext():
            forward, backward, both, course, events = _forward_and_backward(module, inputs, types, tracker, ends)
        with tracker:
            temporary = _optimizer_step(optimizer, tracker) if options.with_optimizer else 0
        for hook in (*hooks, ends):
            hook.remove()
        states = sum(_rounded(t, granularity) for s in optimizer.state.values() for t in s.values()
                     if isinstance(t, Tensor))  # fmt: skip
        input_bytes = sum(_rounded(t, granularity) for t in tensors)
        shape = describe_model(module, optimizer, foreach=options.foreach, wrap=options.wrap)
    trace = StepTrace(
        batch_size=batch_size,
        forward=forward + input_bytes,
        backward=backward + input_bytes,
        backward_with_gradients=both + input_bytes,
        inputs=input_bytes,
        step=temporary,
        optimizer_states=states,
        flops=count.flops,
        kernels=onednn.kernels,
        course=tuple(replace(c, peak=c.peak + input_bytes, live=c.live + input_bytes) for c in course),
        events=tuple(replace(e, peak=e.peak + input_bytes, live=e.live + input_bytes) for e in events),
    )
    return trace, shape


def _forward_and_backward(
    module: LightningModule, batch: Any, types: TraceTypes, tracker: StorageTracker, blocks: BlockHooks
) -> tuple[int, int, int, list[GradientArrival], list[BlockEvent]]:
    """Peaks of forward, of backward, and of backward with gradients; the course of both passes."""
    tracker.reset_peak()
    device = next(module.parameters()).device.type
    autocast = nullcontext() if types.autocast is None else torch.autocast(device, types.autocast)
    with autocast:
        loss = _loss(module.training_step(batch, 0))
    tracker.record("loss", None)
    forward, events = tracker.peak_activations, tracker.events
    tracker.reset_peak()
    blocks.is_backward = True
    loss.backward()
    tracker.record("end", None)
    course, events = [*tracker.course, tracker.arrival()], [*events, *tracker.events]
    return forward, tracker.peak_activations, tracker.peak_total, course, events


def _optimizer_step(optimizer: Optimizer, tracker: StorageTracker) -> int:
    """Bytes that a step allocates and frees. Optimizers create their states before they use them."""
    tracker.reset_peak()
    optimizer.step()
    return tracker.peak_activations - tracker.activations


def _loss(output: Any) -> Tensor:
    if isinstance(output, dict):
        output = output.get("loss")
    if not isinstance(output, Tensor):
        raise TypeError(f"training_step returned {type(output).__name__}; expected a loss, or a dict with one")
    return output


def _cast(module: nn.Module, dtype: torch.dtype | None, kept: Collection[nn.Parameter], *, buffers: bool) -> None:
    """`module.to(dtype)` with new parameters, as fake ones cannot be swapped. Tied parameters stay tied."""
    if dtype is None:
        return
    new: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.is_floating_point() and parameter not in kept:
                if id(parameter) not in new:
                    new[id(parameter)] = nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)
                setattr(part, name, new[id(parameter)])
        for name, buffer in part.named_buffers(recurse=False):
            if buffers and buffer.is_floating_point():
                setattr(part, name, buffer.to(dtype))


def attach(module: LightningModule, trainer: PlannedTrainer) -> None:
    """Attach a Trainer to a module, and discard its metrics.

    Raises:
        TypeError: it uses manual optimization, which cannot be traced.
    """
    if not module.automatic_optimization:
        raise TypeError("the module optimizes by hand (automatic_optimization is False): its step cannot be traced")
    module.trainer = trainer  # pyright: ignore[reportAttributeAccessIssue]
    # Lightning keeps only a weak reference.
    object.__setattr__(module, "_planned_trainer", trainer)
    for name in ("log", "log_dict"):
        object.__setattr__(module, name, _log_nothing)


def _log_nothing(*_: Any, **__: Any) -> None:
    """Discard metrics of a traced step."""


def _gradient_counter(tracker: StorageTracker, number: int) -> Callable[[Tensor], None]:
    def count(parameter: Tensor) -> None:
        if parameter.grad is not None:
            tracker.count_as_gradient(parameter.grad, number)

    return count


def _prepare(leaf: Any, mode: FakeMode | None, dtype: torch.dtype | None, device: str) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    tensor = leaf if mode is None else mode.from_tensor(leaf)
    return tensor.to(device=device, dtype=dtype if dtype is not None and leaf.is_floating_point() else None)


def _rounded(tensor: Tensor, granularity: int) -> int:
    return -(-tensor.untyped_storage().nbytes() // granularity) * granularity


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress warnings, which appear again in the training, and restore the random state."""
    with warnings.catch_warnings(action="ignore"), torch.random.fork_rng(devices=[]):
        yield
