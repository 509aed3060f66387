"""`Plan`: strategy, precision and batch split of a run, with reasons. A pure function of config and agreement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from launcher.agreement.facts import Agreement
from launcher.checkpoint.precision import CheckpointPrecision
from launcher.checkpoint.save_interval import describe_auto
from launcher.config.schema import RunConfig
from launcher.core.errors import PlanError
from launcher.planning.deepspeed import deepspeed_settings, plan_deepspeed
from launcher.planning.fsdp_limits import find_fsdp_problems
from strategies.batch import BatchSplit, BatchSplitError, split_batch
from strategies.choice import Rejected, StrategyChoice, StrategyError, choose_strategy, with_user_options
from strategies.precision import AUTO, AgreedPrecision, PrecisionError, reconcile
from strategies.sharding import ShardOptions
from strategies.unused_parameters import describe_parameters

# The precision of a user's precision plugin.
CUSTOM = "custom"
_TUPLES = ("precision_reasons", "batch_reasons", "hosts", "notices", "ran_out", "checkpointing_reasons",
           "save_reasons")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Plan:
    """The decisions of a run.

    Attributes:
        strategy: the choice, its reasons, and the rejected candidates.
        precision: Lightning 2's name; 'custom' if the user's precision plugin decides.
        precision_before: the checkpoint's precision, if this run continues in another.
        has_loss_scale: whether gradients are scaled.
        batch: how the samples of an optimizer step are split.
        device_kind: 'cpu', 'cuda' or 'mps'.
        devices: number of ranks by name of their device.
        hosts: host names, each once.
        assumed: whether the ranks are assumed, as in a dry run.
        memory: every strategy's memory and time, from `strategies.comparison.Comparison.to_dict`; None if the module
            was not profiled.
        deepspeed: DeepSpeed's complete config; None without DeepSpeed.
        ran_out: strategies that were skipped because they ran out of memory in this run.
        activation_checkpointing: blocks' activations are computed again in the backward pass.
        checkpointing_reasons: why it is on; empty if it is off.
        flops_per_sample: floating point operations of matrix products, convolutions and attention for a sample, forward
            and backward, without those done again; None if no step was traced.
        save_reasons: how the interval between checkpoints is chosen; empty if the config gives one.
    """

    strategy: StrategyChoice
    precision: str
    precision_reasons: tuple[str, ...]
    has_loss_scale: bool
    batch: BatchSplit
    batch_reasons: tuple[str, ...]
    device_kind: str
    devices: Mapping[str, int]
    world_size: int
    num_nodes: int
    hosts: tuple[str, ...]
    precision_before: str | None = None
    notices: tuple[str, ...] = field(default=())
    assumed: bool = False
    memory: Mapping[str, Any] | None = None
    deepspeed: Mapping[str, Any] | None = None
    ran_out: tuple[str, ...] = ()
    activation_checkpointing: bool = False
    checkpointing_reasons: tuple[str, ...] = ()
    flops_per_sample: float | None = None
    save_reasons: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with `global_batch_size` added for readers."""
        values = asdict(self)
        values["batch"]["global_batch_size"] = self.batch.global_batch_size
        return values

    def with_unused_parameters(self, names: Sequence[str]) -> Plan:
        """The plan after parameters of these names got no gradient."""
        reason = f"find_unused_parameters on: {describe_parameters(names)} got no gradient in the first step"
        reasons = (*self.strategy.reasons, reason)
        return replace(self, strategy=replace(self.strategy, find_unused_parameters=True, reasons=reasons))

    def with_loader_batch(self, owner: str, size: int) -> Plan:
        """The plan after a loader, created by `owner`, showed its batch size: `size` samples per batch of one rank."""
        batch = replace(self.batch, micro_batch_size=size)
        return replace(self, batch=batch, batch_reasons=(f"{owner} made a loader of {size} samples a rank",))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """The inverse of `to_dict`."""
        strategy = dict(values["strategy"])
        strategy["reasons"] = tuple(strategy["reasons"])
        strategy["rejected"] = tuple(Rejected(**r) for r in strategy["rejected"])
        batch = {k: v for k, v in values["batch"].items() if k != "global_batch_size"}
        fields: dict[str, Any] = dict(values)
        for name in _TUPLES:
            fields[name] = tuple(values.get(name, ()))
        fields.update(strategy=StrategyChoice(**strategy), batch=BatchSplit(**batch))
        return cls(**fields)


def shard_options(config: RunConfig, *, checkpoint_activations: bool) -> ShardOptions:
    """How FSDP2 shards, with the plan's decision on activation checkpointing."""
    given = config.fsdp
    return ShardOptions(
        given.blocks,
        given.shard_ranks,
        given.reduce_dtype,
        given.reduce_every_batch,
        given.compile,
        checkpoint_activations,
    )


