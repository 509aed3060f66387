"""Parameters that a step's loss does not depend on: DDP waits for their gradients unless it searches for them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Functions that build their graph anew inside of their backward pass: what is in there cannot be seen before.
_HIDING = ("Checkpoint", "Revers", "Invert")


def unused_on_any_rank(
    loss: Tensor, parameters: Mapping[str, nn.Parameter], group: dist.ProcessGroup | None
) -> tuple[str, ...]:
    """Names of the parameters that the loss of at least one rank does not depend on. A collective of all ranks.

    Args:
        loss: of this rank, before its backward pass.
        parameters: by name, in the same order on all ranks.
        group: the ranks.
    """
    used = _used(loss)
    missing = [used is not None and id(p) not in used for p in parameters.values()]
    flags = torch.tensor(missing, dtype=torch.uint8, device=loss.device)
    dist.all_reduce(flags, dist.ReduceOp.MAX, group)
    return tuple(name for name, flag in zip(parameters, flags.tolist(), strict=True) if flag)


def _used(loss: Tensor) -> set[int] | None:
    """Ids of the leaves that the loss depends on; None if the graph does not show all of them."""
    found: set[int] = set()
    waiting = [loss.grad_fn]
    seen: set[object] = set(waiting)
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        if any(word in node.name() for word in _HIDING):
            return None
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found.add(id(leaf))
        for following, _ in node.next_functions:
            if following not in seen:
                seen.add(following)
                waiting.append(following)
    return found
