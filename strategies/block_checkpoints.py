"""Activation checkpointing: a block's activations are freed after its forward pass, and computed again for backward."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import nn
from torch.utils.checkpoint import checkpoint

from strategies.fsdp_blocks import find_blocks


def checkpoint_blocks(model: nn.Module, wrap: Sequence[str] = ()) -> list[nn.Module]:
    """Checkpoint the blocks that FSDP2 would gather; return them, without those that have nothing to compute again.

    A single layer keeps its input in any case.
    """
    blocks = [block for block in find_blocks(model, wrap) if wrap or any(True for _ in block.children())]
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    return blocks
