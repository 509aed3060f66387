"""Reasons why ranks or the user's objects do not work with FSDP2, regardless of memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from launcher.agreement.facts import Agreement
from launcher.config.fsdp_settings import describe_indivisible
from launcher.config.schema import FsdpOptions, RunConfig
from strategies.base import StrategyError
from strategies.fsdp import HSDP, FullyShard
from strategies.registry import AUTO, find_strategy, list_candidates
from strategies.weight_callbacks import describe_weight_callback

if TYPE_CHECKING:
    from torch import nn


def find_fsdp_problems(name: str, config: RunConfig, agreement: Agreement) -> list[str]:
    """Why these ranks cannot run a strategy of FSDP2, with what to do; empty for other strategies."""
    if not isinstance(find_strategy(name), FullyShard):
        return []
    problems = [f"{reason}; remove it, or use `strategy: ddp`" for reason in _callback_obstacles(agreement)]
    if name == HSDP.name:
        problems += _find_mesh_problems(config.fsdp, agreement)
    return problems


def fsdp_obstacles(config: RunConfig, agreement: Agreement) -> dict[str, str]:
    """The reasons why FSDP2's candidates do not work with the ranks and the user's objects, by their names."""
    shared = _callback_obstacles(agreement)
    found = {each.name: shared for each in list_candidates() if isinstance(each, FullyShard)}
    found[HSDP.name] = [*shared, *_find_mesh_problems(config.fsdp, agreement)]
    return {name: "; ".join(obstacles) for name, obstacles in found.items() if obstacles}


def reads_blocks(config: RunConfig) -> bool:
    """Whether a setting is about the blocks of the model, and the strategy may read it."""
    may_shard = config.strategy == AUTO or isinstance(find_strategy(config.strategy), FullyShard)
    return config.activation_checkpointing is True or (may_shard and bool(config.fsdp.blocks or config.fsdp.compile))


def find_block_problem(model: nn.Module, config: RunConfig, strategy: str) -> str | None:
    """Why the settings of FSDP2 do not fit the model, with what to do; None if they do, or have no effect."""
    is_fsdp = strategy != AUTO and isinstance(find_strategy(strategy), FullyShard)
    if not is_fsdp and strategy != AUTO and config.activation_checkpointing is not True:
        return None
    from strategies import fsdp_blocks
    from strategies.block_checkpoints import find_checkpointed

    if config.fsdp.blocks:
        try:
            fsdp_blocks.check_wrap(model, config.fsdp.blocks)
        except StrategyError as error:
            return str(error)
    needs: list[str] = []
    if config.activation_checkpointing is True and not find_checkpointed(model, config.fsdp.blocks):
        needs.append("activation_checkpointing")
    # Without FSDP2 no block is compiled.
    if is_fsdp and config.fsdp.compile and not fsdp_blocks.find_blocks(model, config.fsdp.blocks):
        needs.append("fsdp.compile")
    if not needs:
        return None
    return (
        f"{' and '.join(needs)}: given True, but the model has no blocks, which are modules of a class that occurs at "
        "least twice; name their classes in `fsdp.wrap`, or remove it"
    )


def _callback_obstacles(agreement: Agreement) -> list[str]:
    names = agreement.facts[0].traits.get("weight_callbacks") or ()
    return [describe_weight_callback(name) for name in names]


def _find_mesh_problems(fsdp: FsdpOptions, agreement: Agreement) -> list[str]:
    """Why the ranks cannot be divided into groups of equal size."""
    world = agreement.world_size
    if fsdp.shard_ranks is not None:
        if world % fsdp.shard_ranks == 0:
            return []
        problem = describe_indivisible(fsdp.shard_ranks, world)
        return [f"{problem.path}: {problem.message}"]
    sizes: Sequence[int] = sorted({fact.local_world_size for fact, _ in agreement.kinds()})
    if len(sizes) == 1:
        return []
    shown = f"{', '.join(map(str, sizes[:-1]))} and {sizes[-1]}"
    advice = "start as many on each node, set `fsdp.shard_ranks`, or use `strategy: fsdp2`"
    return [f"strategy {HSDP.name} shards over the ranks of each node, but the nodes have {shown} ranks; {advice}"]
