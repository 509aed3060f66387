"""The other ranks of a training that a script or a notebook starts itself; the calling process is rank zero."""

from __future__ import annotations

import functools
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from launcher.errors import TopologyError

# Ports of the trainings of a script that is run once for each rank.
_PORTS = "LAUNCHER_SCRIPT_PORTS"
_TRAININGS = 32
_started: list[subprocess.Popen[bytes]] = []


def in_notebook() -> bool:
    """Whether this process is a notebook's kernel or a prompt: there is no script that other ranks could run."""
    import __main__

    return not hasattr(__main__, "__file__") or "ipykernel" in sys.modules


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
            _started.append(subprocess.Popen(_this_command(), env={**os.environ, **own}))
        os.environ.update({**rank_variables(0, world_size, int(ports.split(",")[0])), _PORTS: ports})
    port = next(_ports(os.environ[_PORTS]), None)
    if port is None:
        raise TopologyError(f"a script trains at most {_TRAININGS} times on several ranks; start it with torchrun")
    return {**os.environ, "MASTER_PORT": port}


def is_script_rank() -> bool:
    """Whether this process is one of those that `script_rank` made."""
    return _PORTS in os.environ


def end_script_ranks() -> None:
    """The training of rank zero failed: the others would wait for it in a collective."""
    for process in _started:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)


@functools.cache
def _ports(listed: str) -> Iterator[str]:
    return iter(listed.split(","))


@contextmanager
def forked_ranks(world_size: int, train: Callable[[Mapping[str, str]], object]) -> Iterator[Mapping[str, str]]:
    """Fork this process for each further rank; the variables of rank zero.

    Args:
        world_size: ranks in all.
        train: what a further rank does, with its variables.
    """
    port = free_port()
    ranks = [_fork(lambda r=rank: train(rank_variables(r, world_size, port))) for rank in range(1, world_size)]
    try:
        yield rank_variables(0, world_size, port)
    except BaseException:
        for process in ranks:
            os.kill(process, signal.SIGTERM)
        raise
    finally:
        for process in ranks:
            os.waitpid(process, 0)


def _fork(work: Callable[[], object]) -> int:
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        work()
        code = 0
    except BaseException:  # noqa: BLE001 -- the fork must never go on with its parent's work
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _this_command() -> list[str]:
    """The words that started this process."""
    import __main__

    spec = getattr(__main__, "__spec__", None)
    if spec is not None:
        name = spec.name.removesuffix(".__main__") if spec.name != "__main__" else spec.name
        return [sys.executable, "-m", name, *sys.argv[1:]]
    return [sys.executable, str(Path(sys.argv[0]).absolute()), *sys.argv[1:]]


def free_port() -> int:
    """A port that the system has just given and taken back."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
