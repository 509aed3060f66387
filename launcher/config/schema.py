"""`RunConfig`: the user's settings as a frozen record."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from launcher.core.secrets import redact, with_references
from launcher.core.yaml_loader import dump_yaml


def _at_least(minimum: float, default: Any) -> Any:
    """A field whose number, if given, is at least `minimum`."""
    return field(default=default, metadata={"minimum": minimum})


@dataclass(frozen=True)
class TrainerOptions:
    """Lightning's Trainer arguments, with Lightning's names, meanings and defaults.

    Settings that the launcher decides (accelerator, strategy, devices, num_nodes, precision) are at the top level; they
    are also read under `trainer`, as in LightningCLI.
    """

    max_epochs: int | None = _at_least(-1, None)
    min_epochs: int | None = _at_least(0, None)
    max_steps: int = _at_least(-1, -1)
    min_steps: int | None = _at_least(0, None)
    max_time: str | dict[str, int] | None = None
    fast_dev_run: int | bool = _at_least(0, False)
    limit_train_batches: int | float | None = _at_least(0, None)
    limit_val_batches: int | float | None = _at_least(0, None)
    limit_test_batches: int | float | None = _at_least(0, None)
    limit_predict_batches: int | float | None = _at_least(0, None)
    overfit_batches: int | float = _at_least(0, 0.0)
    val_check_interval: int | float | str | None = _at_least(0, None)
    check_val_every_n_epoch: int | None = _at_least(1, 1)
    num_sanity_val_steps: int | None = _at_least(-1, None)
    log_every_n_steps: int | None = _at_least(0, None)
    enable_checkpointing: bool | None = None
    enable_progress_bar: bool | None = None
    enable_model_summary: bool | None = None
    accumulate_grad_batches: int = _at_least(1, 1)
    gradient_clip_val: int | float | None = _at_least(0, None)
    gradient_clip_algorithm: Literal["norm", "value"] | None = None
    deterministic: bool | Literal["warn"] | None = None
    benchmark: bool | None = None
    inference_mode: bool = True
    use_distributed_sampler: bool = True
    profiler: str | dict[str, Any] | None = None
    detect_anomaly: bool = False
    barebones: bool = False
    sync_batchnorm: bool = False
    reload_dataloaders_every_n_epochs: int = _at_least(0, 0)
    enable_autolog_hparams: bool = True
    callbacks: list[dict[str, Any]] | dict[str, Any] | None = None
    logger: bool | list[dict[str, Any]] | dict[str, Any] | None = None
    plugins: list[dict[str, Any]] | dict[str, Any] | None = None


@dataclass(frozen=True)
class CheckpointOptions:
    """When checkpoints are written. The last checkpoint is always written; a run resumes from it.

    Attributes:
        every: `auto` chooses the interval from the measured cost of a save and the run's failures, instead of the two
            settings below.
        every_n_epochs: save after each N epochs.
        every_n_steps: save after each N optimizer steps, the most that a crash of all ranks can cost.
        save_top_k: number of best checkpoints to keep; -1 keeps all.
        monitor: the metric that decides which checkpoints are the best.
        mode: whether a smaller or a larger value is better.
        background: whether the training waits only for a copy of the state in host memory, and the file is written
            beside it; `auto` does so for one device and DDP. (`async` is no valid name in Python.)
    """

    every: Literal["auto"] | None = None
    every_n_epochs: int | None = _at_least(1, None)
    every_n_steps: int | None = _at_least(1, None)
    save_top_k: int = _at_least(-1, 1)
    monitor: str | None = None
    mode: Literal["min", "max"] = "min"
    background: bool | Literal["auto"] = "auto"


@dataclass(frozen=True)
class WandbOptions:
    """Weights & Biases.

    Attributes:
        mode: `auto` is online if an API key is available, offline otherwise.
        project: name of the project.
        entity: user or team that owns the project.
        group: group of runs in the project.
        tags: labels of the run.
        init_timeout: seconds to wait for the server before the run continues without W&B.
    """

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str = "launcher"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    init_timeout: float = _at_least(1, 20.0)


@dataclass(frozen=True)
class WatchOptions:
    """When an alert is raised; the other names and meanings are those of `launcher.monitoring.health.Limits`.

    Attributes:
        every_n_steps: steps between two samples; Lightning's `log_every_n_steps` if not given.
    """

    every_n_steps: int | None = _at_least(1, None)
    floor: float = _at_least(0, 1.0)
    floor_steps: int = _at_least(1, 100)
    slow_factor: float = _at_least(1, 1.5)
    slow_share: float = _at_least(0, 0.1)
    slow_steps: int = _at_least(1, 50)


@dataclass(frozen=True)
class FsdpOptions:
    """How FSDP2 shards; read by `fsdp2`, `fsdp2_grad_op`, `hsdp` and `fsdp2_offload`.

    Attributes:
        wrap: names or import paths of the module classes that are gathered one after another, and computed again by
            activation checkpointing; by default the model's repeated blocks.
        shard_ranks: ranks that share the states under `hsdp`; by default those of a node.
        reduce_dtype: type in which gradients are summed over the ranks; `param` is that of the computation.
        reduce_every_batch: sum gradients after each micro batch, which keeps only shards of them; false sums them once
            per step, which sends less and keeps whole gradients.
        compile: whether each block is compiled by torch.compile.
    """

    wrap: list[str] | str = field(default_factory=list)
    shard_ranks: int | None = _at_least(1, None)
    reduce_dtype: Literal["fp32", "param"] = "fp32"
    reduce_every_batch: bool = True
    compile: bool = False

    @property
    def blocks(self) -> tuple[str, ...]:
        """The names of the classes in `wrap`, without their modules."""
        given = [self.wrap] if isinstance(self.wrap, str) else self.wrap
        return tuple(name.rpartition(".")[2] for name in given)


@dataclass(frozen=True)
class SlurmOptions:
    """What `launcher submit` requests from SLURM unless its flags set it; named as sbatch's options."""

    nodes: int | None = _at_least(1, None)
    gpus_per_node: int | None = _at_least(1, None)
    cpus_per_task: int | None = _at_least(1, None)
    time: str | int | None = None
    mem: str | int | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    reservation: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    nodelist: str | None = None
    dependency: str | None = None
    mail_type: str | None = None
    mail_user: str | None = None
    signal: Literal["USR1", "USR2"] | None = None
    signal_delay: int | None = _at_least(1, None)


