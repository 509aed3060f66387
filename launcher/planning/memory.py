"""The plan with memory: assesses every strategy on the given ranks, and chooses the fastest that fits."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from launcher.agreement.facts import Agreement
from launcher.checkpoint.precision import CheckpointPrecision
from launcher.config.schema import RunConfig
from launcher.core.errors import PlanError
from launcher.planning.checkpointing import CheckpointedChoice, ComparisonInputs, compare_checkpointed
from launcher.planning.deepspeed_limits import assumed_folders, candidate_obstacles, nvme_room
from launcher.planning.fallback import skip_candidates, why_not_planned, with_checkpointed_next, with_next
from launcher.planning.fsdp_limits import fsdp_obstacles
from launcher.planning.plan import CUSTOM, Plan, make_plan, shard_options
from launcher.runs.oom_record import MemoryRecord, OomRecord
from strategies.batch import BatchSplit
from strategies.choice import AUTO, Rejected, StrategyChoice
from strategies.comparison import Comparison
from strategies.deepspeed_config import BatchAndClip, ZeroVariant, as_block, zero_config
from strategies.gpus import TYPICAL, recognize_gpu
from strategies.machine import MachineModel
from strategies.model_states import ZeroSettings
from strategies.options import ComparisonOptions
from strategies.precision import Precision
from strategies.repeated import RepeatedRecords
from strategies.sharding import describe_strategy
from strategies.step_trace import ModelProfile, Unprofiled
from strategies.units import format_bytes
from strategies.zero import ZERO_3_NVME

# The numbers of a CPU only scale the table; the choice on a CPU does not depend on them.
_CPU_FLOPS, _CPU_MEMORY_BANDWIDTH, _CPU_LINK = 50e9, 20e9, 2e9
_BY_AUTO = "fits; `strategy: auto` would choose it"
# One 200 Gb/s port for each GPU, as NVIDIA's DGX A100 has.
NODE_BANDWIDTH = 25e9


def plan_with_memory(
    config: RunConfig,
    agreement: Agreement,
    profile: ModelProfile | Unprofiled,
    checkpoint: CheckpointPrecision | None = None,
    *,
    host_memory_bytes: int | None = None,
    record: MemoryRecord | None = None,
) -> Plan:
    """`make_plan`, and with `strategy: auto` the fastest strategy that fits the memory.

    Args:
        config: the user's.
        agreement: facts of the ranks.
        profile: of the user's module; without one the plan has no memory, and a notice.
        checkpoint: precision of the checkpoint to resume from; None without one.
        host_memory_bytes: memory of a node's host, for offload; None if not known.
        record: strategies to skip, as they ran out of memory in the resumed run; None skips none.

    Raises:
        PlanError: these ranks cannot run the config, or no strategy fits: by how much, and what would fit.
    """
    plan = make_plan(config, agreement, checkpoint)
    if isinstance(profile, Unprofiled):
        unseen = "; the strategy was chosen without it" if config.strategy == AUTO else ""
        notice = f"memory is not known, as the module could not be made without memory ({profile.why}){unseen}"
        return dataclasses.replace(plan, notices=(*plan.notices, notice))
    inputs = _inputs(config, agreement, plan, profile, host_memory_bytes)
    why_not = functools.partial(why_not_planned, config, agreement, checkpoint)
    requested = None if config.strategy == AUTO else plan.strategy.name
    may_checkpoint = config.activation_checkpointing == AUTO
    choice = compare_checkpointed(inputs, requested, may_checkpoint=may_checkpoint)
    machine = inputs.machine

    def decide(choice: CheckpointedChoice, name: str | None) -> tuple[CheckpointedChoice, Plan]:
        """The choice with what follows it, and its plan; `name` is the requested strategy."""
        found = choice.found
        shown = name or found.pick or plan.strategy.name
        found = with_next(found, shown, machine, why_not)
        if config.on_oom == "next" and found.next is None and may_checkpoint:
            found = with_checkpointed_next(found, shown, choice.inputs.checkpointed(), why_not)
        choice = dataclasses.replace(choice, found=_with_assumptions(found, agreement, config))
        if name is None:
            chosen = _use_pick(config, agreement, checkpoint, plan, choice.found)
        else:
            chosen = _keep_requested(plan, choice.found)
        if not choice.reasons:
            return choice, chosen
        return choice, dataclasses.replace(chosen, activation_checkpointing=True, checkpointing_reasons=choice.reasons)

    choice, chosen = decide(choice, requested)
    # Names without and with activation checkpointing.
    ran_out: dict[bool, tuple[str, ...]] = {False: (), True: ()}
    while record and (failed := record.ran_out(OomRecord.of(config.to_dict(), chosen.to_dict()))):
        if chosen.strategy.name not in failed:
            break
        is_on = chosen.activation_checkpointing
        ran_out[is_on] = tuple(dict.fromkeys((*ran_out[is_on], *failed)))
        choice, chosen = decide(skip_candidates(choice, ran_out[is_on], why_not, may_checkpoint=may_checkpoint), None)
    chosen = dataclasses.replace(chosen, flops_per_sample=profile.flops_per_sample)
    skipped = tuple(describe_strategy(name, is_on) for is_on, names in ran_out.items() for name in names)
    if not skipped:
        return chosen
    instead = describe_strategy(chosen.strategy.name, chosen.activation_checkpointing)
    notice = f"{' and '.join(skipped)} ran out of memory in this run: it continues with {instead}"
    return dataclasses.replace(chosen, ran_out=skipped, notices=(*chosen.notices, notice))


def _inputs(
    config: RunConfig, agreement: Agreement, plan: Plan, profile: ModelProfile, host_memory_bytes: int | None
) -> ComparisonInputs:
    """The inputs of the comparison of all candidates."""
    user = as_block(config.deepspeed_config)
    machine = machine_of(agreement, planned_precision(plan), host_memory_bytes)
    return ComparisonInputs(
        profile,
        dataclasses.replace(machine, nvme_bytes=nvme_room(ZERO_3_NVME.name, agreement, user)),
        planned_precision(plan),
        list_splits(config, plan),
        ComparisonOptions(
            config.memory_share,
            zero_settings(plan.device_kind, plan.deepspeed),
            candidate_obstacles(agreement, None if plan.precision == CUSTOM else planned_precision(plan), user)
            | fsdp_obstacles(config, agreement),
            shard_options(config, checkpoint_activations=plan.activation_checkpointing),
            offers_checkpointing=config.activation_checkpointing is False,
        ),
    )


def _with_assumptions(found: Comparison, agreement: Agreement, config: RunConfig) -> Comparison:
    """The comparison with a note about folders that no rank has checked."""
    nvme = found.of(ZERO_3_NVME.name)
    folders = assumed_folders(ZERO_3_NVME.name, agreement, as_block(config.deepspeed_config))
    if nvme is None or not nvme.eligible or not folders:
        return found
    needed = format_bytes(nvme.memory.nvme)
    note = f"not checked on the nodes: {nvme.name} assumes {needed} for each rank on {' and '.join(folders)}"
    return found if note in found.notes else dataclasses.replace(found, notes=(*found.notes, note))


def _use_pick(
    config: RunConfig, agreement: Agreement, checkpoint: CheckpointPrecision | None, plan: Plan, found: Comparison
) -> Plan:
    """The plan with the comparison's pick."""
    taken = None if found.pick is None else found.of(found.pick)
    if found.pick is None or taken is None:
        if found.method == "bound":
            # A bound is too high on purpose: it is no reason to refuse.
            return dataclasses.replace(
                plan, memory=found.to_dict(), notices=(*plan.notices, f"memory may not suffice: {found.why}")
            )
        raise PlanError(
            f"{found.why}\n(memory_share: {config.memory_share:g} of {format_bytes(found.memory_bytes)} may be used; "
            f"memory {found.method}; use `strategy: NAME` to train with one anyway)"
        )
    if taken.micro_batch_size != plan.batch.micro_batch_size and plan.batch.micro_batch_size is not None:
        agreement = _with_batch_size(agreement, taken.micro_batch_size)
    if found.pick != plan.strategy.name:
        config = dataclasses.replace(config, strategy=found.pick)
    new = make_plan(config, agreement, checkpoint)
    reasons = new.batch_reasons
    if new.batch != plan.batch:
        reasons = (*reasons, f"{taken.micro_batch_size} samples at once are the most that fit with {found.pick}")
    return dataclasses.replace(
        new, strategy=_with_comparison(new.strategy, found), batch_reasons=reasons, memory=found.to_dict()
    )


