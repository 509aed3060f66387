"""The plan of a run that is not started: other ranks are assumed to be like this machine, or as described."""

from __future__ import annotations

import dataclasses
import os

from launcher.agreement.facts import Agreement, RankFacts, make_identical_ranks
from launcher.config.deepspeed_file import with_deepspeed_file
from launcher.config.schema import RunConfig
from launcher.hardware.devices import detect_hardware, host_memory
from launcher.hardware.rank_count import count_requested_ranks
from launcher.hardware.target_machines import TargetMachines
from launcher.planning.deepspeed_facts import deepspeed_facts
from launcher.planning.fit_plan import check_blocks, profile_for
from launcher.planning.memory import plan_with_memory
from launcher.planning.plan import Plan, make_plan
from launcher.process.activity import doing
from launcher.runs.selection import find_run
from launcher.user_code.classes import UserClasses, import_classes
from strategies.step_trace import ModelProfile, Unprofiled


@dataclasses.dataclass(frozen=True)
class DryRun:
    """A plan with the ranks and the module's profile; None if the module could not be created."""

    plan: Plan
    agreement: Agreement
    profile: ModelProfile | None


def plan_here(config: RunConfig, host: str, others: TargetMachines | None = None) -> DryRun:
    """The plan of `fit` for this config, on `num_nodes` machines like this one or on other machines.

    Raises:
        UsageError: no plan meets the config there.
    """
    config = with_deepspeed_file(config)
    with doing("importing the model and the data"):
        classes = import_classes(config)
    agreement = _assume_ranks(config, classes, host, others)
    checkpoint = None
    if config.resume != "none":
        from launcher.checkpoint.reader import Trust
        from launcher.checkpoint.resume import check_checkpoint

        place = find_run(config)
        trust = Trust(place.path, everywhere=config.resume_trust)
        checkpoint = None if place.resume_from is None else check_checkpoint(place.resume_from, trust)
    plain = make_plan(config, agreement, checkpoint)
    check_blocks(config, plain, classes=classes)
    profile = profile_for(config, classes, plain)
    known = None if others else host_memory()
    plan = plan_with_memory(config, agreement, profile, checkpoint, host_memory_bytes=known)
    return DryRun(plan, agreement, None if isinstance(profile, Unprofiled) else profile)


def _assume_ranks(config: RunConfig, classes: UserClasses, host: str, others: TargetMachines | None) -> Agreement:
    """The ranks of other machines, or of machines like this one."""
    if others:
        local, ranks, host, hardware = others.gpus_per_node, others.gpus, "node-0", others.hardware
        known = {}
    else:
        local = count_requested_ranks(config)
        ranks = local * (1 if config.num_nodes == "auto" else config.num_nodes)
        hardware = detect_hardware(config.accelerator, 0)
        known = deepspeed_facts(config, hardware.device.kind, os.environ)
    first = RankFacts(
        rank=0,
        local_rank=0,
        local_world_size=local,
        node_rank=0,
        host=host,
        hardware=hardware,
        config_digest=config.digest(),
        traits=classes.traits(),
        **known,
    )
    return Agreement(make_identical_ranks(first, ranks), assumed=others is not None or ranks > 1)
