"""The preview of a dry run. The nodes' hardware is assumed, and no training library is imported."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from launcher.agreement.facts import Agreement, RankFacts, make_identical_ranks
from launcher.hardware.devices import Device, Hardware
from launcher.jobs.submission import Submission
from launcher.planning.plan import Plan, make_plan


def print_preview(submission: Submission, script: str | None, notes: Sequence[str] = ()) -> None:
    """Print the batch script, if there is one, on stdout; `notes` and the plan on stderr."""
    from launcher.core.terminal import make_console
    from launcher.planning.table import print_plan

    plan = make_preview(submission)
    if script is not None:
        # stdout gets nothing else, so `launcher submit --dry-run > job.sh` writes the exact script.
        sys.stdout.write(script)
        sys.stdout.flush()
    console = make_console()
    console.file = sys.stderr
    for note in notes:
        sys.stderr.write(f"{note}\n")
    print_plan(plan, console)


def make_preview(submission: Submission) -> Plan:
    """The likely plan; the job plans again on its nodes. GPUs are assumed to have native bf16, as all since 2020 have.

    Raises:
        PlanError: no plan fulfils the config on that many ranks.
    """
    job, config = submission.job, submission.config
    local = config.devices if isinstance(config.devices, int) else 1
    device = Device("cpu", 0, "CPU of the nodes", 0, ("fp32", "fp64"))
    if config.accelerator in ("gpu", "cuda"):
        device = Device("cuda", 0, "GPU of the nodes", 0, ("fp32", "fp64", "fp16", "bf16"))
    hardware = Hardware(device, local, {})
    # The batch size in the config; the class of the data is not imported.
    batch_size = ((config.data or {}).get("init_args") or {}).get("batch_size")
    traits = {"batch_size": batch_size} if isinstance(batch_size, int) else {}
    first = RankFacts(0, 0, local, 0, "node-0", hardware, config.digest(), traits=traits, token="")
    return make_plan(config, Agreement(make_identical_ranks(first, local * job.nodes), assumed=True))
