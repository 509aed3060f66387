"""A DDP that sums gradients in the same order in every step, so that a resumed run repeats an uninterrupted one.

torch's DDP rebuilds its buckets after the first step, in the order in which gradients arrive. With more than two ranks
the buckets determine the last bit of a sum. Here they are final before the first step, in the order in which the model
defines its layers; models that run them in another order overlap less. Before the first exchange it also searches for
parameters without a gradient: torch's DDP would use one rank's gradients in that step, and fail in the next.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from strategies.unused_parameters import UnusedParametersError

# Functions that build a graph inside their backward pass, which cannot be inspected before.
_OPAQUE = ("Checkpoint", "Revers", "Invert")


class _Call(torch.autograd.Function):
    """Calls a function with one argument."""

    @staticmethod
    @override
    def forward(ctx: Any, call: Callable[[Any], Any], argument: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        call(argument)


class DeterministicDistributedDataParallel(DistributedDataParallel):
    """DDP with final buckets from the start. Takes the arguments of DDP.

    With `find_unused_parameters` torch never rebuilds the buckets, and nothing is changed.
    """

    _reduced: tuple[list[nn.Parameter], list[bool]] | None = None

    def __init__(self, module: nn.Module, **options: Any) -> None:
        super().__init__(module, **options)
        if not self.find_unused_parameters:
            # Marks all gradients as arrived in the order of the parameters: the first forward pass of every rank
            # rebuilds the buckets in that order.
            self.reducer._push_all_rebuilt_params()
        self._left_out = self._frozen()

    def _frozen(self) -> list[nn.Parameter]:
        """The parameters whose gradients are not exchanged."""
        known = set(map(id, self._build_params_for_reducer()[0]))
        ignored = set(self.parameters_to_ignore)
        return [p for name, p in self.module.named_parameters() if id(p) not in known and name not in ignored]

    def has_unfrozen(self) -> bool:
        """Whether a parameter that was frozen when the buckets were built is trained now, as in finetuning."""
        return any(p.requires_grad for p in self._left_out)

    def add_unfrozen(self, loss: Tensor) -> None:
        """Exchange unfrozen parameters from this backward pass on; else ranks would diverge. All ranks call it."""
        known, _ = self._build_params_for_reducer()
        frozen = [p for p in known if not p.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(True)
        self._reduced = None
        self._build_params_for_reducer()
        for parameter in frozen:
            parameter.requires_grad_(False)
        self._left_out = self._frozen()
        self._rebuild_reducer(loss)

    def reduced_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters whose gradients are exchanged, by name."""
        known = set(map(id, self._build_params_for_reducer()[0]))
        return {name: p for name, p in self.module.named_parameters() if id(p) in known}

    def search_unused(self, loss: Tensor) -> None:
        """Search for parameters without a gradient from this backward pass on. All ranks call it before an exchange."""
        self.find_unused_parameters = True
        self._rebuild_reducer(loss)
        self._use_up_warning()
        self.reducer.prepare_for_backward([loss])

    def _use_up_warning(self) -> None:
        """Let torch give its warning that no parameter is unused now, unseen: it gives it once in a process.

        It advises to turn the search off, which this step needs; the steps of a GAN and others need it in turns.
        """
        terms = [p.sum() for p in self.reduced_parameters().values() if p.requires_grad]
        if terms:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                # Inside a function of autograd, torch's C++ code warns through Python.
                _Call.apply(self.reducer.prepare_for_backward, terms)

    def _rebuild_reducer(self, loss: Tensor) -> None:
        """Build a new reducer, between a forward pass and its backward pass."""
        names = {id(p): name for name, p in self.reduced_parameters().items()}
        parameters, sparse = self._build_params_for_reducer()
        frozen = [p for p in parameters if not p.requires_grad]
        for parameter in frozen:
            # The reducer needs the node that accumulates the gradient, which a frozen parameter does not have.
            parameter.requires_grad_(True)
        # Deleting the old reducer removes its hooks.
        vars(self).update(reducer=None, logger=None)
        self._ddp_init_helper(
            parameters, sparse, {at: names[id(p)] for at, p in enumerate(parameters)}, self.static_graph
        )
        for parameter in frozen:
            parameter.requires_grad_(False)
        if self.find_unused_parameters:
            self.reducer.prepare_for_backward([loss])
            return
        self.reducer._push_all_rebuilt_params()
        self.reducer._rebuild_buckets()
        self.reducer.prepare_for_backward([])

    def check_gradients(self) -> None:
        """Check that the gradients of this backward pass are summed over the ranks.

        Raises:
            UnusedParametersError: some parameters got no gradient on this rank.
        """
        try:
            self._check_reducer_finalized()
        except RuntimeError as error:
            names = [name for name, p in self.reduced_parameters().items() if p.requires_grad and p.grad is None]
            raise UnusedParametersError(names, f"a later step on rank {dist.get_rank()}") from error

    def _build_params_for_reducer(self) -> tuple[list[nn.Parameter], list[bool]]:
        """The parameters, the last defined one first, and whether their gradients are sparse.

        They are those that were trainable when DDP was built: a GAN freezes its parts in turns.
        """
        if self._reduced is None:
            self._reduced = super()._build_params_for_reducer()
        parameters, sparse = self._reduced
        if not self.find_unused_parameters:
            parameters, sparse = parameters[::-1], sparse[::-1]
        return parameters, sparse


