"""How the nodes of one attempt find each other, before any rank runs.

Node 0 reserves a port that is free there and publishes it, with a token and every name and address that it has, in a
file on the shared disk. The other nodes try these until one answers with the token, so each knows an address of node 0
that it reaches, and the interface that the way there leaves by; node 0 knows the interface that they came in by.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from slurm.interfaces import addresses
from slurm.ownership import is_own, name_of_owner

_TOKEN_BYTES = 32
# Seconds that one try of one address may take.
_TRY = 3.0
_LOOK_EVERY = 0.2


class RendezvousError(RuntimeError):
    """The nodes did not find each other; says which are missing or what was tried.

    Args:
        message: the same in words.
        missing: numbers of the nodes that did not come, where that is known.
    """

    def __init__(self, message: str, missing: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.missing = missing


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the ranks of an attempt meet.

    Attributes:
        host: name or address of node 0 that this node reaches.
        port: free on node 0.
        interface: this node's interface towards the others; None if they came by several.
    """

    host: str
    port: int
    interface: str | None


@dataclass(frozen=True, slots=True)
class _Published:
    """What node 0 tells: its names and addresses, the ranks' port, the port that answers, and the token."""

    hosts: list[str]
    port: int
    answers: int
    token: str


class PortReservation:
    """A free port of this machine that nobody else is given, though another process of ours can listen on it.

    Linux lets two sockets with SO_REUSEADDR have one port as long as only one of them listens.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("", 0))
        self.port: int = self._socket.getsockname()[1]

    def close(self) -> None:
        """Give the port back."""
        self._socket.close()


@contextlib.contextmanager
def rendezvous(file: Path, node: int, nodes: int, names: list[str], timeout: float) -> Generator[Endpoint]:
    """Where the nodes of an attempt meet; node 0's port stays reserved inside.

    Args:
        file: see `host_rendezvous`.
        node: this node's number.
        nodes: how many there are.
        names: of this node, the preferred first.
        timeout: seconds to wait for the others.

    Raises:
        RendezvousError: see `host_rendezvous` and `join_rendezvous`.
    """
    if node > 0:
        yield join_rendezvous(file, node, timeout)
        return
    with contextlib.closing(PortReservation()) as reserved:
        yield host_rendezvous(file, nodes, reserved.port, names, timeout)


def host_rendezvous(file: Path, nodes: int, port: int, names: list[str], timeout: float) -> Endpoint:
    """Node 0: publish the place and wait for the other nodes.

    Args:
        file: to publish in; new for each attempt, on a disk that the nodes share.
        nodes: number of nodes.
        port: for the ranks, reserved on this node.
        names: of this node, the preferred first; its addresses are added.
        timeout: seconds to wait.

    Raises:
        RendezvousError: names the nodes that did not come.
    """
    token = secrets.token_hex(_TOKEN_BYTES // 2)
    own = addresses()
    with socket.create_server(("", 0), family=_family(), dualstack_ipv6=_family() == socket.AF_INET6) as server:
        answers = server.getsockname()[1]
        hosts = list(dict.fromkeys([*names, *own]))
        _publish(file, _Published(hosts, port, answers, token))
        interfaces = _await_nodes(server, nodes, token, own, timeout)
    file.unlink(missing_ok=True)
    return Endpoint(names[0], port, interfaces.pop() if len(interfaces) == 1 else None)


def join_rendezvous(file: Path, node: int, timeout: float, now: Callable[[], float] = time.monotonic) -> Endpoint:
    """Another node: find the file, then an address of node 0 that answers.

    Raises:
        RendezvousError: nothing was published, or nothing that was answered; says what was tried.
    """
    give_up = now() + timeout
    tried: dict[str, str] = {}
    while now() < give_up:
        published = _read(file)
        if published is not None:
            for host in published.hosts:
                try:
                    local = _greet(host, published.answers, published.token, node)
                except OSError as error:
                    tried[host] = error.strerror or str(error)
                else:
                    return Endpoint(host, published.port, addresses().get(local))
        time.sleep(_LOOK_EVERY)
    if not tried:
        with contextlib.suppress(OSError):
            found = file.lstat()
            if file.is_symlink() or not is_own(found, file.parent):
                what = f"{'a link' if file.is_symlink() else 'a file'} of {name_of_owner(found)}"
                raise RendezvousError(f"{file} is {what}, and is not trusted; have it removed, or set another runs_dir",
                                   missing=(0,))  # fmt: skip
        raise RendezvousError(
            f"node 0 published no address in {file} within {timeout:g} s; do the nodes share that folder?",
            missing=(0,),
        )
    attempts = "; ".join(f"{host}: {why}" for host, why in tried.items())
    raise RendezvousError(
        f"node {node} ({socket.gethostname()}) reaches no address of node 0: {attempts}; "
        "open the ports between the nodes"
    )


def _await_nodes(
    server: socket.socket, nodes: int, token: str, own: Mapping[str, str], timeout: float
) -> set[str | None]:
    """Answer each node once; returns the interfaces that they came in by."""
    missing = set(range(1, nodes))
    interfaces: set[str | None] = set()
    give_up = time.monotonic() + timeout
    while missing:
        server.settimeout(max(give_up - time.monotonic(), 0.001))
        try:
            connection, _ = server.accept()
        except TimeoutError:
            numbers = tuple(sorted(missing))
            raise RendezvousError(
                f"node {', '.join(map(str, numbers))} of {nodes} did not come within {timeout:g} s", numbers
            ) from None
        with connection:
            connection.settimeout(_TRY)
            try:
                line = connection.makefile("rb").readline(200).decode(errors="replace").split()
                if len(line) == 2 and line[1].isdecimal() and hmac.compare_digest(line[0], token):
                    connection.sendall(f"{token}\n".encode())
                    # A node that asks again has not heard the answer.
                    missing.discard(int(line[1]))
                    interfaces.add(own.get(_plain(connection.getsockname()[0])))
            except OSError:
                continue  # it will come again
    return interfaces


def _greet(host: str, port: int, token: str, node: int) -> str:
    """Ask one address of node 0; returns the own address that the way there leaves by."""
    with socket.create_connection((host, port), timeout=_TRY) as connection:
        connection.sendall(f"{token} {node}\n".encode())
        answer = connection.makefile("rb").readline(200).decode(errors="replace").strip()
        if not hmac.compare_digest(answer, token):
            raise OSError(f"somebody else answers at port {port}")
        return _plain(connection.getsockname()[0])


def _plain(address: str) -> str:
    """A dual-stack socket writes an IPv4 address as ::ffff:10.0.0.1."""
    return address.removeprefix("::ffff:")


def _family() -> socket.AddressFamily:
    return socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET


def _publish(file: Path, values: _Published) -> None:
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        json.dump(asdict(values), stream)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


def _read(file: Path) -> _Published | None:
    try:
        # NFS clients remember that a file was missing; opening its folder makes them ask again.
        os.listdir(file.parent)  # noqa: PTH208 -- nothing of the result is used
        with open(file, encoding="utf-8", opener=_no_link) as stream:
            # Whoever else publishes here would be the one that all ranks come to.
            if not is_own(os.fstat(stream.fileno()), file.parent):
                return None
            return _Published(**json.load(stream))
    except OSError as error:
        if error.errno != errno.ELOOP and not isinstance(error, FileNotFoundError | PermissionError):
            raise
        return None
    except (ValueError, TypeError):
        return None


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW)
