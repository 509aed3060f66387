"""Model states by ZeRO's formulas, exact to the byte: parameters, gradients and optimizer states of a rank.

ZeRO: Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054, section 3. Padding and buffers beyond the formulas
follow DeepSpeed 0.19: `runtime/zero/stage_1_and_2.py`, `runtime/zero/stage3.py`; DDP follows torch's `reducer.cpp`.
FSDP2 follows torch's `fsdp/_fully_shard/_fsdp_param.py`.
`tests/benchmarks/model_states.py` compares every number with the live tensors of real runs.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate

from strategies.deepspeed_config import NVME, ZeroVariant

FP32 = 4


@dataclass(frozen=True, slots=True)
class ParameterShape:
    """One parameter; a tied one counts once.

    Attributes:
        trainable: whether it gets gradients.
        rows: size of dimension 0; 0 for a scalar, which has none; None for a flat parameter.
        is_whole: FSDP2 does not shard it.
        is_whole_in_mixed: FSDP2 does not shard it in mixed precision (batch norms).
    """

    numel: int
    trainable: bool = True
    rows: int | None = None
    is_whole: bool = False
    is_whole_in_mixed: bool = False

    def shard(self, ranks: int) -> int:
        """Elements of one of the parts if FSDP2 shards it on `ranks` ranks: rows, padded to the same number on each."""
        rows = self.numel if self.rows is None else self.rows
        return -(-rows // ranks) * (self.numel // rows) if rows else self.numel


@dataclass(frozen=True, slots=True)
class OptimizerShape:
    """Memory of the user's optimizer, measured on a separate tensor.

    Attributes:
        state_bytes_per_element: bytes of states for each element of a fp32 parameter (8 for Adam).
        state_bytes_per_tensor: bytes per parameter of any size (4 for Adam's step counter).
        temporary_bytes_per_element: bytes per element that a step allocates and frees, on a flat tensor.
    """

    name: str = "AdamW"
    state_bytes_per_element: int = 8
    state_bytes_per_tensor: int = 4
    temporary_bytes_per_element: int = 8


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A model and its optimizer, as the formulas need them.

    Attributes:
        parameters: in the order of `module.parameters()`.
        groups: for each of the optimizer's parameter groups, indices into `parameters`, in the optimizer's order.
        float_buffer_bytes: the module's floating-point buffers, as the module creates them.
        other_buffer_bytes: its other buffers, which no precision changes.
        blocks: for each module that FSDP2 gathers as one, indices into `parameters`; last those outside of all blocks.
            Parameters that it never shards are in none.
    """

    parameters: tuple[ParameterShape, ...]
    groups: tuple[tuple[int, ...], ...]
    optimizer: OptimizerShape = OptimizerShape()
    float_buffer_bytes: int = 0
    other_buffer_bytes: int = 0
    blocks: tuple[tuple[int, ...], ...] = ()

    @property
    def numel(self) -> int:
        """Elements of all parameters."""
        return sum(p.numel for p in self.parameters)

    @property
    def trainable_numel(self) -> int:
        """Elements that get gradients."""
        return sum(p.numel for p in self.parameters if p.trainable)

    def trained_groups(self) -> list[list[int]]:
        """Element counts of the trainable parameters by optimizer group; groups without any are omitted."""
        groups = [[self.parameters[i].numel for i in group if self.parameters[i].trainable] for group in self.groups]
        return [group for group in groups if group]


@dataclass(frozen=True, slots=True)
class StateTypes:
    """Widths of the states.

    Attributes:
        parameter_bytes: bytes of a parameter's element, and of its gradient's.
        state_scale: width of optimizer states relative to fp32, if they have the parameter's type.
        buffer_scale: width of the module's floating-point buffers relative to fp32.
        compute_bytes: bytes of an element of a parameter that FSDP2 has gathered for the computation, and of its
            gradient's; None if they are those of the kept parameter.
    """

    parameter_bytes: int = FP32
    state_scale: float = 1.0
    buffer_scale: float = 1.0
    compute_bytes: int | None = None

    def buffers(self, model: ModelShape) -> int:
        """Bytes of the module's buffers."""
        return int(model.float_buffer_bytes * self.buffer_scale) + model.other_buffer_bytes


@dataclass(frozen=True, slots=True)
class ZeroSettings:
    """Sizes of DeepSpeed's buckets, in elements; Lightning's defaults.

    Attributes:
        reduce_bucket_size: gradients that are reduced together.
        overlap_comm: stages 1 and 2 then keep two buckets.
        persistence_threshold: stage 3 keeps smaller parameters gathered.
        max_live_parameters: most elements that stage 3 keeps gathered.
        prefetch_bucket_size: elements that stage 3 gathers ahead.
        sub_group_size: elements whose states are read from NVMe together.
        nvme_buffers: such groups in host memory at the same time.
    """

    reduce_bucket_size: int = 200_000_000
    overlap_comm: bool = True
    persistence_threshold: int = 100_000
    max_live_parameters: int = 1_000_000_000
    prefetch_bucket_size: int = 50_000_000
    sub_group_size: int = 1_000_000_000
    nvme_buffers: int = 4


DEFAULT_SETTINGS = ZeroSettings()


@dataclass(frozen=True, slots=True)
class ModelStates:
    """Bytes of one rank between backward and optimizer step, when gradients are complete.

    Attributes:
        parameters: weights and the module's buffers that this rank keeps.
        gradients: those that this rank keeps.
        gathered: small parameters that stage 3 keeps gathered.
        bucket: DeepSpeed's reduction buckets.
        host: bytes in the host's memory (offload).
        nvme: bytes on NVMe (offload).
    """

    parameters: int
    gradients: int
    optimizer_states: int
    gathered: int = 0
    bucket: int = 0
    host: int = 0
    nvme: int = 0


def replicated_states(model: ModelShape, types: StateTypes, measured_optimizer: int | None = None) -> ModelStates:
    """The states of each rank if none are sharded.

    The optimizer's states are those measured, in bytes, or else computed from `model.optimizer`.
    """
    return ModelStates(
        parameters=model.numel * types.parameter_bytes + types.buffers(model),
        gradients=model.trainable_numel * types.parameter_bytes,
        optimizer_states=_optimizer_bytes(model, types) if measured_optimizer is None else measured_optimizer,
    )


def is_sharded(parameter: ParameterShape, types: StateTypes) -> bool:
    """Whether FSDP2 shards this parameter if it computes in these types."""
    return not (parameter.is_whole or (parameter.is_whole_in_mixed and types.compute_bytes is not None))


def fully_sharded_states(model: ModelShape, ranks: int, types: StateTypes, *, offloads: bool = False) -> ModelStates:
    """The states of the rank that holds most under FSDP2, of `ranks` ranks that share them."""
    per_element = int(model.optimizer.state_bytes_per_element * types.state_scale)
    per_tensor = model.optimizer.state_bytes_per_tensor
    trained = {i for group in model.groups for i in group if model.parameters[i].trainable}
    # Of parameters that are sharded, and of others.
    parameters, gradients, states = [0, 0], [0, 0], [0, 0]
    for index, p in enumerate(model.parameters):
        part = 0 if is_sharded(p, types) else 1
        own = p.numel if part else p.shard(ranks)
        parameters[part] += own * types.parameter_bytes
        gradients[part] += own * types.parameter_bytes if p.trainable else 0
        states[part] += own * per_element + per_tensor if index in trained else 0
    if offloads:
        host = parameters[0] + gradients[0] + states[0]
        return ModelStates(parameters[1] + types.buffers(model), gradients[1], states[1], host=host)
    return ModelStates(sum(parameters) + types.buffers(model), sum(gradients), sum(states))


def zero_states(
    model: ModelShape,
    variant: ZeroVariant,
    world_size: int,
    types: StateTypes = StateTypes(),
    settings: ZeroSettings = DEFAULT_SETTINGS,
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


def _optimizer_bytes(model: ModelShape, types: StateTypes) -> int:
    tensors = sum(len(group) for group in model.trained_groups())
    elements = sum(sum(group) for group in model.trained_groups())
    kept = int(model.optimizer.state_bytes_per_element * types.state_scale)
    return elements * kept + tensors * model.optimizer.state_bytes_per_tensor


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
