"""Model states of a rank under ZeRO, exact to the byte. Pure.

ZeRO: Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054, section 3. Padding and buffers beyond the formulas
follow DeepSpeed 0.19: `runtime/zero/stage_1_and_2.py`, `runtime/zero/stage3.py`.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate

from strategies.deepspeed_config import NVME, ZeroVariant
from strategies.model_states import FP32, ModelShape, ModelStates, StateTypes, ZeroSettings


def zero_states(
    model: ModelShape,
    variant: ZeroVariant,
    world_size: int,
    types: StateTypes,
    settings: ZeroSettings,
) -> ModelStates:
    """The states of the rank that holds most under ZeRO."""
    states = _stage_3 if variant.stage == 3 else _stage_1_or_2
    return states(model, variant, world_size, types, settings)


def owned_parts(model: ModelShape, stage: int, world_size: int) -> tuple[int, ...]:
    """Elements of each optimizer group whose states one rank owns, with padding.

    In stages 1 and 2 a group is one flat buffer, padded to 2 elements per rank; in stage 3 each parameter is split
    separately, padded to one element per rank.
    """
    groups = model.trained_groups()
    if stage == 3:
        return tuple(sum(-(-numel // world_size) for numel in group) for group in groups)
    unit = 2 * world_size
    return tuple(-(-sum(group) // unit) * 2 for group in groups)


def _stage_1_or_2(
    model: ModelShape, variant: ZeroVariant, world_size: int, types: StateTypes, settings: ZeroSettings
) -> ModelStates:
    """Each optimizer group is one flat buffer, padded to 2 elements per rank; a rank owns one part of each."""
    groups = model.trained_groups()
    parts = owned_parts(model, variant.stage, world_size)
    # Parameters in no optimizer group and frozen ones are not moved.
    outside = model.numel - sum(map(sum, groups))
    states = sum(
        part * (FP32 + model.optimizer.state_bytes_per_element) + model.optimizer.state_bytes_per_tensor
        for part in parts
    )
    kept = max(owned_gradients(groups, parts, world_size))
    bucket = settings.reduce_bucket_size * types.parameter_bytes * (2 if settings.overlap_comm else 1)
    parameters = (sum(parts) * world_size + outside) * types.parameter_bytes + types.buffers(model)
    if variant.offload_optimizer:
        # In host memory: fp32 master, states and fp32 gradient of each part, and one part in the parameters' width.
        host = states + sum(parts) * (FP32 + types.parameter_bytes)
        largest = max((p.numel for p in model.parameters), default=0) * types.parameter_bytes
        return ModelStates(parameters, 0, 0, bucket=bucket + largest, host=host + largest)
    return ModelStates(parameters, kept * types.parameter_bytes, states, bucket=bucket)


def owned_gradients(groups: list[list[int]], parts: tuple[int, ...], world_size: int) -> list[int]:
    """Elements of gradients that each rank keeps in stages 1 and 2, for the first `MOST_RANKS` ranks.

    These are all tensors that overlap its part, and the padding.
    """
    kept = [0] * min(world_size, MOST_RANKS)
    for group, part in zip(groups, parts, strict=True):
        ends = list(accumulate(group))
        for rank in range(len(kept)):
            begin, end = rank * part, (rank + 1) * part
            first = bisect_right(ends, begin)
            last = first
            while last < len(ends) and (ends[last - 1] if last else 0) < end:
                last += 1
            kept[rank] += sum(group[first:last]) + max(0, end - max(ends[-1], begin))
    return kept


# With more ranks a part is smaller than most tensors, and its rank keeps one or two of them.
MOST_RANKS = 4096


def _stage_3(
    model: ModelShape, variant: ZeroVariant, world_size: int, types: StateTypes, settings: ZeroSettings
) -> ModelStates:
    """Each parameter is split separately, padded to one element per rank; gradients have a separate buffer."""
    parts = [-(-p.numel // world_size) for p in model.parameters]
    groups = [[i for i in group if model.parameters[i].trainable] for group in model.groups]
    groups = [group for group in groups if group]
    owned = sum(parts[i] for group in groups for i in group)
    states = owned * (FP32 + model.optimizer.state_bytes_per_element)
    states += len(groups) * model.optimizer.state_bytes_per_tensor
    gathered = 0
    if world_size > 1:
        small = [part * world_size for part, p in zip(parts, model.parameters, strict=True)
                 if p.numel <= settings.persistence_threshold]  # fmt: skip
        gathered = sum(small) * types.parameter_bytes
    bucket = settings.reduce_bucket_size * types.parameter_bytes
    kept = sum(parts) * types.parameter_bytes
    gradients = owned * types.parameter_bytes
    if not variant.offload_optimizer:
        return ModelStates(kept + types.buffers(model), gradients, states, gathered=gathered, bucket=bucket)
    moved = states + owned * FP32  # with the fp32 gradient
    on_nvme = variant.offload_optimizer == NVME
    largest = max(owned_parts(model, 3, world_size), default=0)
    in_flight = min(largest, settings.sub_group_size) * settings.nvme_buffers * FP32
    host = kept + gradients + (in_flight if on_nvme else moved)
    return ModelStates(
        types.buffers(model), 0, 0, gathered=gathered, bucket=bucket, host=host, nvme=moved if on_nvme else 0
    )