class DeterministicDDPStrategy(DDPStrategy):
    """Lightning's strategy for it.

    Args:
        on_unused: called with the names of the parameters that get no gradient in the first step; from then on DDP
            searches for them in every step. None raises an error.
        options: arguments of Lightning's DDPStrategy.
    """

    def __init__(self, *, on_unused: Callable[[tuple[str, ...]], None] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._on_unused = on_unused
        self._has_searched = False

    @override
    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        devices = self.determine_ddp_device_ids()
        # As in Lightning: DDP must be constructed in a side stream, see torch's notes on CUDA and DDP.
        with torch.cuda.stream(torch.cuda.Stream()) if devices is not None else nullcontext():
            return DeterministicDistributedDataParallel(module=model, device_ids=devices, **self._ddp_kwargs)

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduce integers as floats: Lightning rounds their mean, which is wrong for a mean over unequal batches."""
        if isinstance(tensor, torch.Tensor) and reduce_op in ("mean", "avg") and not tensor.is_floating_point():
            tensor = tensor.to(torch.get_default_dtype())
        return super().reduce(tensor, group, reduce_op)

    @override
    def pre_backward(self, closure_loss: Tensor) -> None:
        """Before the exchange, add unfrozen parameters, and check once that all parameters get a gradient."""
        super().pre_backward(closure_loss)
        model = self.model
        if not isinstance(model, DeterministicDistributedDataParallel) or not model.require_backward_grad_sync:
            return  # or a micro batch whose gradients are only accumulated
        if model.has_unfrozen() and not model.static_graph:
            model.add_unfrozen(closure_loss)
            self._register_ddp_hooks()
            self._has_searched = False
        if self._has_searched:
            return
        self._has_searched = True
        if model.find_unused_parameters or model.static_graph:
            return
        names = _find_unused_parameters(closure_loss, model.reduced_parameters(), model.process_group)
        if not names:
            return
        if self._on_unused is None:
            raise UnusedParametersError(names, "the first step")
        model.search_unused(closure_loss)
        self._register_ddp_hooks()
        self._on_unused(names)

    @override
    def post_backward(self, closure_loss: Tensor) -> None:
        """Check the gradients before the optimizer steps."""
        super().post_backward(closure_loss)
        model = self.model
        if isinstance(model, DeterministicDistributedDataParallel) and model.require_backward_grad_sync:
            model.check_gradients()


def _find_unused_parameters(
    loss: Tensor, parameters: Mapping[str, nn.Parameter], group: dist.ProcessGroup | None
) -> tuple[str, ...]:
    """Names of the parameters that the loss of at least one rank does not depend on. A collective of all ranks."""
    used = find_used(loss)
    missing = [used is not None and id(p) not in used for p in parameters.values()]
    flags = torch.tensor(missing, dtype=torch.uint8, device=loss.device)
    dist.all_reduce(flags, dist.ReduceOp.MAX, group)
    return tuple(name for name, flag in zip(parameters, flags.tolist(), strict=True) if flag)


def find_used(loss: Tensor) -> set[int] | None:
    """Ids of the leaves that the loss depends on; None if the graph does not contain all of them."""
    found: set[int] = set()
    waiting = [loss.grad_fn]
    seen: set[object] = set(waiting)
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        if any(word in node.name() for word in _OPAQUE):
            return None
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found.add(id(leaf))
        for following, _ in node.next_functions:
            if following not in seen:
                seen.add(following)
                waiting.append(following)
    return found