def make_plan(config: RunConfig, agreement: Agreement, checkpoint: CheckpointPrecision | None = None) -> Plan:
    """Decide what to train with.

    Args:
        config: the user's.
        agreement: facts of the ranks. `facts[*].traits` may have `batch_size` (the micro batch of the user's data, or
            None), `static_graph` (whether the model declares that every step uses the same parameters),
            `precision_plugin` (name of the user's plugin, or None) and `weight_callbacks` (the user's callbacks that
            copy or average whole parameters).
        checkpoint: precision of the checkpoint to resume from; None without one.

    Raises:
        PlanError: lists everything that these ranks cannot do.
    """
    problems: list[str] = []
    batch, batch_reasons = _decide_batch(config, agreement, problems)
    precision = _decide_precision(config, agreement, checkpoint, problems)
    strategy = _decide_strategy(config, agreement, batch, problems)
    deepspeed = plan_deepspeed(config, strategy, precision, batch, agreement)
    problems += deepspeed.problems
    if strategy is not None:
        problems += find_fsdp_problems(strategy.name, config, agreement)
    kinds = sorted({f.hardware.device.kind for f, _ in agreement.kinds() if f.hardware})
    if len(kinds) > 1:
        problems.append(f"the ranks train on {' and '.join(kinds)}; one process group needs one kind of device")
    if strategy is None or problems:
        raise PlanError("no plan meets the config:\n" + "\n".join(f"  {p}" for p in problems))
    plugin = agreement.facts[0].traits.get("precision_plugin")
    return Plan(
        strategy=strategy,
        precision=CUSTOM if precision is None else precision.precision.value,
        precision_reasons=(f"the user's own {plugin} decides",) if precision is None else precision.reasons,
        has_loss_scale=precision is not None and precision.has_loss_scale,
        batch=batch,
        batch_reasons=batch_reasons,
        device_kind=_device_kind(agreement),
        devices=_devices(agreement),
        world_size=agreement.world_size,
        num_nodes=agreement.num_nodes,
        hosts=agreement.hosts,
        precision_before=None if precision is None or precision.changed_from is None else precision.changed_from.value,
        notices=(*_notices(config, plugin, precision, checkpoint), *deepspeed.notices),
        assumed=agreement.assumed,
        deepspeed=deepspeed.config,
        activation_checkpointing=config.activation_checkpointing is True,
        checkpointing_reasons=("requested",) if config.activation_checkpointing is True else (),
        save_reasons=() if config.checkpoint.every is None else describe_auto(agreement.world_size),
    )


def _decide_batch(config: RunConfig, agreement: Agreement, problems: list[str]) -> tuple[BatchSplit, tuple[str, ...]]:
    """The batch split with its reasons; an empty one if there is none."""
    try:
        return _split(config, agreement.world_size, agreement.facts[0].traits.get("batch_size"))
    except BatchSplitError as error:
        problems.append(str(error))
        return BatchSplit(agreement.world_size, None, 1), ()


def _decide_precision(
    config: RunConfig, agreement: Agreement, checkpoint: CheckpointPrecision | None, problems: list[str]
) -> AgreedPrecision | None:
    """One precision for all ranks; None if the user's plugin decides, or if there is none."""
    if agreement.facts[0].traits.get("precision_plugin") is not None:
        return None
    try:
        return reconcile(
            config.precision,
            agreement.capabilities(),
            use_amp=config.use_amp,
            fallback=config.precision_fallback,
            checkpoint=None if checkpoint is None else checkpoint.precision,
            deepspeed_config=deepspeed_settings(config),
            on_change=config.on_precision_change,
        )
    except PrecisionError as error:
        problems.append(str(error))
        return None


def _decide_strategy(
    config: RunConfig, agreement: Agreement, batch: BatchSplit, problems: list[str]
) -> StrategyChoice | None:
    """The strategy by name; `launcher.planning.memory` compares memory."""
    declared = agreement.facts[0].traits.get("static_graph", False)
    static = declared if config.static_graph == "auto" else config.static_graph
    try:
        choice = choose_strategy(
            config.strategy,
            world_size=agreement.world_size,
            device_kind=_device_kind(agreement),
            accumulate=batch.accumulate,
            model_has_static_graph=bool(static),
        )
    except StrategyError as error:
        problems.append(str(error))
        return None
    return with_user_options(choice, config.ddp or {})


def _device_kind(agreement: Agreement) -> str:
    hardware = agreement.facts[0].hardware
    return hardware.device.kind if hardware else "cpu"


def _devices(agreement: Agreement) -> dict[str, int]:
    """Number of ranks by name of their device."""
    devices: dict[str, int] = {}
    for fact, count in agreement.kinds():
        name = fact.hardware.device.name if fact.hardware else "unknown"
        devices[name] = devices.get(name, 0) + count
    return devices


def _notices(
    config: RunConfig, plugin: str | None, precision: AgreedPrecision | None, checkpoint: CheckpointPrecision | None
) -> tuple[str, ...]:
    notices = [] if checkpoint is None or checkpoint.notice is None else [checkpoint.notice]
    if precision is not None:
        notices += precision.notices
    elif config.precision != AUTO or config.use_amp is not None:
        notices.append(f"precision and use_amp are not used: the user's own {plugin} decides")
    return tuple(notices)


def _split(config: RunConfig, world_size: int, batch_size: int | None) -> tuple[BatchSplit, tuple[str, ...]]:
    """`batch_size` is that of the user's data: a limit if there is a global size, used as it is if not."""
    accumulate = config.trainer.accumulate_grad_batches
    if config.global_batch_size is None:
        split = BatchSplit(world_size, batch_size, accumulate)
        total = split.global_batch_size
        known = f"{total} samples a step" if total is not None else "the loader's batch size, times ranks"
        return split, (f"{known}: it grows with the ranks; set global_batch_size to keep it the same on any number",)
    split = split_batch(
        config.global_batch_size,
        world_size,
        largest_micro_batch=batch_size,
        # LightningCLI writes 1 by default.
        accumulate=accumulate if accumulate > 1 else None,
    )
    reason = (
        f"global_batch_size {config.global_batch_size} = {split.micro_batch_size} samples x {world_size} "
        f"rank{'s' if world_size > 1 else ''} x {split.accumulate} accumulated"
    )
    if batch_size is not None and accumulate == 1 and split.micro_batch_size != batch_size:
        reason += f" (the data's batch_size {batch_size} is the most a rank takes at once)"
    if batch_size is not None and accumulate > 1 and (split.micro_batch_size or 0) > batch_size:
        reason += f" (trainer.accumulate_grad_batches {accumulate} overrides the data's batch_size {batch_size})"
    return split, (reason,)
