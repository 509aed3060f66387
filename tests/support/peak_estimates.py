"""The launcher's estimates, and the peaks that `tests.support.live_peaks` measures on real ranks."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from strategies.memory import estimate_memory
from strategies.model_states import ModelShape
from strategies.precision import Precision
from strategies.registry import find_strategy
from strategies.sharding import ShardOptions
from strategies.step_trace import StepTrace
from strategies.trace import TraceOptions, TraceTypes, trace_step
from tests.support.live_shards import shard_ranks
from tests.support.model_families import SMALL
from tests.support.runs import REPOSITORY, start_commands_by_hand
from tests.support.warm import DEEPSPEED

PRECISIONS = {"fp32": Precision.FP32_TRUE, "bf16": Precision.BF16_TRUE, "mixed": Precision.BF16_MIXED}


@functools.cache
def trace(name: str, dtype: str, batch_size: int, *, has_checkpoints: bool = False) -> tuple[StepTrace, ModelShape]:
    """A step of the model, with the optimizer's on the kept parameters."""
    entry, half = SMALL[name], torch.bfloat16
    batch, options = entry.batch(batch_size), TraceOptions(checkpoint_activations=has_checkpoints)
    kept = TraceTypes(module=half if dtype == "bf16" else None)
    found, model = trace_step(entry.make, batch, batch_size, types=kept, options=options)
    if dtype != "mixed":
        return found, model
    types = TraceTypes(autocast=half, parameters=half)
    gathered, _ = trace_step(entry.make, batch, batch_size, types=types, options=options)
    return dataclasses.replace(gathered, step=found.step), model


def estimate_sharded(name: str, stage: str, dtype: str, ranks: int, batch_size: int) -> int:
    """Bytes under a variant of FSDP2."""
    variant, *extras = stage.split("+")
    found, model = trace(name, dtype, batch_size, has_checkpoints="checkpoint" in extras)
    sharding = ShardOptions(shard_ranks=shard_ranks(variant, ranks), reduce_every_batch="last" not in extras)
    accumulate = 2 if "every" in extras or "last" in extras else 1
    candidate, precision = find_strategy(variant), PRECISIONS[dtype]
    return estimate_memory(model, found, candidate, ranks, precision, accumulate=accumulate, sharding=sharding).total


def measure_peaks(
    cases: Sequence[Sequence[str]], ranks: int, batch_size: int, folder: Path, timeout: float
) -> Iterator[tuple[dict[str, Any], int]]:
    """Each case of these models, stages and types, and its peak on the rank with the highest one."""
    out = folder / "peaks"
    command = [sys.executable, "-m", "tests.support.live_peaks", str(out), *map(",".join, cases)]
    env = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(REPOSITORY)}
    commands = [[*command, str(batch_size)]] * ranks
    for rank in start_commands_by_hand(commands, folder, env, timeout=timeout, preloaded=DEEPSPEED):
        rank.check()
    files = [Path(f"{out}-{rank}").read_text().splitlines() for rank in range(ranks)]
    for lines in zip(*files, strict=True):
        found = [json.loads(line) for line in lines]
        yield found[0], max(case["peak"] for case in found)


def compare_peaks(
    cases: Sequence[Sequence[str]], ranks: int, folder: Path, timeout: float
) -> Iterator[tuple[str, float]]:
    """The relative error of the estimate in each case under FSDP2."""
    for case, real in measure_peaks(cases, ranks, 32, folder, timeout):
        name, stage, dtype = case["model"], case["stage"], case["dtype"]
        yield f"{name} {stage} {dtype}", estimate_sharded(name, stage, dtype, ranks, 32) / real - 1
