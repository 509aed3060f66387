"""Bytes of a rank's live tensors under plain DeepSpeed and plain DDP, without the launcher, as torchrun starts it.

    torchrun --nproc-per-node N -m tests.support.live_states OUT MODELS STAGES DTYPES

Writes to OUT-RANK one JSON line a case: bytes of parameters, gradients and optimizer states after backward and before
the step, each storage counted once.
"""

from __future__ import annotations

import gc
import json
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import logger
from torch import nn
from torch.distributed.tensor import DTensor

from tests.support.live_shards import shard
from tests.support.model_families import SMALL

BUCKET = 1000
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "mixed": torch.float32}


class Storages:
    """Bytes of storages, each counted for the first part that contains it."""

    def __init__(self) -> None:
        self.seen: set[int] = set()

    def add(self, tensors: Iterable[Any]) -> int:
        total = 0
        for tensor in tensors:
            if isinstance(tensor, DTensor):
                tensor = tensor.to_local()
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() and storage.data_ptr() not in self.seen:
                    self.seen.add(storage.data_ptr())
                    total += storage.nbytes()
        return total


def parts(module: nn.Module, optimizer: Any) -> dict[str, int]:
    """Bytes by part; `optimizer` is DeepSpeed's or torch's."""
    seen = Storages()
    own = list(module.parameters())
    masters = [*getattr(optimizer, "single_partition_of_fp32_groups", []),
               *getattr(optimizer, "fp32_partitioned_groups_flat", [])]  # fmt: skip
    gradients: list[Any] = [p.grad for p in own + masters]
    for attribute in ("averaged_gradients", "all_grad_tensors"):
        for value in (getattr(optimizer, attribute, None) or {}).values():
            gradients += value if isinstance(value, list) else [value]
    gradients.append(getattr(optimizer, "grad_partitions_flat_buffer", None))
    inner = getattr(optimizer, "optimizer", optimizer)
    states = [value for state in inner.state.values() for value in state.values()]
    partitions = seen.add([getattr(p, "ds_tensor", None) for p in own])
    # Parameters that stage 3 does not partition; with one rank they are views of the partition.
    whole = seen.add([p.data for p in own])
    is_3 = any(hasattr(p, "ds_tensor") for p in own)
    return {
        "parameters": (partitions if is_3 else whole) + seen.add(module.buffers()),
        "gathered": whole if is_3 else 0,
        "optimizer_states": seen.add(masters) + seen.add(states),
        "gradients": seen.add(gradients),
    }


def measure(name: str, stage: int | str, dtype: str) -> dict[str, int]:
    """Two steps of one case; the parts in the second, between backward and step."""
    torch.manual_seed(0)
    if isinstance(stage, str):
        return _measure_sharded(name, stage, dtype)
    entry = SMALL[name]
    module = entry.make()
    batch = entry.batch(2, DTYPES[dtype])
    optimizer = module.configure_optimizers()
    found: dict[str, int] = {}
    if stage == 0:
        module.to(DTYPES[dtype])
        net: Any = Stepping(module)
        if dist.get_world_size() > 1:
            net = nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True)
        for _ in range(2):
            optimizer.zero_grad()
            net(batch).backward()
            if optimizer.state or not found:
                found = parts(module, optimizer)
            optimizer.step()
        return found
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": BUCKET,
            "overlap_comm": True,
            "contiguous_gradients": True,
            # Some parameters of every model are larger.
            "stage3_param_persistence_threshold": 500,
        },
    }
    if dtype == "bf16":
        config["bf16"] = {"enabled": True}
    engine, *_ = deepspeed.initialize(model=Stepping(module), optimizer=optimizer, config=config)
    for _ in range(2):
        engine.backward(engine(batch))
        found = parts(engine.module, engine.optimizer)
        engine.step()
    engine.destroy()
    return found


def _measure_sharded(name: str, variant: str, dtype: str) -> dict[str, int]:
    """The same under one of FSDP2's variants."""
    module = SMALL[name].make()
    if dtype == "bf16":
        module.to(torch.bfloat16)
    net = Stepping(module)
    replicas = shard(net, variant, dtype)
    optimizer = module.configure_optimizers()
    batch = SMALL[name].batch(2, DTYPES[dtype])
    found: dict[str, int] = {}
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "mixed"), replicas.plain():
            loss = net(batch)
        loss.backward()
        replicas.reduce()
        if optimizer.state or not found:
            found = parts(module, optimizer)
        optimizer.step()
    return found


class Stepping(nn.Module):
    """Calls `training_step` in forward, as Lightning's strategies do."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Any) -> Any:
        return self.module.training_step(batch, 0)


def write_cases(measure: Callable[[str, int | str, str], dict[str, Any]], arguments: Sequence[str]) -> None:
    """Measure on this rank each model, stage and type of the arguments OUT MODELS STAGES DTYPES."""
    out, names, stages, dtypes = arguments
    logger.setLevel(logging.ERROR)
    dist.init_process_group("gloo")
    with Path(f"{out}-{dist.get_rank()}").open("w") as file:
        for name in names.split(","):
            for stage in (int(stage) if stage.isdigit() else stage for stage in stages.split(",")):
                for dtype in dtypes.split(","):
                    case = {"model": name, "stage": stage, "dtype": dtype, "world_size": dist.get_world_size()}
                    file.write(json.dumps({**case, **measure(name, stage, dtype)}) + "\n")
                    file.flush()
                    gc.collect()
                    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    write_cases(measure, sys.argv[1:])
