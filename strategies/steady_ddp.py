"""A DDP that sums gradients in the same order in every step, so that a resumed run repeats an uninterrupted one.

torch's DDP exchanges the first gradients in one bucket, and those of later steps in buckets in the order in which the
gradients came. Where a number lies in its bucket says in which order the ranks' parts of it are added, which shows in
the last bit with more than two ranks: the first step after a start would differ from the same step of a run that was
never stopped. Here the buckets have their final form before the first step. A layer's gradient is taken to come before
those of the layers that the model defines before it, as it is in all models that run their layers in that order;
others get the same sums, with less of the exchange hidden behind the backward pass.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override


class SteadyDistributedDataParallel(DistributedDataParallel):
    """DDP whose buckets are final from the start; its arguments are DDP's.

    With `find_unused_parameters` torch never rebuilds the buckets, and nothing changes.
    """

    def __init__(self, module: nn.Module, **options: Any) -> None:
        super().__init__(module, **options)
        if not self.find_unused_parameters:
            # torch's words for "the gradients have come in the order of the parameters": the first forward pass
            # rebuilds the buckets for it, on all ranks alike.
            self.reducer._push_all_rebuilt_params()

    def _build_params_for_reducer(self) -> tuple[list[nn.Parameter], list[bool]]:
        """The parameters and whether their gradients are sparse, the last one that the model defines first."""
        parameters, sparse = super()._build_params_for_reducer()
        if not self.find_unused_parameters:
            parameters, sparse = parameters[::-1], sparse[::-1]
        return parameters, sparse


class SteadyDDPStrategy(DDPStrategy):
    """Lightning's strategy for it."""

    @override
    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        devices = self.determine_ddp_device_ids()
        # As Lightning does it: DDP's constructor wants a stream of its own, see torch's notes on CUDA and DDP.
        with torch.cuda.stream(torch.cuda.Stream()) if devices is not None else nullcontext():
            return SteadyDistributedDataParallel(module=model, device_ids=devices, **self._ddp_kwargs)

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """The mean of whole numbers is none: Lightning rounds it, and weighs a mean over unequal batches wrongly."""
        if isinstance(tensor, torch.Tensor) and reduce_op in ("mean", "avg") and not tensor.is_floating_point():
            tensor = tensor.to(torch.get_default_dtype())
        return super().reduce(tensor, group, reduce_op)
