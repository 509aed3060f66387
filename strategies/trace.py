"""Traces one training step of a LightningModule on fake tensors: no memory, no device, no numbers computed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.flop_counter import flop_registry
from typing_extensions import override

from strategies.cpu_workspaces import CpuWorkspaces
from strategies.fake_mode import FakeMode
from strategies.model_shape import describe_model, optimizer_of, use_foreach
from strategies.model_states import ModelShape
from strategies.step_trace import GradientArrival, StepTrace
from strategies.storage_tracker import StorageTracker


@dataclass(frozen=True, slots=True)
class TraceTypes:
    """How the step computes.

    Attributes:
        module: what parameters, buffers and floating inputs are cast to; None leaves them.
        autocast: what `torch.autocast` computes in; None for no autocast.
    """

    module: torch.dtype | None = None
    autocast: torch.dtype | None = None


class _FlopCount(TorchDispatchMode):
    """Adds up the operations of matrix products, convolutions and attention, by torch's own formulas."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += int(formula(*args, **(kwargs or {}), out_val=out))
        return out


class PlannedTrainer:
    """What a module may ask of its Trainer while the plan is made; anything else is an AttributeError."""

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
    fake: bool = True,
    foreach: bool = False,
    granularity: int = 1,
    device: str = "cpu",
    whole: bool = True,
) -> tuple[StepTrace, ModelShape]:
    """Run one training step as Lightning's automatic optimization does, and measure its phases.

    Gradients are counted apart from activations, so that it does not matter that the first forward pass sees none.
    Whatever the user's code raises comes out as it is.

    Args:
        make_module: makes the module anew; called under the fake mode if `fake`.
        batch: a batch of the user's loader, real tensors in any nesting.
        batch_size: its number of samples.
        types: what it computes in.
        trainer: what the module may ask of its Trainer.
        fake: on fake tensors; else for real on this machine, with real numbers and memory.
        foreach: take torch's multi-tensor optimizer step where nothing else was asked for, as torch does on a GPU.
        granularity: bytes that the device's allocator rounds up to.
        device: 'cpu', or 'cuda' where this torch sees one: then its own kernels' workspaces are traced.
        whole: trace the optimizer's step and count operations too; else `step`, `optimizer_states` and `flops` are 0.
    """
    mode = FakeMode(allow_non_fake_inputs=True) if fake else None
    within: Callable[[], AbstractContextManager[Any]] = nullcontext if mode is None else (lambda: mode)
    tracker, count = StorageTracker(granularity), _FlopCount()
    # A real step on real tensors has its own.
    onednn = CpuWorkspaces()
    workspaces: AbstractContextManager[Any] = onednn if fake and device == "cpu" else nullcontext()
    with _quiet(), within():
        with torch.device(device):
            module = make_module()
        _cast(module, types.module)
        fed = tree_map(lambda leaf: _fed(leaf, mode, types.module, device), batch)
        attach(module, trainer or PlannedTrainer())
        module.train()
        optimizer = optimizer_of(module.configure_optimizers())
        if foreach:
            use_foreach(optimizer)
        inputs = [leaf for leaf in tree_iter(fed) if isinstance(leaf, Tensor)]
        tracker.ignore([*module.parameters(), *module.buffers(), *inputs])
        hooks = [
            p.register_post_accumulate_grad_hook(_gradient_counter(tracker, number))
            for number, p in enumerate(module.parameters())
            if p.requires_grad
        ]
        with tracker, workspaces, count if whole else nullcontext():
            forward, backward, both, course = _forward_and_backward(module, fed, types, tracker, device)
        with tracker:
            temporary = _optimizer_step(optimizer, tracker) if whole else 0
        for hook in hooks:
            hook.remove()
        states = sum(_rounded(t, granularity) for s in optimizer.state.values() for t in s.values()
                     if isinstance(t, Tensor))  # fmt: skip
        fed_bytes = sum(_rounded(t, granularity) for t in inputs)
        shape = describe_model(module, optimizer, foreach=foreach)
    trace = StepTrace(
        batch_size=batch_size,
        forward=forward + fed_bytes,
        backward=backward + fed_bytes,
        backward_with_gradients=both + fed_bytes,
        inputs=fed_bytes,
        step=temporary,
        optimizer_states=states,
        flops=count.flops,
        kernels=onednn.kernels,
        course=tuple(replace(c, peak=c.peak + fed_bytes, live=c.live + fed_bytes) for c in course),
    )
    return trace, shape


def _forward_and_backward(
    module: LightningModule, batch: Any, types: TraceTypes, tracker: StorageTracker, device: str
) -> tuple[int, int, int, list[GradientArrival]]:
    """Peaks of forward, of backward, and of backward with gradients; the course of the backward pass."""
    tracker.reset_peak()
    autocast = nullcontext() if types.autocast is None else torch.autocast(device, types.autocast)
    with autocast:
        loss = _loss(module.training_step(batch, 0))
    forward = tracker.peak_activations
    tracker.reset_peak()
    loss.backward()
    return forward, tracker.peak_activations, tracker.peak_total, [*tracker.course, tracker.arrival()]


def _optimizer_step(optimizer: Optimizer, tracker: StorageTracker) -> int:
    """Bytes that a step allocates and frees again. Optimizers make their states before they compute with them."""
    tracker.reset_peak()
    optimizer.step()
    return tracker.peak_activations - tracker.activations


def _loss(output: Any) -> Tensor:
    if isinstance(output, dict):
        output = output.get("loss")
    if not isinstance(output, Tensor):
        raise TypeError(f"training_step gave {type(output).__name__}; expected a loss, or a dict with one")
    return output


def _cast(module: nn.Module, dtype: torch.dtype | None) -> None:
    """`module.to(dtype)` by new parameters: a fake parameter cannot be swapped. Tied ones stay tied."""
    if dtype is None:
        return
    new: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.is_floating_point():
                if id(parameter) not in new:
                    new[id(parameter)] = nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)
                setattr(part, name, new[id(parameter)])
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.is_floating_point():
                setattr(part, name, buffer.to(dtype))


def attach(module: LightningModule, trainer: PlannedTrainer) -> None:
    """Give a module the Trainer that it may ask, and let its metrics go nowhere.

    Raises:
        TypeError: it optimizes by hand, which cannot be traced.
    """
    if not module.automatic_optimization:
        raise TypeError("the module optimizes by hand (automatic_optimization is False): its step cannot be traced")
    module.trainer = trainer  # pyright: ignore[reportAttributeAccessIssue]
    # Lightning keeps only a weak reference to it.
    object.__setattr__(module, "_planned_trainer", trainer)
    for name in ("log", "log_dict"):
        object.__setattr__(module, name, _log_nothing)


def _log_nothing(*_: Any, **__: Any) -> None:
    """Metrics of a traced step go nowhere."""


def _gradient_counter(tracker: StorageTracker, number: int) -> Callable[[Tensor], None]:
    def count(parameter: Tensor) -> None:
        if parameter.grad is not None:
            tracker.count_as_gradient(parameter.grad, number)

    return count


def _fed(leaf: Any, mode: FakeMode | None, dtype: torch.dtype | None, device: str) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    tensor = leaf if mode is None else mode.from_tensor(leaf)
    return tensor.to(device=device, dtype=dtype if dtype is not None and leaf.is_floating_point() else None)


def _rounded(tensor: Tensor, granularity: int) -> int:
    return -(-tensor.untyped_storage().nbytes() // granularity) * granularity


@contextmanager
def _quiet() -> Iterator[None]:
    """The module's warnings come again when it trains; random numbers and the module's state go on as before."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(torch.random.fork_rng(devices=[]))
        yield
