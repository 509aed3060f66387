"""One node of a preflight: its own checks, then a rank for each GPU, or one where there is none.

`python -m launcher.doctor.preflight_node NODE`, where NODE is a `NodeRequest` as JSON, is what srun starts on each
node.
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
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from launcher.core.atomic_write import write_file
from launcher.core.own_modules import module_command
from launcher.doctor.command import examine
from launcher.doctor.preflight_findings import NodeResult
from launcher.doctor.preflight_rank import PreflightRank
from slurm.environment import read_slurm_task
from slurm.rendezvous import Endpoint, PortReservation, RendezvousError, host_rendezvous, join_rendezvous
from slurm.task import INTERFACE_VARIABLES

# What runs a rank; its place as JSON is added.
RANK_COMMAND = module_command("launcher.doctor.preflight_rank")
_LAST_LINES = 6
_LAST_BYTES = 8192
# Seconds that the others have once a rank has failed: what they have measured so far is in their files.
_GRACE = 15.0


@dataclass(frozen=True, slots=True)
class NodeRequest:
    """What crosses to every node. It holds no secret.

    Attributes:
        folder: for the results, on a disk that the nodes share.
        nodes: number of nodes.
        ranks_per_node: ranks on each; None for one for each GPU, or one.
        timeout: seconds that nodes and ranks wait for each other.
        interface: network interface to use, None for the one that the nodes reach each other by.
        cpu: whether to leave GPUs alone.
    """

    folder: str
    nodes: int
    ranks_per_node: int | None
    timeout: float
    interface: str | None = None
    cpu: bool = False


def run_node(request: NodeRequest, node: int, rank_command: Sequence[str] = RANK_COMMAND) -> None:
    """Check this node, start its ranks and wait for them; leaves the results in the folder.

    Args:
        request: what is to be done.
        node: rank of this node.
        rank_command: what runs a rank.
    """
    from launcher.doctor.checks import NODE_CHECKS

    host = socket.gethostname()
    result = NodeResult(node, host, 0, examine(NODE_CHECKS) if request.nodes > 1 else ())
    _write(request, result)
    try:
        with _rendezvous(request, node) as place:
            count = request.ranks_per_node or _devices(cpu=request.cpu)
            # What came to be known before a rank hangs, should this process be killed.
            result = dataclasses.replace(result, ranks=count)
            _write(request, result)
            words = _run_ranks(request, node, count, place, rank_command)
    except (RendezvousError, OSError) as error:
        _write(request, dataclasses.replace(result, error=str(error)))
        return
    _write(request, dataclasses.replace(result, last_words=words))


def _devices(*, cpu: bool) -> int:
    from launcher.hardware.devices import available_kind, device_count

    return 1 if cpu else device_count(available_kind("auto"))


@contextmanager
def _rendezvous(request: NodeRequest, node: int) -> Generator[Endpoint]:
    """Where the ranks meet, with its port reserved as long as they run."""
    if node > 0:
        yield join_rendezvous(Path(request.folder) / "rendezvous.json", node, request.timeout)
        return
    with contextlib.closing(PortReservation()) as reserved:
        if request.nodes == 1:
            yield Endpoint("127.0.0.1", reserved.port, "lo")
            return
        names = [os.environ.get("SLURMD_NODENAME", socket.gethostname()), socket.gethostname()]
        yield host_rendezvous(
            Path(request.folder) / "rendezvous.json", request.nodes, reserved.port, names, request.timeout
        )


def _run_ranks(request: NodeRequest, node: int, count: int, place: Endpoint, command: Sequence[str]) -> dict[int, str]:
    """Run the ranks to their end; the last words of those that failed, by local rank."""
    folder = Path(request.folder)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    for variable in INTERFACE_VARIABLES:
        if request.interface is not None:
            env[variable] = request.interface
        elif place.interface is not None and (request.nodes > 1 or variable.startswith("GLOO")):
            env.setdefault(variable, place.interface)
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for local in range(count):
            rank = PreflightRank(
                str(folder),
                node * count + local,
                request.nodes * count,
                count,
                place.host,
                place.port,
                request.timeout,
                request.cpu,
            )
            with (folder / f"rank-{rank.rank}.log").open("wb") as log:
                ranks.append(subprocess.Popen(
                    [*command, json.dumps(dataclasses.asdict(rank))], stdin=subprocess.DEVNULL, stdout=log,
                    stderr=subprocess.STDOUT, env=env,
                ))  # fmt: skip
        late = _wait(ranks, request.timeout)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    words = {local: _last_words(folder / f"rank-{node * count + local}.log", process.returncode)
             for local, process in enumerate(ranks) if process.returncode}  # fmt: skip
    for local in late & words.keys():
        words[local] = f"{words[local]}\nended here: it was not done after {request.timeout:g} s".lstrip()
    return words


def _wait(ranks: Sequence[subprocess.Popen[bytes]], timeout: float) -> set[int]:
    """Until all have ended, or the time is up, which is soon once one has failed; those that had not."""
    give_up = time.monotonic() + timeout
    while (running := {i for i, process in enumerate(ranks) if process.poll() is None}) and time.monotonic() < give_up:
        if any(process.returncode for process in ranks):
            give_up = min(give_up, time.monotonic() + _GRACE)
        time.sleep(0.05)
    return running


def _last_words(log: Path, code: int) -> str:
    try:
        lines = log.read_bytes()[-_LAST_BYTES:].decode(errors="replace").splitlines()
    except OSError:
        lines = []
    shown = "\n".join(line.rstrip() for line in lines[-_LAST_LINES:] if line.strip())
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"{shown}\n{how}".strip()


def _write(request: NodeRequest, result: NodeResult) -> None:
    write_file(Path(request.folder) / f"node-{result.node}.json", json.dumps(dataclasses.asdict(result)))


def main(words: Sequence[str], env: Mapping[str, str]) -> None:
    """Be the node that srun made of this task."""
    os.umask(0o077)
    task = read_slurm_task(env)
    run_node(NodeRequest(**json.loads(words[0])), 0 if task is None else task.node)


if __name__ == "__main__":
    main(sys.argv[1:], os.environ)
