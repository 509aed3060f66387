"""`StrategyEntry`: everything the launcher knows about one strategy.

Only `build` and `precision_plugin` import torch. A strategy of your own is a subclass. The
defaults describe one in which every rank holds all model states.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from strategies.machine import CollectiveTraffic, MachineModel
from strategies.model_states import (
    DEFAULT_SETTINGS,
    ModelShape,
    ModelStates,
    StateTypes,
    ZeroSettings,
    replicated_states,
)
from strategies.precision_names import Precision
from strategies.sharding import DEFAULT_SHARDING, ShardOptions
from strategies.step_trace import ModelProfile, Moment, StepTrace

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule
    from lightning.pytorch.plugins.precision import Precision as PrecisionPlugin
    from lightning.pytorch.strategies import Strategy


class StrategyError(ValueError):
    """A strategy that does not exist or cannot run here."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """A candidate that was not chosen, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class StrategyChoice:
    """The chosen strategy and its options.

    Attributes:
        name: of the strategy's entry in `strategies.registry`.
        backend: process group backend, None without a process group.
        gradient_as_bucket_view: gradients are views into DDP's buckets, which saves one copy of all gradients.
        static_graph: DDP may reuse the graph of the first step in all steps.
        find_unused_parameters: DDP searches every step for parameters without a gradient.
    """

    name: str
    reasons: tuple[str, ...]
    rejected: tuple[Rejected, ...] = field(default=())
    backend: str | None = None
    gradient_as_bucket_view: bool = False
    static_graph: bool = False
    find_unused_parameters: bool = False


@dataclass(frozen=True, slots=True)
class ChoiceRequest:
    """The inputs of a choice.

    Attributes:
        has_static_graph: whether the model declares `static_graph = True`: every step uses the same parameters.
        is_auto: the user left the strategy to the launcher.
    """

    world_size: int
    device_kind: str
    accumulate: int
    has_static_graph: bool
    is_auto: bool

    @property
    def backend(self) -> str:
        """Backend of the process group."""
        return "nccl" if self.device_kind == "cuda" else "gloo"


@dataclass(frozen=True, slots=True)
class TrainingStep:
    """One optimizer step: the input of the formulas for memory and time.

    Attributes:
        trace: activations of one micro batch, traced in the types that the strategy computes in.
        settings: DeepSpeed's buckets; other strategies ignore them.
        whole_process: count the memory of a whole CPU process, not only of a GPU's allocator.
        sharding: how FSDP2 shards; `shard_ranks` None means all ranks.
    """

    model: ModelShape
    trace: StepTrace
    world_size: int
    types: StateTypes
    accumulate: int = 1
    settings: ZeroSettings = DEFAULT_SETTINGS
    whole_process: bool = False
    sharding: ShardOptions = DEFAULT_SHARDING


