"""Bytes that real gloo ranks send under FSDP2, and the formulas' bytes, for every variant and several models.

One of several ranks: `python -m tests.support.sent_shards FOLDER`, see `tests.support.program_ranks`.
"""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

from launcher.planning.memory import cpu_machine
from strategies.base import TrainingStep
from strategies.precision import Precision
from strategies.registry import find_strategy
from strategies.sharding import ShardOptions
from strategies.trace import TraceOptions, trace_step
from tests.support.live_shards import VARIANTS, set_last, shard, shard_ranks
from tests.support.model_families import SMALL
from tests.support.program_ranks import results_of_rank

MODELS = ("odd", "gpt", "frozen")
# Offload sends what `fsdp2` sends.
SENDING = tuple(name for name in VARIANTS if name != "fsdp2_offload")
DTYPES = {"fp32": Precision.FP32_TRUE, "mixed": Precision.BF16_MIXED}
# Micro batches, and whether each reduces: of both types, and once with each type.
CASES = (("fp32", 1, True), ("mixed", 3, True), ("fp32", 3, False), ("mixed", 3, False))
# In all versions of torch. The larger of input and output is the volume of a ring.
_CALLS = ("all_gather_single", "all_gather_into_tensor", "reduce_scatter_single", "reduce_scatter_tensor")


class StepForward(nn.Module):
    """The training step as the forward pass of the root, as Lightning runs it."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Any) -> Tensor:
        return self.module.training_step(batch, 0)


@contextmanager
def counting(sent: list[tuple[str, int]]) -> Iterator[None]:
    """Record each collective: 'shards' or 'replicas', and its volume, which is N/(N-1) times what a rank sends."""

    def counted(call: Callable[..., Any], ring: str, times: int) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            sent.append((ring, times * max(tensor.nbytes for tensor in tensors)))
            return call(*args, **kwargs)

        return run

    with ExitStack() as stack:
        for name in filter(partial(hasattr, dist), _CALLS):
            stack.enter_context(patch.object(dist, name, counted(getattr(dist, name), "shards", 1)))
        stack.enter_context(patch.object(dist, "all_reduce", counted(dist.all_reduce, "replicas", 2)))
        yield


def run_step(name: str, variant: str, dtype: str, passes: int, *, every: bool) -> list[tuple[str, int]]:
    """The second step, as the first one may have more."""
    torch.manual_seed(0)
    batch, module = SMALL[name].batch(2), SMALL[name].make()
    net = StepForward(module)
    replicas = shard(net, variant, dtype)
    sent: list[tuple[str, int]] = []
    with counting(sent):
        for _ in range(2):
            sent.clear()
            for number in range(passes):
                set_last(net, is_last=number == passes - 1, every=every)
                with replicas.plain(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "mixed"):
                    loss = net(batch)
                loss.backward()
    return sent


def formula(name: str, variant: str, dtype: str, passes: int, *, every: bool) -> dict[str, tuple[float, int]]:
    """Volume and messages of each ring."""
    world = dist.get_world_size()
    entry: Any = find_strategy(variant)
    options = TraceOptions(with_optimizer=False)
    trace, model = trace_step(SMALL[name].make, SMALL[name].batch(2), 2, options=options)
    sharding = ShardOptions(shard_ranks=shard_ranks(variant, world), reduce_every_batch=every)
    step = TrainingStep(model, trace, world, entry.state_types(DTYPES[dtype]), passes, sharding=sharding)
    machine = cpu_machine(world, shard_ranks(variant, world), 1 << 34)
    found = {"shards": (0.0, 0), "replicas": (0.0, 0)}
    for each in entry.collectives(step, machine, 1.0):
        ring = "replicas" if machine.ring(each.scope).per_node == 1 else "shards"
        found[ring] = (found[ring][0] + each.volume, found[ring][1] + each.messages)
    return found


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with results_of_rank(folder) as seen:
        for name, variant, (dtype, passes, every) in itertools.product(MODELS, SENDING, CASES):
            sent = run_step(name, variant, dtype, passes, every=every)
            expected = formula(name, variant, dtype, passes, every=every)
            for ring, (volume, messages) in expected.items():
                real = [size for kind, size in sent if kind == ring]
                seen[f"{name} {variant} {dtype} {passes} {every} {ring}"] = [[sum(real), len(real)], [volume, messages]]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