def _with_comparison(choice: StrategyChoice, found: Comparison) -> StrategyChoice:
    """The choice with the comparison's reasons, and every other candidate with its own."""
    requested = f"{choice.name}: requested"
    reasons = [r for r in choice.reasons if r != requested]
    rejected = tuple(Rejected(a.name, a.reason) for a in found.assessments if a.name != choice.name)
    return dataclasses.replace(choice, reasons=(*reasons, f"{choice.name} {found.why}"), rejected=rejected)


def _keep_requested(plan: Plan, found: Comparison) -> Plan:
    """The plan with the requested strategy; with a notice if it does not fit."""
    name = plan.strategy.name
    own = found.of(name)
    notices = plan.notices
    if own is not None and not own.fits:
        instead = f"; {found.pick} fits" if found.pick else f"; {found.why}"
        notices = (*notices, f"strategy {name} was requested, and it {own.reason}{instead}")
    elif name != found.pick:
        reasons = {name: "requested"} if found.pick is None else {name: "requested", found.pick: _BY_AUTO}
        found = found.with_reasons(reasons)
    return dataclasses.replace(plan, memory=found.to_dict(), notices=notices)


def list_splits(config: RunConfig, plan: Plan) -> list[BatchSplit]:
    """Ways to split the global batch, the largest micro batch first; only one if the user set it."""
    batch = plan.batch
    if config.global_batch_size is None or config.trainer.accumulate_grad_batches > 1 or not batch.micro_batch_size:
        return [batch]
    share = config.global_batch_size // batch.world_size
    sizes = [n for n in range(batch.micro_batch_size, 0, -1) if share % n == 0]
    return [BatchSplit(batch.world_size, n, share // n) for n in sizes]


def machine_of(agreement: Agreement, precision: Precision, host_memory_bytes: int | None = None) -> MachineModel:
    """The ranks in the cost model, which assumes that all are like the weakest."""
    ranks_per_node = max(f.local_world_size for f, _ in agreement.kinds())
    devices = {f.hardware.device for f, _ in agreement.kinds() if f.hardware}
    kind = next(iter(devices)).kind
    memory = min(d.memory_bytes for d in devices)
    host = None if host_memory_bytes is None else host_memory_bytes // ranks_per_node
    if kind != "cuda":
        # The ranks of a node share its memory.
        return cpu_machine(agreement.world_size, ranks_per_node, memory // ranks_per_node, host, kind=kind)
    gpus = [recognize_gpu(d.name) for d in devices]
    slowest = min((g or TYPICAL for g in gpus), key=lambda g: g.half_flops)
    flops = slowest.fp32_flops if precision in (Precision.FP32_TRUE, Precision.FP64_TRUE) else slowest.half_flops
    return MachineModel(
        kind,
        agreement.world_size,
        ranks_per_node,
        memory,
        flops,
        slowest.memory_bandwidth,
        slowest.link_bandwidth,
        NODE_BANDWIDTH,
        slowest.host_bandwidth,
        host,
        known=None not in gpus,
        source=slowest.source if None not in gpus else None,
    )


def cpu_machine(
    world_size: int, ranks_per_node: int, memory_bytes: int, host_memory_bytes: int | None = None, *, kind: str = "cpu"
) -> MachineModel:
    """Ranks without a known GPU; bytes are those of one rank, and `kind` is 'cpu' or 'mps'."""
    return MachineModel(
        kind,
        world_size,
        ranks_per_node,
        memory_bytes,
        _CPU_FLOPS,
        _CPU_MEMORY_BANDWIDTH,
        _CPU_LINK,
        _CPU_LINK,
        _CPU_MEMORY_BANDWIDTH,
        host_memory_bytes,
        known=False,
    )


def planned_precision(plan: Plan) -> Precision:
    """The plan's precision; a precision plugin of the user's is assumed to compute in fp32."""
    return Precision.FP32_TRUE if plan.precision == CUSTOM else Precision(plan.precision)


def zero_settings(device_kind: str, deepspeed: Mapping[str, Any] | None = None) -> ZeroSettings:
    """Sizes of DeepSpeed's buckets, from the plan's DeepSpeed config or the defaults."""
    zero: Mapping[str, Any] = zero_config(ZeroVariant(3), device_kind, BatchAndClip(1, 1, 1, 0.0))["zero_optimization"]
    if deepspeed is not None:
        zero = {**zero, **deepspeed["zero_optimization"]}
    return ZeroSettings(
        reduce_bucket_size=int(zero["reduce_bucket_size"]),
        overlap_comm=bool(zero["overlap_comm"]),
        max_live_parameters=int(zero.get("stage3_max_live_parameters", ZeroSettings().max_live_parameters)),
        persistence_threshold=int(zero["stage3_param_persistence_threshold"]),
        prefetch_bucket_size=int(zero["stage3_prefetch_bucket_size"]),
    )


def _with_batch_size(agreement: Agreement, batch_size: int) -> Agreement:
    facts = agreement.facts
    first = dataclasses.replace(facts[0], traits={**facts[0].traits, "batch_size": batch_size})
    changed = dataclasses.replace(facts, first=first) if isinstance(facts, RepeatedRecords) else (first, *facts[1:])
    return dataclasses.replace(agreement, facts=changed)
