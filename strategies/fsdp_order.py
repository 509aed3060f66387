"""Checks in the first steps of a training that all ranks gather the same blocks in the same order.

Otherwise a rank waits until the timeout, as for an expert that only some ranks have tokens for.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from strategies.base import StrategyError

_PASS_BACK, _STEP_END = -1, -2
_OTHER = {_PASS_BACK: "the backward pass", _STEP_END: "the end of the step"}


class BlockOrder:
    """Compares what the ranks do next, as long as it is `is_checked`."""

    def __init__(self, blocks: Sequence[tuple[str, nn.Module, Any]], device: torch.device) -> None:
        self.is_checked = False
        self._device = device
        self._names = [name for name, _, _ in blocks]
        for number, (_, block, state) in enumerate(blocks):
            block.register_forward_pre_hook(functools.partial(self._enter, number), prepend=True)
            state._pre_forward = functools.partial(self._before, number, state._pre_forward)
            state._pre_backward = functools.partial(self._before, number, state._pre_backward)

    def before_backward(self) -> None:
        """Compare before the ranks look for unused parameters."""
        self._compare(_PASS_BACK)

    def end_step(self) -> None:
        """Compare at the end of a step."""
        self._compare(_STEP_END)

    def _enter(self, number: int, *_: Any) -> None:
        self._compare(number)

    def _before(self, number: int, original: Any, *args: Any) -> Any:
        self._compare(number)
        return original(*args)

    def _compare(self, event: int) -> None:
        """Raise the same error on all ranks.

        Raises:
            StrategyError: names the blocks.
        """
        if not self.is_checked:
            return
        own = torch.tensor([event], device=self._device)
        every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(every, own)
        events = [int(each.item()) for each in every]
        if len(set(events)) > 1:
            self.is_checked = False
            first, rank = events[0], next(rank for rank, each in enumerate(events) if each != events[0])
            raise StrategyError(
                f"rank 0 is at {self._describe(first)} and rank {rank} at {self._describe(events[rank])}, but FSDP2 "
                "gathers a block on all ranks together; set `fsdp.wrap` to the class around blocks that only some "
                "ranks call, or use `strategy: ddp_find_unused_parameters_true`"
            )

    def _describe(self, event: int) -> str:
        return _OTHER.get(event) or f"block {self._names[event]}"
