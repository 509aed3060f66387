"""The plan of a dry run: the nodes' hardware is assumed, and nothing heavy is imported."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from launcher.agreement.facts import Agreement, RankFacts, make_identical_ranks
from launcher.hardware.devices import Device, Hardware
from launcher.jobs.submission import Submission
from launcher.planning.plan import Plan, make_plan


def print_preview(submission: Submission, script: str | None, notes: Sequence[str] = ()) -> None:
    """Print what would be submitted: the batch script on stdout, and the plan on stderr.

    Args:
        submission: of one run, or of the first of a sweep.
        script: None if the back end has none.
        notes: lines before the plan.
    """
    from launcher.core.terminal import make_console
    from launcher.planning.table import print_plan

    plan = make_preview(submission)
    if script is not None:
        # Nothing else is on stdout: `launcher submit --dry-run > job.sh` writes what sbatch would get.
        sys.stdout.write(script)
        sys.stdout.flush()
    console = make_console()
    console.file = sys.stderr
    for note in notes:
        sys.stderr.write(f"{note}\n")
    print_plan(plan, console)


def make_preview(submission: Submission) -> Plan:
    """The likely plan of the nodes, which inspect their own hardware and decide.

    Args:
        submission: gives the nodes and ranks. GPUs are assumed to have native bf16, as all since 2020 have.

    Raises:
        PlanError: no plan meets the config on that many ranks.
    """
    job, config = submission.job, submission.config
    local = config.devices if isinstance(config.devices, int) else 1
    device = Device("cpu", 0, "CPU of the nodes", 0, ("fp32", "fp64"))
    if config.accelerator in ("gpu", "cuda"):
        device = Device("cuda", 0, "GPU of the nodes", 0, ("fp32", "fp64", "fp16", "bf16"))
    hardware = Hardware(device, local, {})
    traits = _data_traits(config.data)
    first = RankFacts(0, 0, local, 0, "node-0", hardware, config.digest(), traits=traits, token="")
    return make_plan(config, Agreement(make_identical_ranks(first, local * job.nodes), assumed=True))


def _data_traits(data: dict[str, Any] | None) -> dict[str, Any]:
    """The batch size that the config sets for the data, without importing its class."""
    arguments = (data or {}).get("init_args") or {}
    size = arguments.get("batch_size")
    return {"batch_size": size} if isinstance(size, int) else {}
