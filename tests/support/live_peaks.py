"""Peak memory of real training steps: live storages of real tensors. Started by torchrun, one process a rank.

torch's CPU allocator does not count memory that gloo's threads free; steps of one process are compared with it in
`tests/unit/strategies/test_trace.py`.

    torchrun --nproc-per-node N -m tests.support.live_peaks OUT MODELS STAGES DTYPES BATCH

Stage 0 is one device with one rank, DDP with several; names are FSDP2's variants, which also know 'mixed'. A name may
end in '+every' or '+last' (two micro batches a step, with gradients summed after each one or once) and in '+checkpoint'
(with activation checkpointing).
Writes to OUT-RANK one JSON line a case.
"""

from __future__ import annotations

import sys
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from strategies.block_checkpoints import checkpoint_blocks
from strategies.deepspeed_patches import compute_with_fp32_weights
from strategies.deterministic_ddp import DeterministicDistributedDataParallel
from strategies.storage_tracker import StorageTracker
from tests.support.live_shards import ShardTracker, set_last, shard
from tests.support.live_states import DTYPES, Stepping, write_cases
from tests.support.model_families import SMALL

BUCKET = 1_200_000
_STEPS = 6


def measure(name: str, stage: int | str, dtype: str, batch_size: int) -> int:
    """Peak bytes in a step after the first; the smallest of several equal steps.

    gloo's threads free sent tensors when they run next, which may be in the middle of the optimizer's step. A GPU has
    no such threads, and most steps do not show it.
    """
    if isinstance(stage, str):
        return _measure_sharded(name, stage, dtype, batch_size)
    torch.manual_seed(0)
    entry = SMALL[name]

    def prepare() -> Any:
        batch = entry.batch(batch_size, DTYPES[dtype])
        module = entry.make()
        if stage == 0:
            module.to(DTYPES[dtype])
        optimizer = module.configure_optimizers()
        net: Any = Stepping(module)
        if stage == 0:
            if dist.get_world_size() > 1:
                net = DeterministicDistributedDataParallel(net, gradient_as_bucket_view=True)
        else:
            net, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=_config(stage, dtype, batch_size))
            compute_with_fp32_weights(module)
        _step(net, optimizer, batch, stage)
        return net, optimizer, batch

    tracker, peaks = StorageTracker(), list[int]()
    with tracker:
        made = prepare()
        for _ in range(_STEPS):
            tracker.reset_peak()
            _step(*made, stage)
            peaks.append(tracker.peak_total)
    return min(peaks)


def _measure_sharded(name: str, stage: str, dtype: str, batch_size: int) -> int:
    """The same under one of FSDP2's variants."""
    torch.manual_seed(0)
    variant, *extras = stage.split("+")
    accumulates = "every" in extras or "last" in extras
    tracker, peaks = ShardTracker(), list[int]()
    with tracker.following(), tracker:
        batch = SMALL[name].batch(batch_size, DTYPES[dtype])
        module = SMALL[name].make()
        if dtype == "bf16":
            module.to(torch.bfloat16)
        net = Stepping(module)
        if "checkpoint" in extras:
            checkpoint_blocks(net)
        replicas = shard(net, variant, dtype)
        optimizer = module.configure_optimizers()
        for _ in range(_STEPS):
            tracker.reset_peak()
            for last in (False, True) if accumulates else (True,):
                set_last(net, is_last=last, every="last" not in extras)
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "mixed"), replicas.plain():
                    loss = net(batch)
                if last != accumulates:
                    optimizer.zero_grad()
                loss.backward()
                del loss
                replicas.reduce()
            optimizer.step()
            peaks.append(tracker.peak_total)
    return min(peaks[1:])


def _step(net: Any, optimizer: Any, batch: Any, stage: int) -> None:
    """In Lightning's order."""
    loss = net(batch)
    if stage == 0:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    else:
        net.backward(loss)
        net.step()


def _config(stage: int, dtype: str, batch_size: int) -> dict[str, Any]:
    zero = {
        "stage": stage,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "stage3_param_persistence_threshold": 500,
        "stage3_prefetch_bucket_size": BUCKET,
    }
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": batch_size,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
    }
    return {**config, "bf16": {"enabled": True}} if dtype == "bf16" else config


def main() -> None:
    *arguments, batch_size = sys.argv[1:]

    def case(name: str, stage: int | str, dtype: str) -> dict[str, Any]:
        return {"batch_size": int(batch_size), "peak": measure(name, stage, dtype, int(batch_size))}

    write_cases(case, arguments)


if __name__ == "__main__":
    main()
