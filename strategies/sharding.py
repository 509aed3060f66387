"""The settings of FSDP2, as the plan decides them. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ShardOptions:
    """The config's `fsdp`, and the plan's decision on activation checkpointing.

    Attributes:
        wrap: names of the module classes that are gathered one after another; empty finds them.
        shard_ranks: ranks that share the states under `hsdp`; None takes those of a node.
        reduce_dtype: type in which gradients are summed: 'fp32', or 'param' for that of the computation.
        reduce_every_batch: sum gradients after each micro batch; else once per step, which keeps whole gradients.
        compile: whether each block is compiled by torch.compile.
        checkpoint_activations: whether the blocks' activations are computed again in the backward pass.
    """

    wrap: tuple[str, ...] = ()
    shard_ranks: int | None = None
    reduce_dtype: str = "fp32"
    reduce_every_batch: bool = True
    compile: bool = False
    checkpoint_activations: bool = False


DEFAULT_SHARDING = ShardOptions()


@dataclass(frozen=True, slots=True)
class ShardVariant:
    """One way to shard.

    Attributes:
        reshard: parameters are freed after a block's forward pass, and gathered again for its backward pass.
        hybrid: states are sharded within a group of ranks (a node), and replicated across the groups.
        offload: shards are in host memory.
    """

    reshard: bool = True
    hybrid: bool = False
    offload: bool = False


def describe_strategy(name: str, is_checkpointed: bool) -> str:
    """A strategy in a message, with the plan's decision on activation checkpointing."""
    return f"{name} with activation checkpointing" if is_checkpointed else name