@dataclass(frozen=True, slots=True)
class RankLocation:
    """Position of a rank, with the meaning of torchrun's variables.

    Attributes:
        local_rank: rank within the node, and the index of its device.
        local_world_size: ranks on this node.
        node_rank: rank of the node.
        main_address: host of rank zero's store.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int
    main_address: str
    main_port: int


@dataclass(frozen=True, slots=True)
class CheckpointHooks:
    """Hooks of the launcher for a strategy that reads and writes its own checkpoints.

    Attributes:
        on_written: called on rank zero with a complete checkpoint: where it is, its final name, and its step.
        writing: entered on every rank around the writing of a checkpoint's temporary folder.
        read_consolidated: reads a checkpoint of any world size as the one file that Lightning would have saved.
        check_model: raises if the weights do not fit the model; without weights it reads those of the checkpoint.
    """

    on_written: Callable[[Path, Path, int | None], None]
    writing: Callable[[Path], AbstractContextManager[None]]
    reading: Callable[[Path], AbstractContextManager[None]]
    read_consolidated: Callable[[Path], Mapping[str, Any]]
    check_model: Callable[[LightningModule, Mapping[str, Any] | None], None] | None = None


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """The inputs of `StrategyEntry.build`, besides the choice.

    Attributes:
        timeout: seconds after which a collective fails; only used if Lightning itself makes a process group.
        deepspeed: complete DeepSpeed config, for a strategy that needs DeepSpeed.
        pretend_fp16: for tests: DeepSpeed accepts fp16 on a CPU.
        ddp: the user's arguments of Lightning's DDPStrategy.
        sharding: how FSDP2 shards.
        checkpoint: hooks for a strategy that reads and writes its checkpoints itself; None outside of a run.
    """

    device_kind: str
    location: RankLocation
    timeout: float
    deepspeed: Mapping[str, Any] | None = None
    pretend_fp16: bool = False
    ddp: Mapping[str, Any] | None = None
    on_unused: Callable[[tuple[str, ...]], None] | None = None
    sharding: ShardOptions = DEFAULT_SHARDING
    checkpoint: CheckpointHooks | None = None


class StrategyEntry(ABC):
    """One strategy.

    Attributes:
        name: what `strategy:` in a config takes; Lightning's name where Lightning has one.
        summary: one line, for `--help` and `launcher init`.
        order: position in lists. Of two candidates of about the same speed the lower one is chosen, unless they are
            equally fast and the other one needs less memory.
        is_candidate: whether `strategy: auto` compares it.
        is_sharded: whether a rank holds only a part of the weights or states, so that its module is incomplete.
        needs_deepspeed: whether DeepSpeed must be installed and able to run on every rank.
        casts_module: in mixed precision it casts the module instead of using autocast.
        accepts_ddp_options: whether the config's `ddp` applies.
        accepts_precision_plugin: whether it works with a precision plugin of the user's.
        offload: 'cpu' or 'nvme' if optimizer states leave the device.
        checkpoint_format: name of a format in `launcher.checkpoint.formats`, or 'module:NAME' of your own.
        libraries: modules that each rank imports for it.
        collective_files: parts of paths of source files in which a rank waits for other ranks.
        hook_seconds: Python time that it adds per parameter tensor and micro batch.
    """

    name: str
    summary: str
    order: int
    is_candidate: ClassVar[bool] = True
    is_sharded: ClassVar[bool] = False
    needs_process_group: ClassVar[bool] = True
    needs_deepspeed: ClassVar[bool] = False
    casts_module: ClassVar[bool] = False
    accepts_ddp_options: ClassVar[bool] = False
    accepts_precision_plugin: ClassVar[bool] = True
    checkpoint_format: ClassVar[str] = "file"
    libraries: ClassVar[tuple[str, ...]] = ()
    collective_files: ClassVar[tuple[str, ...]] = ()
    offload: str | None = None
    hook_seconds: float = 0.0

    def __repr__(self) -> str:
        return f"<strategy {self.name}>"

    @abstractmethod
    def choose(self, request: ChoiceRequest) -> StrategyChoice:
        """The choice of this strategy, with its reasons.

        Raises:
            StrategyError: these ranks cannot run it.
        """

    def obstacle(self, profile: ModelProfile, machine: MachineModel, precision: Precision) -> str | None:
        """Why these ranks cannot run it, regardless of memory; None if they can."""
        del profile, machine, precision
        return None

    def layout_problem(self, machine: MachineModel, sharding: ShardOptions) -> str | None:
        """Why ranks in this layout cannot run it, or gain nothing by it; None if they can."""
        del machine, sharding
        return None

    def traces(self, profile: ModelProfile) -> tuple[StepTrace, StepTrace]:
        """The profile's traces in the types that it computes in."""
        return profile.sharded if self.casts_module else profile.plain

    def state_types(self, precision: Precision) -> StateTypes:
        """Widths of parameters and states. Mixed precision is autocast over fp32 parameters."""
        if precision in (Precision.FP16_TRUE, Precision.BF16_TRUE):
            return StateTypes(2, 0.5, 0.5)
        return StateTypes(8, 2.0, 2.0) if precision is Precision.FP64_TRUE else StateTypes()

    def model_states(self, step: TrainingStep, measured_optimizer: int | None = None) -> ModelStates:
        """Bytes of parameters, gradients and optimizer states on the rank that holds most.

        `measured_optimizer` is the bytes of all optimizer states, if they were measured.
        """
        return replicated_states(step.model, step.types, measured_optimizer)

    def moments(self, step: TrainingStep, states: ModelStates) -> Sequence[Moment]:
        """The moments of a step that can be its peak, with the bytes that are alive."""
        return [
            Moment("forward", states.gradients, step.trace.forward, 0),
            Moment("backward", states.gradients, step.trace.backward, 0),
            Moment("step", states.gradients, step.trace.inputs, 0, step.trace.step),
        ]

    @abstractmethod
    def collectives(self, step: TrainingStep, machine: MachineModel, compute: float) -> Sequence[CollectiveTraffic]:
        """The collectives of one optimizer step; `compute` is the seconds of its forward and backward passes."""

    def optimizer_time(self, step: TrainingStep, machine: MachineModel) -> tuple[float, float]:
        """Seconds of the optimizer's step, and of moving states to and from host memory or NVMe."""
        return estimate_update_time(step.model.trainable_numel, step, machine), 0.0

    def python_seconds(self, step: TrainingStep) -> float:
        """Python time that it adds to an optimizer step."""
        return self.hook_seconds * len(step.model.parameters) * step.accumulate

    @abstractmethod
    def build(self, choice: StrategyChoice, options: BuildOptions) -> Strategy:
        """Lightning's strategy object."""

    def precision_plugin(self, precision: Precision, device_kind: str, floor: float) -> PrecisionPlugin | None:
        """A precision plugin where Lightning's choice would differ from the plan; None otherwise.

        In 16-mixed the scaler must count the steps that it skips. Lightning turns 16-mixed on a CPU into bf16-mixed,
        which is not needed: torch has a GradScaler for CPUs.
        """
        if precision is not Precision.FP16_MIXED or device_kind == "mps":
            return None
        from lightning.pytorch.plugins.precision import MixedPrecision

        from strategies.loss_scale import CountingGradScaler

        return MixedPrecision("16-mixed", device_kind, CountingGradScaler(device_kind, floor=floor))

    def model_problem(self, model: LightningModule) -> str | None:
        """Why it cannot train this model, and what to do; None if it can."""
        del model
        return None

    def model_notices(self, model: LightningModule) -> Sequence[str]:
        """Notices about parts of the model that have no effect under this strategy."""
        del model
        return ()


def estimate_update_time(numel: float, step: TrainingStep, machine: MachineModel) -> float:
    """Seconds for an update of `numel` elements: weights and states are read and written, gradients are read."""
    touched = 2 * (4 + step.model.optimizer.state_bytes_per_element) + 4
    return numel * touched / machine.memory_bandwidth
