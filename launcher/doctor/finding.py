"""What a check reports, and how checks are run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "failure"]
# Enough to import torch and to build a font list on a slow network disk.
_TIMEOUT_S = 150.0


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check; a failure would stop a training here or on the cluster. No advice if it is 'ok'."""

    name: str
    status: Status
    found: str
    advice: str = ""


def judge(name: str, is_ok: bool, found: str, advice: str, status: Status = "warning") -> Finding:
    """A finding that is 'ok', or has another status and advice."""
    return Finding(name, "ok", found) if is_ok else Finding(name, status, found, advice)


Check = Callable[[], Iterable[Finding]]


def run_checks(checks: Iterable[Check], timeout: float = _TIMEOUT_S) -> tuple[Finding, ...]:
    """Run each check for at most `timeout` seconds. One that raises or hangs is a failure, and the others still run."""
    return tuple(finding for check in checks for finding in _run_check(check, timeout))


def _run_check(check: Check, timeout: float) -> list[Finding]:
    name = check.__name__.removeprefix("check_").replace("_", " ")
    found: list[Finding] = []

    def collect() -> None:
        try:
            found.extend(check())
        except Exception as error:  # noqa: BLE001 -- checks look for broken libraries, which raise anything
            text = f"{type(error).__name__}: {error}"
            found.append(Finding(name, "failure", text, "fix this first: the check itself failed"))

    # In a thread: a name server or a network disk that does not answer must not block the other checks.
    thread = threading.Thread(target=collect, name=f"doctor {name}", daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        advice = "a disk, name server or driver hangs: check it by hand"
        return [*found, Finding(name, "failure", f"no answer within {timeout:g} s", advice)]
    return found
