"""`launcher doctor`: checks this machine. Each check reports one thing and what to do."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence

from launcher.core.command_parser import CommandParser
from launcher.doctor.finding import Finding, Status, run_checks

_STYLES: dict[Status, str] = {"ok": "green", "warning": "yellow", "failure": "bold red"}


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    from launcher.doctor.preflight_run import add_preflight_arguments

    parser = CommandParser(
        "launcher doctor",
        description="Check versions, devices, compiler, memory, disk, network, W&B and SLURM of this\nmachine.",
        epilog="exit codes:\n  0 no failure, perhaps warnings   1 a failure, which would stop a training\n  2 usage",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    add_preflight_arguments(parser)
    return parser


def run(arguments: Sequence[str]) -> int:
    """Run the command.

    Returns:
        1 if something would stop a training, 0 otherwise.

    Raises:
        SubmitError: an option of the preflight is invalid.
        QueueError: SLURM did not start the preflight.
    """
    options = build_parser().parse_args(list(arguments))
    from launcher.doctor.checks import CHECKS
    from launcher.doctor.preflight_run import preflight

    findings = (*run_checks(CHECKS), *preflight(options))
    if options.json:
        sys.stdout.write(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1) + "\n")
    else:
        _print_findings(findings)
    return 1 if any(finding.status == "failure" for finding in findings) else 0


def _print_findings(findings: Sequence[Finding]) -> None:
    from rich.table import Table
    from rich.text import Text

    from launcher.core.terminal import make_console

    table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column()
    for finding in findings:
        text = Text(finding.found)
        if finding.advice:
            text.append(f"\n{finding.advice}", style="italic")
        table.add_row(Text(finding.status, style=_STYLES[finding.status]), finding.name, text)
    console = make_console()
    console.print(table)
    count = {status: sum(f.status == status for f in findings) for status in _STYLES}
    console.print(", ".join(f"{number} {status}" for status, number in count.items()))