@dataclass(frozen=True)
class RunConfig:
    """One run. `model` and `data` are `class_path` and `init_args`, as in LightningCLI.

    Attributes:
        name: name of the run and of its folder in `runs_dir`; by default from the date and the config.
        runs_dir: folder of all runs.
        seed: seed of all random generators and of the order of the data.
        accelerator: kind of device; `auto` takes a GPU if there is one.
        devices: ranks on each node; `auto` takes all GPUs, or one process on a CPU.
        num_nodes: number of nodes; `auto` takes the number of torchrun or SLURM.
        strategy: `auto`, `single_device`, `ddp`, `ddp_find_unused_parameters_true`, `fsdp2`, `fsdp2_grad_op`, `hsdp`,
            `fsdp2_offload`, `deepspeed_stage_1`, `_2`, `_3`, `_2_offload`, `_3_offload`, `_3_offload_nvme`, or one of
            an installed package.
        deepspeed_config: DeepSpeed settings, or the path of a JSON file; missing and 'auto' values are planned.
        precision: `auto`, or any spelling of a precision, which every rank must support.
        precision_fallback: if a rank does not support it, use the best precision that all ranks share.
        on_precision_change: what to do if a resumed run would train in another precision than its checkpoint.
        use_amp: true requests mixed precision where supported, false turns it off.
        global_batch_size: samples per optimizer step, over all ranks.
        memory_share: share of each device's memory that a plan may use.
        on_oom: what to do when a run is out of memory: `stop`, or restart with the `next` strategy that needs less.
        ddp: further arguments of Lightning's DDPStrategy, such as `bucket_cap_mb` or `ddp_comm_hook`.
        fsdp: how FSDP2 shards.
        activation_checkpointing: whether blocks are computed again in the backward pass, which saves their activations;
            `auto` does it only where nothing else fits.
        static_graph: whether DDP may use the first step's graph for all steps; `auto` reads the model's `static_graph`.
        resume: `none`, `auto` (this run's last checkpoint, if it has one) or the path of a checkpoint.
        resume_trust: whether that checkpoint may run code when it is loaded, as objects of unknown classes do; a run's
            own checkpoints may, if no other user can write to its directory.
        agreement_timeout: seconds that the ranks wait for each other at the start.
        process_group_timeout: seconds after which a collective that waits for a rank fails.
        keep_last_step: whether the other ranks save the state of the last step when one fails, so that a restart
            repeats no step; `auto` does it under DDP on CPUs.
        trainer: Lightning's Trainer arguments.
        checkpoint: when checkpoints are written.
        wandb: Weights & Biases.
        watch: when an alert on the loss scale or the speed of ranks is raised.
        slurm: what `launcher submit` requests from SLURM.
        model: the LightningModule.
        data: the LightningDataModule; not needed if the model has its own loaders.
        optimizer: replaces the result of the model's configure_optimizers.
        lr_scheduler: the schedule of that optimizer.
    """

    name: str | None = None
    runs_dir: str = "runs"
    seed: int = _at_least(0, 42)
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "auto"
    devices: int | Literal["auto"] = _at_least(1, "auto")
    num_nodes: int | Literal["auto"] = _at_least(1, "auto")
    strategy: str = "auto"
    deepspeed_config: str | dict[str, Any] | None = None
    precision: str | int = "auto"
    precision_fallback: bool = False
    use_amp: bool | None = None
    on_precision_change: Literal["notice", "error"] = "notice"
    global_batch_size: int | None = _at_least(1, None)
    memory_share: float = 0.92
    on_oom: Literal["stop", "next"] = "stop"
    ddp: dict[str, Any] | None = None
    fsdp: FsdpOptions = field(default_factory=FsdpOptions)
    activation_checkpointing: bool | Literal["auto"] = "auto"
    static_graph: bool | Literal["auto"] = "auto"
    resume: str = "none"
    resume_trust: bool = False
    agreement_timeout: float = _at_least(1, 300.0)
    process_group_timeout: float = _at_least(1, 1800.0)
    keep_last_step: bool | Literal["auto"] = "auto"
    trainer: TrainerOptions = field(default_factory=TrainerOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    wandb: WandbOptions = field(default_factory=WandbOptions)
    watch: WatchOptions = field(default_factory=WatchOptions)
    slurm: SlurmOptions = field(default_factory=SlurmOptions)
    model: dict[str, Any] | None = None
    data: dict[str, Any] | None = None
    optimizer: dict[str, Any] | None = None
    lr_scheduler: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain YAML values; `parse_config` is the inverse."""
        return dataclasses.asdict(self)

    def to_yaml(self, env: Mapping[str, str] = MappingProxyType({})) -> str:
        """As a config file for `--config`; secrets are references to variables, see `launcher.core.secrets`."""
        return dump_yaml(with_references(self.to_dict(), env))

    def digest(self) -> str:
        """SHA-256 over every field but the secrets, as hexadecimal digits; equal for equal configs."""
        return hashlib.sha256(repr(_sorted(redact(self.to_dict()))).encode()).hexdigest()


def _sorted(value: Any) -> Any:
    """A form that does not depend on the order of keys; tuples count as lists, as in YAML."""
    if isinstance(value, Mapping):
        return sorted(((repr(k), _sorted(v)) for k, v in value.items()), key=lambda pair: pair[0])
    if isinstance(value, list | tuple):
        return [_sorted(v) for v in value]
    return None if value is None else str(value)


@dataclass(frozen=True, slots=True)
class FieldInfo:
    """The valid values of a config at one dotted path."""

    hint: Any
    minimum: float | None


@functools.cache
def field_hints(record: type) -> Mapping[str, Any]:
    """The types of a record's fields; kept, because evaluating the annotations of all records takes 5 ms."""
    return MappingProxyType(typing.get_type_hints(record))


@functools.cache
def config_fields(record: type = RunConfig, prefix: str = "") -> tuple[tuple[str, FieldInfo], ...]:
    """Every setting of the config: its dotted path, type and smallest number."""
    found: list[tuple[str, FieldInfo]] = []
    hints = field_hints(record)
    for entry in dataclasses.fields(record):
        hint = hints[entry.name]
        if dataclasses.is_dataclass(hint):
            found += config_fields(typing.cast(type, hint), f"{prefix}{entry.name}.")
        else:
            found.append((prefix + entry.name, FieldInfo(hint, entry.metadata.get("minimum"))))
    return tuple(found)
