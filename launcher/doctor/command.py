"""`launcher doctor`: is this machine sound? Each check looks at one thing and says what to do."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "failure"]
_STYLES: dict[Status, str] = {"ok": "green", "warning": "yellow", "failure": "bold red"}
# Importing torch and building a font list on a slow network disk is well within it.
_LIMIT_S = 150.0


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


def examine(checks: Iterable[Check], limit: float = _LIMIT_S) -> tuple[Finding, ...]:
    """Run every check; one that raises or hangs is a failure of its own, and stops no other.

    Args:
        checks: what to look at.
        limit: seconds for each.
    """
    return tuple(finding for check in checks for finding in _run_check(check, limit))


def _run_check(check: Check, limit: float) -> list[Finding]:
    name = check.__name__.removeprefix("check_").replace("_", " ")
    found: list[Finding] = []

    def look() -> None:
        try:
            found.extend(check())
        except Exception as error:  # noqa: BLE001 -- a broken library is what is being looked for
            said = f"{type(error).__name__}: {error}"
            found.append(Finding(name, "failure", said, "fix this first: the check itself failed"))

    # A name server or a network disk that does not answer holds its thread, and nothing else.
    thread = threading.Thread(target=look, name=f"doctor {name}", daemon=True)
    thread.start()
    thread.join(limit)
    if thread.is_alive():
        said = f"no answer within {limit:g} s"
        return [*found, Finding(name, "failure", said, "a disk, name server or driver hangs: look at it by hand")]
    return found


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    from launcher.doctor.preflight_run import add_preflight_arguments

    parser = argparse.ArgumentParser(
        "launcher doctor",
        description="Look at versions, devices, compiler, memory, disk, network, W&B and SLURM.",
        epilog="exit codes:\n  0 sound, perhaps with warnings   1 a failure: it would stop a training   2 usage",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="a list of findings as JSON")
    add_preflight_arguments(parser)
    return parser


def run(words: Sequence[str]) -> int:
    """Run `launcher doctor`.

    Returns:
        1 if something would stop a training, 0 otherwise.

    Raises:
        SubmitError: an option of the preflight is wrong.
        QueueError: SLURM started no preflight.
    """
    options = build_parser().parse_args(list(words))
    from launcher.doctor.checks import CHECKS
    from launcher.doctor.preflight_run import preflight

    findings = (*examine(CHECKS), *preflight(options))
    if options.json:
        sys.stdout.write(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1) + "\n")
    else:
        _print(findings)
    return 1 if any(finding.status == "failure" for finding in findings) else 0


def _print(findings: Sequence[Finding]) -> None:
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
