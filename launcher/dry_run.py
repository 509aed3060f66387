"""The plan of a run that is not started: the other ranks are assumed to be like this machine."""

from __future__ import annotations

import os

from launcher.agreement import Agreement, RankFacts
from launcher.config import RunConfig
from launcher.deepspeed_ready import check_cpu_fp16
from launcher.deepspeed_source import with_deepspeed_file
from launcher.hardware import detect_hardware
from launcher.plan import Plan, make_plan
from launcher.ranks import wanted_ranks
from launcher.run_directory import find_run
from launcher.user_classes import import_classes


def plan_here(config: RunConfig, host: str) -> Plan:
    """What `fit` would do with this config on this machine, and on `num_nodes` machines like it.

    Args:
        config: what the user asked for.
        host: name of this machine.

    Raises:
        UsageError: no plan meets the config here.
    """
    config = with_deepspeed_file(config)
    local = wanted_ranks(config)
    nodes = 1 if config.num_nodes == "auto" else config.num_nodes
    traits = import_classes(config).traits()
    hardware = detect_hardware(config.accelerator, 0)
    check_cpu_fp16(config, hardware.device.kind, os.environ)
    facts = [
        RankFacts(
            rank=rank,
            local_rank=rank % local,
            local_world_size=local,
            node_rank=rank // local,
            host=host if rank < local else f"node-{rank // local}",
            hardware=hardware,
            config_digest=config.digest(),
            traits=traits,
        )
        for rank in range(local * nodes)
    ]
    checkpoint = None
    if config.resume != "none":
        from launcher.resume import check_checkpoint

        found = find_run(config).resume_from
        checkpoint = None if found is None else check_checkpoint(found)
    return make_plan(config, Agreement(tuple(facts), assumed=len(facts) > 1), checkpoint)
