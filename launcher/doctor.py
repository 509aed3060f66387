"""`launcher doctor`: is this machine sound? Each check looks at one thing and says what to do."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "failure"]
_STYLES: dict[Status, str] = {"ok": "green", "warning": "yellow", "failure": "bold red"}


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found.

    Attributes:
        name: what was looked at.
        status: 'ok', 'warning' or 'failure'; a failure would stop a training here or on the cluster.
        found: what is so.
        advice: what to do; empty if all is well.
    """

    name: str
    status: Status
    found: str
    advice: str = ""


Check = Callable[[], Iterable[Finding]]


def examine(checks: Iterable[Check]) -> tuple[Finding, ...]:
    """Run every check; one that raises is a failure of its own, and stops no other."""
    findings: list[Finding] = []
    for check in checks:
        try:
            findings += check()
        except Exception as error:  # noqa: BLE001 -- a broken library is what is being looked for
            name = check.__name__.removeprefix("check_").replace("_", " ")
            found = f"{type(error).__name__}: {error}"
            findings.append(Finding(name, "failure", found, "mend this first: the check itself could not be done"))
    return tuple(findings)


def run(words: Sequence[str]) -> int:
    """Run `launcher doctor`.

    Returns:
        1 if something would stop a training, 0 otherwise.
    """
    parser = argparse.ArgumentParser(
        "launcher doctor", description="Look at versions, devices, compiler, memory, disk, network, W&B and SLURM."
    )
    parser.add_argument("--json", action="store_true", help="a list of findings as JSON")
    options = parser.parse_args(list(words))
    from launcher.doctor_checks import CHECKS

    findings = examine(CHECKS)
    if options.json:
        sys.stdout.write(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1) + "\n")
    else:
        _print(findings)
    return 1 if any(finding.status == "failure" for finding in findings) else 0


def _print(findings: Sequence[Finding]) -> None:
    from rich.table import Table
    from rich.text import Text

    from launcher.terminal import make_console

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
