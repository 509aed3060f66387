"""Model states, exact to the byte: parameters, gradients and optimizer states of a rank. Pure.

DDP follows torch's `reducer.cpp`. ZeRO: `strategies.zero_states`. FSDP2 follows torch's
`fsdp/_fully_shard/_fsdp_param.py`.
`tests/benchmarks/model_states.py` compares every number with the live tensors of real runs.
"""

from __future__ import annotations

from dataclasses import dataclass

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


def _optimizer_bytes(model: ModelShape, types: StateTypes) -> int:
    tensors = sum(len(group) for group in model.trained_groups())
    elements = sum(sum(group) for group in model.trained_groups())
    kept = int(model.optimizer.state_bytes_per_element * types.state_scale)
    return elements * kept + tensors * model.optimizer.state_bytes_per_tensor
