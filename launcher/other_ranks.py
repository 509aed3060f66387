"""The other ranks of a training that a script or a notebook starts itself; the calling process is rank zero."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from launcher.errors import TopologyError, TrainingError

# Ports of the trainings of a script that is run once for each rank.
_PORTS = "LAUNCHER_SCRIPT_PORTS"
_TRAININGS = 32
# Seconds that a rank has to end by itself, in its own words, after another one failed, and after SIGTERM.
_GRACE = 10.0
# The same after the script of rank zero has ended.
_GRACE_AT_EXIT = 60.0
_started: list[subprocess.Popen[bytes]] = []


def in_notebook() -> bool:
    """Whether this process is a notebook's kernel or a prompt: there is no script that other ranks could run."""
    import __main__

    # Of code that is piped in, Python 3.11 says that it is in the file '<stdin>'.
    return getattr(__main__, "__file__", "<").startswith("<") or "ipykernel" in sys.modules


def rank_variables(rank: int, world_size: int, port: int) -> dict[str, str]:
    """The variables that torchrun would set for one of the ranks on this machine.

    Args:
        rank: which.
        world_size: how many.
        port: of the store, which rank zero serves.
    """
    values = {
        "RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_RANK": rank,
        "LOCAL_WORLD_SIZE": world_size,
        "GROUP_RANK": 0,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    return {name: str(value) for name, value in values.items()}


def script_rank(world_size: int) -> dict[str, str]:
    """This process's variables for the next training of a script that is run once for each rank.

    The first call runs the script again for the further ranks, and marks this process as rank zero in its environment,
    as they all go through the same trainings. Each training gets a port of its own: the store of the one before may
    not be gone yet.

    Args:
        world_size: ranks in all.

    Raises:
        TopologyError: more trainings than ports were put aside.
    """
    if _PORTS not in os.environ:
        ports = ",".join(str(free_port()) for _ in range(_TRAININGS))
        for rank in range(1, world_size):
            own = {**rank_variables(rank, world_size, int(ports.split(",")[0])), _PORTS: ports}
            process = subprocess.Popen(_this_command(), env={**os.environ, **own})
            _started.append(process)
            threading.Thread(target=_end_with, args=(rank, process), name=f"rank-{rank}", daemon=True).start()
        atexit.register(end_script_ranks, _GRACE_AT_EXIT)
        os.environ.update({**rank_variables(0, world_size, int(ports.split(",")[0])), _PORTS: ports})
    port = next(_ports(os.environ[_PORTS]), None)
    if port is None:
        raise TopologyError(f"a script trains at most {_TRAININGS} times on several ranks; start it with torchrun")
    return {**os.environ, "MASTER_PORT": port}


def is_script_rank() -> bool:
    """Whether this process is one of those that `script_rank` made."""
    return _PORTS in os.environ


def end_script_ranks(grace: float = _GRACE) -> None:
    """Wait for the other ranks, and end those that do not end: they may wait for this one in a collective.

    Args:
        grace: seconds that they have to end by themselves.
    """
    give_up = time.monotonic() + grace
    ranks, _started[:] = list(_started), []
    for process in ranks:
        for end, seconds in ((process.terminate, max(give_up - time.monotonic(), 0)), (process.kill, _GRACE)):
            try:
                process.wait(seconds)
                break
            except subprocess.TimeoutExpired:
                end()
        process.wait()


def _end_with(rank: int, process: subprocess.Popen[bytes]) -> None:
    """End this process if another rank failed and nobody has noticed: it may be waiting for that rank in vain."""
    code = process.wait()
    # A training that failed is told in the words of this rank too; its ranks are taken from the list then.
    time.sleep(_GRACE)
    if code and process in _started:
        sys.stderr.write(f"error: rank {rank} of this script ended with exit code {code}, and so does rank 0\n")
        sys.stderr.flush()
        os.kill(os.getpid(), signal.SIGTERM)


@functools.cache
def _ports(listed: str) -> Iterator[str]:
    return iter(listed.split(","))


@contextmanager
def forked_ranks(world_size: int, train: Callable[[Mapping[str, str]], object]) -> Iterator[Mapping[str, str]]:
    """Fork this process for each further rank; the variables of rank zero.

    Args:
        world_size: ranks in all.
        train: what a further rank does, with its variables.

    Raises:
        TrainingError: a further rank failed, and this one did not.
    """
    port = free_port()
    ranks = [_fork(lambda r=rank: train(rank_variables(r, world_size, port))) for rank in range(1, world_size)]
    try:
        yield rank_variables(0, world_size, port)
    except BaseException:  # Ctrl-C too: the forks would wait in a collective; raised on
        for process in ranks:
            _end_fork(process)
        raise
    codes = {rank: os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for rank, process in enumerate(ranks, 1)}
    failed = [f"rank {rank} ended with exit code {code}" for rank, code in codes.items() if code]
    if failed:
        raise TrainingError(f"{', '.join(failed)}; the run's logs/rank-<r>.log say why")


def _end_fork(process: int) -> None:
    """As `end_script_ranks`, for a process that `os.fork` made."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        give_up = time.monotonic() + _GRACE
        while time.monotonic() < give_up:
            if os.waitpid(process, os.WNOHANG)[0]:
                return
            time.sleep(0.05)
        os.kill(process, number)
    os.waitpid(process, 0)


def _fork(work: Callable[[], object]) -> int:
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        _one_thread()
        work()
        code = 0
    except BaseException:  # noqa: BLE001 -- the fork must never go on with its parent's work
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _one_thread() -> None:
    """GNU OpenMP's threads are not forked, and a fork that wants several waits for them for ever."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)


def _this_command() -> list[str]:
    """The words that started this process."""
    import __main__

    spec = getattr(__main__, "__spec__", None)
    if spec is not None:
        name = spec.name.removesuffix(".__main__") if spec.name != "__main__" else spec.name
        return [sys.executable, "-m", name, *sys.argv[1:]]
    # Python makes it absolute, so it holds after the script has gone to another folder.
    return [sys.executable, str(Path(__main__.__file__ or sys.argv[0]).absolute()), *sys.argv[1:]]


def free_port() -> int:
    """A port that the system has just given and taken back."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
