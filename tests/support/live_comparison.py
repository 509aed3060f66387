"""Runs `tests.support.live_states` on real ranks and compares its numbers with the formulas."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from strategies.deepspeed_config import ZeroVariant
from strategies.model_shape import describe_model, find_optimizer
from strategies.model_states import (
    ModelShape,
    StateTypes,
    ZeroSettings,
    fully_sharded_states,
    replicated_states,
)
from strategies.zero_states import zero_states
from tests.support.live_shards import shard_ranks, variant_of
from tests.support.model_families import SMALL
from tests.support.runs import start_commands_by_hand
from tests.support.warm import DEEPSPEED

REPOSITORY = Path(__file__).resolve().parents[2]
PARTS = ("parameters", "gathered", "gradients", "optimizer_states")
SETTINGS = ZeroSettings(reduce_bucket_size=1000, persistence_threshold=500)


@dataclass(frozen=True)
class Compared:
    """One part of one case: bytes on the rank with the most."""

    model: str
    stage: int | str
    dtype: str
    world_size: int
    part: str
    live: int
    formula: int


def compare(
    models: Sequence[str],
    stages: Sequence[int | str],
    dtypes: Sequence[str],
    world_size: int,
    folder: Path,
    extensions: Path,
    timeout: float,
) -> Iterator[Compared]:
    """Every part of every case, measured on `world_size` gloo ranks.

    Args:
        extensions: folder of DeepSpeed's compiled ops.
    """
    out = folder / f"live-{world_size}"
    command = [sys.executable, "-m", "tests.support.live_states"]
    command += [str(out), ",".join(models), ",".join(map(str, stages)), ",".join(dtypes)]
    env = {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": str(extensions),
        "PYTHONPATH": str(REPOSITORY),
    }
    for rank in start_commands_by_hand([command] * world_size, folder, env, timeout=timeout, preloaded=DEEPSPEED):
        rank.check()
    shapes = {name: shape_of(name) for name in models}
    ranks = [Path(f"{out}-{rank}").read_text().splitlines() for rank in range(world_size)]
    for lines in zip(*ranks, strict=True):
        cases = [json.loads(line) for line in lines]
        first = cases[0]
        name, stage, dtype = first["model"], first["stage"], first["dtype"]
        types = types_of(stage, dtype)
        if isinstance(stage, str):
            ranks_of_state, offloads = shard_ranks(stage, world_size), variant_of(stage).offload
            states = fully_sharded_states(shapes[name], ranks_of_state, types, offloads=offloads)
        elif stage:
            states = zero_states(shapes[name], ZeroVariant(stage), world_size, types, SETTINGS)
        else:
            states = replicated_states(shapes[name], types)
        if states.host:
            # The device is the host: all states are together.
            live = max(sum(case[part] for part in PARTS) for case in cases)
            formula = states.host + sum(getattr(states, part) for part in PARTS)
            yield Compared(name, stage, dtype, world_size, "all", live, formula)
            continue
        for part in PARTS:
            live = max(case[part] for case in cases)
            yield Compared(name, stage, dtype, world_size, part, live, getattr(states, part))


def shape_of(name: str) -> ModelShape:
    """The model's shape for the plan."""
    module = SMALL[name].make()
    return describe_model(module, find_optimizer(module.configure_optimizers()))


def types_of(stage: int | str, dtype: str) -> StateTypes:
    """Without ZeRO all types follow the parameters; ZeRO keeps fp32 states, and buffers unchanged."""
    if dtype != "bf16":
        return StateTypes(compute_bytes=2 if dtype == "mixed" else None)
    return StateTypes(2, 0.5, 0.5) if stage == 0 or isinstance(stage, str) else StateTypes(2)
