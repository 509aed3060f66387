"""One node of a preflight: runs its checks, then a rank for each GPU, or one rank without a GPU.

srun starts `python -m launcher.doctor.preflight_node REQUEST` on each node; REQUEST is a `NodeRequest` as JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from launcher.core.atomic_write import write_file
from launcher.core.own_modules import module_command
from launcher.doctor.finding import run_checks
from launcher.doctor.preflight_findings import NodeResult
from launcher.doctor.preflight_rank import RankRequest
from slurm.environment import read_slurm_task
from slurm.rendezvous import Endpoint, PortReservation, RendezvousError, host_rendezvous, join_rendezvous
from slurm.task import INTERFACE_VARIABLES

# Runs a rank; a `RankRequest` as JSON is appended.
RANK_COMMAND = module_command("launcher.doctor.preflight_rank")
_LAST_LINES = 6
_LAST_BYTES = 8192
# Seconds for the other ranks after one has failed; their measurements so far are in their files.
_GRACE = 15.0


@dataclass(frozen=True, slots=True)
class NodeRequest:
    """What every node receives. Contains no secret.

    Attributes:
        folder: of the results, on a disk that the nodes share.
        ranks_per_node: None for one rank for each GPU, or one without a GPU.
        timeout: seconds that nodes and ranks wait for each other.
        interface: network interface to use; None for the one that the nodes find each other on.
    """

    folder: str
    nodes: int
    ranks_per_node: int | None
    timeout: float
    interface: str | None = None
    cpu: bool = False


def run_node(request: NodeRequest, node: int, rank_command: Sequence[str] = RANK_COMMAND) -> None:
    """Check this node (`node` is its rank), run its ranks and wait for them; writes the results to the folder."""
    from launcher.doctor.checks import NODE_CHECKS
    from launcher.hardware.devices import available_kind, device_count

    host = socket.gethostname()
    result = NodeResult(node, host, 0, run_checks(NODE_CHECKS) if request.nodes > 1 else ())
    _write(request, result)
    try:
        with _rendezvous(request, node) as endpoint:
            count = request.ranks_per_node or (1 if request.cpu else device_count(available_kind("auto")))
            # Written early, in case a rank hangs and this process is killed.
            result = dataclasses.replace(result, ranks=count)
            _write(request, result)
            tails = _run_ranks(request, node, count, endpoint, rank_command)
    except (RendezvousError, OSError) as error:
        _write(request, dataclasses.replace(result, error=str(error)))
        return
    _write(request, dataclasses.replace(result, log_tails=tails))


@contextmanager
def _rendezvous(request: NodeRequest, node: int) -> Generator[Endpoint]:
    """The endpoint of the rendezvous; its port stays reserved while the ranks run."""
    file = Path(request.folder) / "rendezvous.json"
    if node > 0:
        yield join_rendezvous(file, node, request.timeout)
        return
    with contextlib.closing(PortReservation()) as reserved:
        if request.nodes == 1:
            yield Endpoint("127.0.0.1", reserved.port, "lo")
            return
        names = [os.environ.get("SLURMD_NODENAME", socket.gethostname()), socket.gethostname()]
        yield host_rendezvous(file, request.nodes, reserved.port, names, request.timeout)


def _run_ranks(
    request: NodeRequest, node: int, count: int, endpoint: Endpoint, command: Sequence[str]
) -> dict[int, str]:
    """Run the ranks to their end; returns the end of the log of each rank that failed, by local rank."""
    folder = Path(request.folder)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    for variable in INTERFACE_VARIABLES:
        if request.interface is not None:
            env[variable] = request.interface
        elif endpoint.interface is not None and (request.nodes > 1 or variable.startswith("GLOO")):
            env.setdefault(variable, endpoint.interface)
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for local in range(count):
            rank = RankRequest(request.folder, node * count + local, request.nodes * count, count, endpoint.host,
                               endpoint.port, request.timeout, request.cpu)  # fmt: skip
            with (folder / f"rank-{rank.rank}.log").open("wb") as log:
                ranks.append(subprocess.Popen(
                    [*command, json.dumps(dataclasses.asdict(rank))], stdin=subprocess.DEVNULL, stdout=log,
                    stderr=subprocess.STDOUT, env=env,
                ))  # fmt: skip
        unfinished = _wait(ranks, request.timeout)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    tails = {local: _read_tail(folder / f"rank-{node * count + local}.log", process.returncode)
             for local, process in enumerate(ranks) if process.returncode}  # fmt: skip
    for local in unfinished & tails.keys():
        tails[local] = f"{tails[local]}\nended: it did not complete within {request.timeout:g} s".lstrip()
    return tails


def _wait(ranks: Sequence[subprocess.Popen[bytes]], timeout: float) -> set[int]:
    """Wait until all ranks have ended or the timeout is over; returns the local ranks that still run.

    After the first failure the timeout is short.
    """
    deadline = time.monotonic() + timeout
    while (running := {i for i, process in enumerate(ranks) if process.poll() is None}) and time.monotonic() < deadline:
        if any(process.returncode for process in ranks):
            deadline = min(deadline, time.monotonic() + _GRACE)
        time.sleep(0.05)
    return running


def _read_tail(log: Path, code: int) -> str:
    try:
        lines = log.read_bytes()[-_LAST_BYTES:].decode(errors="replace").splitlines()
    except OSError:
        lines = []
    shown = "\n".join(line.rstrip() for line in lines[-_LAST_LINES:] if line.strip())
    end = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"{shown}\n{end}".strip()


def _write(request: NodeRequest, result: NodeResult) -> None:
    write_file(Path(request.folder) / f"node-{result.node}.json", json.dumps(dataclasses.asdict(result)))


if __name__ == "__main__":
    os.umask(0o077)
    task = read_slurm_task(os.environ)
    run_node(NodeRequest(**json.loads(sys.argv[1])), 0 if task is None else task.node)
