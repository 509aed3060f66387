"""The plan of a job whose nodes nobody has looked at: they are assumed, and nothing heavy is imported."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from launcher.agreement.facts import Agreement, RankFacts, identical_ranks
from launcher.hardware.devices import Device, Hardware
from launcher.jobs.submission import Submission
from launcher.planning.plan import Plan, make_plan


def show(submission: Submission, script: str | None, notes: Sequence[str] = ()) -> None:
    """Print what would be queued: the batch script on stdout, and the plan on stderr.

    Args:
        submission: of one run, or of the first of a sweep.
        script: None where nothing goes to SLURM.
        notes: lines before the plan.
    """
    from launcher.core.terminal import make_console
    from launcher.planning.table import print_plan

    plan = preview(submission)
    if script is not None:
        sys.stdout.write(script)
        sys.stdout.flush()
    console = make_console()
    console.file = sys.stderr
    for note in notes:
        sys.stderr.write(f"{note}\n")
    print_plan(plan, console)


def preview(submission: Submission) -> Plan:
    """What the nodes will most likely choose; they look at themselves again, and decide.

    Args:
        submission: says the nodes and ranks. GPUs are assumed to have native bf16, as all since 2020 have.

    Raises:
        PlanError: no plan meets the config on so many ranks.
    """
    job, config = submission.job, submission.config
    local = config.devices if isinstance(config.devices, int) else 1
    device = Device("cpu", 0, "CPU of the nodes", 0, ("fp32", "fp64"))
    if config.accelerator in ("gpu", "cuda"):
        device = Device("cuda", 0, "GPU of the nodes", 0, ("fp32", "fp64", "fp16", "bf16"))
    hardware = Hardware(device, local, {})
    traits = _declared(config.data)
    first = RankFacts(0, 0, local, 0, "node-0", hardware, config.digest(), traits=traits, token="")
    return make_plan(config, Agreement(identical_ranks(first, local * job.nodes), assumed=True))


def _declared(data: dict[str, Any] | None) -> dict[str, Any]:
    """What the config says of the data's batches, without importing its class."""
    arguments = (data or {}).get("init_args") or {}
    size = arguments.get("batch_size")
    return {"batch_size": size} if isinstance(size, int) else {}
