"""Real processes for tests: in a new session, with a timeout, and killed after the test."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import warm

_started: list[subprocess.Popen[bytes] | warm.WarmProcess] = []


@dataclass(frozen=True)
class Finished:
    """How a process ended."""

    code: int
    output: str

    def check(self, code: int = 0) -> Finished:
        """Fail with the complete output unless the exit code is as expected."""
        assert self.code == code, f"exit code {self.code}, expected {code}\n{self.output}"
        return self


def found_in(output: str) -> list[Any]:
    """The values that a script has printed as JSON after FOUND."""
    return [json.loads(line.split(" ", 1)[1]) for line in output.splitlines() if line.startswith("FOUND")]


def run(
    command: Sequence[str],
    cwd: Path,
    *,
    env: Mapping[str, str] | None = None,
    timeout: float = 120,
    on_line: Callable[[str, int], None] | None = None,
) -> Finished:
    """Run to the end and return its output, stdout and stderr together.

    Args:
        command: the command line.
        cwd: working directory.
        env: set on top of this process's environment.
        timeout: seconds; then the session is killed and the test fails with the output so far.
        on_line: receives each line and the id of the process group, to send signals at the right moment.
    """

    def start(environment: Mapping[str, str], output: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, cwd=cwd, env=environment, stdout=output, stderr=output,
                                stdin=subprocess.DEVNULL, start_new_session=True)  # fmt: skip

    return _run_to_end(start, env, timeout, on_line)


def run_warm(
    command: Sequence[str],
    cwd: Path,
    *,
    env: Mapping[str, str] | None = None,
    timeout: float = 120,
    on_line: Callable[[str, int], None] | None = None,
    preloaded: Sequence[str] = (),
) -> Finished:
    """As `run`, in a process that has imported torch, Lightning and the launcher, which saves seconds.

    Use `run` for tests of the start, of imports, and of processes that are found by their command line.

    Args:
        command: this Python, with a module, a text or a file to run.
        cwd: working directory.
        env: set on top of this process's environment.
        timeout: as for `run`.
        on_line: as for `run`.
        preloaded: additional imported modules, such as `warm.DEEPSPEED`.
    """
    python, *arguments = command
    assert python == sys.executable, f"{python} is another program, which cannot be forked"

    def start(environment: Mapping[str, str], output: int) -> warm.WarmProcess:
        return warm.start(arguments, cwd, environment, output, *preloaded)

    return _run_to_end(start, env, timeout, on_line)


def run_here(
    command: Sequence[str], cwd: Path, *, env: Mapping[str, str] | None = None, timeout: float = 0
) -> Finished:
    """As `run`, in this process: for commands of `launcher` that start no ranks, and whose texts and files matter.

    Args:
        command: the command line, of `launcher`.
        cwd: working directory.
        env: set on top of this process's environment.
        timeout: of no use, since pytest's holds.
    """
    from launcher.cli.main import run as run_command

    del timeout
    start = launcher()
    assert list(command[: len(start)]) == start, f"{command[:3]} is another program"
    before, path, output = dict(os.environ), list(sys.path), io.StringIO()
    os.environ.update(env or {})
    try:
        with contextlib.chdir(cwd), contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            try:
                code = run_command(command[len(start) :])
            except SystemExit as ending:
                code = ending.code if isinstance(ending.code, int) else 1
    finally:
        os.environ.clear()
        os.environ.update(before)
        sys.path[:] = path
    return Finished(code, output.getvalue())


def _run_to_end(
    start: Callable[[Mapping[str, str], int], subprocess.Popen[bytes] | warm.WarmProcess],
    env: Mapping[str, str] | None,
    timeout: float,
    on_line: Callable[[str, int], None] | None,
) -> Finished:
    read_end, write_end = os.pipe()
    with open(read_end, encoding="utf-8", errors="replace") as stream:  # noqa: PTH123 -- a descriptor has no path
        try:
            process = start({**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})}, write_end)
        finally:
            os.close(write_end)
        _started.append(process)
        timed_out = threading.Event()

        def give_up() -> None:
            timed_out.set()
            _end_session(process.pid)

        timer = threading.Timer(timeout, give_up)
        timer.start()
        lines: list[str] = []
        try:
            for line in stream:
                lines.append(line)
                if on_line is not None:
                    on_line(line, process.pid)
            code = process.wait()
        except BaseException:
            # pytest's own time limit: an open socket would fail the next test too.
            process.kill()
            raise
        finally:
            # Otherwise an interrupted pytest would wait for the timer.
            timer.cancel()
    output = "".join(lines)
    assert not timed_out.is_set(), f"did not end within {timeout} s\n{output}"
    return Finished(code, output)


def _end_session(leader: int) -> None:
    """Kill a session; processes of the warm server print their stacks first."""
    for pid, _ in session_processes(leader):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, warm.SHOW_STACKS)
            time.sleep(0.5)  # they share one output
    for pid, _ in session_processes(leader):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def launcher(*arguments: str) -> list[str]:
    """The command line of `python -m launcher`."""
    return [sys.executable, "-m", "launcher", *arguments]


def torchrun(ranks: int, *arguments: str, options: Sequence[str] = ()) -> list[str]:
    """The command line of `torchrun -m launcher`, on a free port."""
    own = ["--nproc-per-node", str(ranks), "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", *options]
    return [sys.executable, "-m", "torch.distributed.run", *own, "-m", "launcher", *arguments]


def session_processes(leader: int) -> list[tuple[int, str]]:
    """The running processes of a session: id and command line."""
    found: list[tuple[int, str]] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if os.getsid(int(entry.name)) == leader:
                    found.append((int(entry.name), (entry / "cmdline").read_text().replace("\0", " ")))
            except OSError:
                continue  # it has just ended
    return sorted(found)


def descendants(ancestor: int) -> list[int]:
    """The child processes of a process, and their children."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):  # it has just ended
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found = [ancestor]
    for pid in found:
        found += children.get(pid, [])
    return found[1:]


def kill_leftovers(grace: float = 5.0) -> list[str]:
    """Kill the remaining processes of the sessions that `run` started; returns their command lines.

    Args:
        grace: seconds that remaining processes have to end.
    """
    if not _started:
        return []
    sessions = {process.pid for process in _started}
    _started.clear()
    give_up = time.monotonic() + grace
    while (left := _running(sessions)) and time.monotonic() < give_up:
        time.sleep(0.05)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return [f"{pid} {command}" for pid, command in left.items()]


def _running(sessions: set[int]) -> dict[int, str]:
    """Process ids and command lines of the processes of some sessions."""
    found: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            if os.getsid(int(entry.name)) in sessions:
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                command = (entry / "cmdline").read_text().replace("\0", " ")
                # A process that is ending has no command line.
                if state not in "ZX" and command.strip():
                    found[int(entry.name)] = command
        except (OSError, ProcessLookupError):
            continue
    return found
