"""A DDP that sums gradients in the same order in every step, so that a resumed run repeats an uninterrupted one.

torch's DDP exchanges the first gradients in one bucket, and those of later steps in buckets in the order in which the
gradients came. Where a number lies in its bucket says in which order the ranks' parts of it are added, which shows in
the last bit with more than two ranks: the first step after a start would differ from the same step of a run that was
never stopped. Here the buckets have their final form before the first step. A layer's gradient is taken to come before
those of the layers that the model defines before it, as it is in all models that run their layers in that order;
others get the same sums, with less of the exchange hidden behind the backward pass.

It also looks, before the first exchange, for parameters that get no gradient: torch's DDP would take that step with
gradients of one rank alone, and fail in the next.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from strategies.ddp import UnusedParametersError
from strategies.unused_parameters import unused_on_any_rank


class DeterministicDistributedDataParallel(DistributedDataParallel):
    """DDP whose buckets are final from the start; its arguments are DDP's.

    With `find_unused_parameters` torch never rebuilds the buckets, and nothing changes.
    """

    _reduced: tuple[list[nn.Parameter], list[bool]] | None = None

    def __init__(self, module: nn.Module, **options: Any) -> None:
        super().__init__(module, **options)
        if not self.find_unused_parameters:
            # torch's words for "the gradients have come in the order of the parameters": the first forward pass
            # rebuilds the buckets for it, on all ranks alike.
            self.reducer._push_all_rebuilt_params()
        self._left_out = self._frozen()

    def _frozen(self) -> list[nn.Parameter]:
        """The parameters whose gradients are not exchanged."""
        known = set(map(id, self._build_params_for_reducer()[0]))
        ignored = set(self.parameters_to_ignore)
        return [p for name, p in self.module.named_parameters() if id(p) not in known and name not in ignored]

    def has_thawed(self) -> bool:
        """Whether a parameter that was frozen when the buckets were made is trained now, as finetuning does it."""
        return any(p.requires_grad for p in self._left_out)

    def take_in(self, loss: Tensor) -> None:
        """Exchange what has thawed from this backward pass on, on all ranks: torch's DDP would let them drift apart."""
        known, _ = self._build_params_for_reducer()
        frozen = [p for p in known if not p.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(True)
        self._reduced = None
        self._build_params_for_reducer()
        for parameter in frozen:
            parameter.requires_grad_(False)
        self._left_out = self._frozen()
        self._renew(loss)

    def reduced_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters whose gradients are exchanged, by name."""
        known = set(map(id, self._build_params_for_reducer()[0]))
        return {name: p for name, p in self.module.named_parameters() if id(p) in known}

    def look_for_unused(self, loss: Tensor) -> None:
        """Look for parameters without a gradient from this backward pass on. All ranks do, before any exchange."""
        self.find_unused_parameters = True
        self._renew(loss)

    def _renew(self, loss: Tensor) -> None:
        """Make the reducer anew, between a forward pass and its backward pass."""
        names = {id(p): name for name, p in self.reduced_parameters().items()}
        parameters, sparse = self._build_params_for_reducer()
        frozen = [p for p in parameters if not p.requires_grad]
        for parameter in frozen:
            # The reducer takes hold of what adds up its gradient, which a frozen one has not.
            parameter.requires_grad_(True)
        # The old reducer's hooks go with it.
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
        """Whether the gradients of this backward pass are summed over the ranks.

        Raises:
            UnusedParametersError: some have not come on this rank.
        """
        try:
            self._check_reducer_finalized()
        except RuntimeError as error:
            names = [name for name, p in self.reduced_parameters().items() if p.requires_grad and p.grad is None]
            raise UnusedParametersError(names, f"a later step on rank {dist.get_rank()}") from error

    def _build_params_for_reducer(self) -> tuple[list[nn.Parameter], list[bool]]:
        """The parameters and whether their gradients are sparse, the last one that the model defines first.

        What counts is what was trainable when this was made: a GAN freezes one half for the other's turn.
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
            looks for them in every step. None refuses them.
        options: Lightning's.
    """

    def __init__(self, *, on_unused: Callable[[tuple[str, ...]], None] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._on_unused = on_unused
        self._has_looked = False

    @override
    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        devices = self.determine_ddp_device_ids()
        # As Lightning does it: DDP's constructor wants a stream of its own, see torch's notes on CUDA and DDP.
        with torch.cuda.stream(torch.cuda.Stream()) if devices is not None else nullcontext():
            return DeterministicDistributedDataParallel(module=model, device_ids=devices, **self._ddp_kwargs)

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """The mean of whole numbers is none: Lightning rounds it, and weighs a mean over unequal batches wrongly."""
        if isinstance(tensor, torch.Tensor) and reduce_op in ("mean", "avg") and not tensor.is_floating_point():
            tensor = tensor.to(torch.get_default_dtype())
        return super().reduce(tensor, group, reduce_op)

    @override
    def pre_backward(self, closure_loss: Tensor) -> None:
        """Before gradients are exchanged, take in what has thawed, and see once whether all gradients will come."""
        super().pre_backward(closure_loss)
        model = self.model
        if not isinstance(model, DeterministicDistributedDataParallel) or not model.require_backward_grad_sync:
            return  # or a micro batch whose gradients are only added up
        if model.has_thawed() and not model.static_graph:
            model.take_in(closure_loss)
            self._register_ddp_hooks()
            self._has_looked = False
        if self._has_looked:
            return
        self._has_looked = True
        if model.find_unused_parameters or model.static_graph:
            return
        names = unused_on_any_rank(closure_loss, model.reduced_parameters(), model.process_group)
        if not names:
            return
        if self._on_unused is None:
            raise UnusedParametersError(names, "the first step")
        model.look_for_unused(closure_loss)
        self._register_ddp_hooks()
        self._on_unused(names)

    @override
    def post_backward(self, closure_loss: Tensor) -> None:
        """Before the optimizer takes a step."""
        super().post_backward(closure_loss)
        model = self.model
        if isinstance(model, DeterministicDistributedDataParallel) and model.require_backward_grad_sync:
            model.check_gradients()
