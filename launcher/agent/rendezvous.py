"""Where the agents of all nodes meet, with one store for everything.

Numbered nodes, all of which must come, use the launcher's own rendezvous. A single node, and nodes that may come and
go, use torchelastic's c10d rendezvous.

The ranks use the rendezvous' own store, on the endpoint. torchelastic would serve a second one on whichever node became
number 0 first, and nodes that stay would look for it there after that node is gone.
"""

from __future__ import annotations

import secrets
import socket
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousParameters, registry
from torch.distributed.elastic.rendezvous.api import RendezvousStoreInfo

from launcher.agent.fixed_rendezvous import FixedRendezvous
from launcher.config.launch_options import LaunchOptions
from launcher.core.errors import TopologyError

_RUN_ID = "launcher"
# Seconds that a node tries to reach node 0.
_CONNECT_WITHIN = 60.0


def make_rendezvous(options: LaunchOptions) -> RendezvousHandler:
    """Serve or reach the rendezvous of this run.

    Raises:
        TopologyError: the endpoint cannot be served or reached.
    """
    is_host = options.node_rank == 0 if options.several_nodes and options.node_rank is not None else None
    if not options.several_nodes:
        is_host = True
    try:
        if options.several_nodes and options.node_rank is not None and options.min_nodes == options.max_nodes:
            return _fixed(options, options.node_rank)
        return OneStoreRendezvous(registry.get_rendezvous_handler(_parameters(options, is_host)), options)
    except Exception as error:
        # c10d raises its own classes, or a bare RuntimeError, for a taken port and a host that is not there.
        where = f"{options.endpoint_host}:{options.endpoint_port}"
        what = "serve" if is_host else "reach"
        raise TopologyError(
            f"--rdzv-endpoint {where}: cannot {what} it from {socket.gethostname()}: {_root(error)}; is the port free "
            "on node 0 and open between the nodes? Port 0 takes a free one on a single node"
        ) from error


def _fixed(options: LaunchOptions, node: int) -> FixedRendezvous:
    host, port = options.endpoint_host, options.endpoint_port
    store = TCPStore(host, port, is_master=node == 0, multi_tenant=True, wait_for_workers=False,
                     timeout=timedelta(seconds=_CONNECT_WITHIN))  # fmt: skip
    own = PrefixStore(options.run_id or _RUN_ID, store)
    return FixedRendezvous(own, host, port, node, options.max_nodes, options.join_timeout)


def _parameters(options: LaunchOptions, is_host: bool | None) -> RendezvousParameters:
    """torchelastic's; it finds out itself who serves the store where that is not known."""
    return RendezvousParameters(
        backend="c10d",
        endpoint=f"{options.endpoint_host}:{options.endpoint_port}",
        run_id=options.run_id or (_RUN_ID if options.several_nodes else secrets.token_hex(8)),
        min_nodes=options.min_nodes,
        max_nodes=options.max_nodes,
        local_addr=None if options.several_nodes else "127.0.0.1",
        join_timeout=int(options.join_timeout),
        last_call_timeout=max(1, int(options.last_call)),
        **({} if is_host is None else {"is_host": is_host}),
    )


def _root(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).splitlines()[0] if str(error) else type(error).__name__


class OneStoreRendezvous(RendezvousHandler):
    """torchelastic's rendezvous, with its own store for the ranks too."""

    def __init__(self, inner: RendezvousHandler, options: LaunchOptions) -> None:
        self._inner = inner
        self._options = options

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for the other nodes."""
        info = self._inner.next_rendezvous()
        rank = self._in_order_of_numbers(info) if self._options.several_nodes else info.rank
        host, port = _address(info.store)
        return RendezvousInfo(info.store, rank, info.world_size, RendezvousStoreInfo(host, port))

    def _in_order_of_numbers(self, info: RendezvousInfo) -> int:
        """This node's place among those that came.

        torchelastic orders them by host name and process id, so that rank 0 would be anywhere. The node that serves
        the rendezvous cannot be lost, so the run's files and log lines are best made there. Nodes without a number
        come last.
        """
        number = self._options.max_nodes if self._options.node_rank is None else self._options.node_rank
        info.store.set(f"launcher/number/{info.rank}", str(number))
        numbers = [int(info.store.get(f"launcher/number/{rank}")) for rank in range(info.world_size)]
        return sum((other, rank) < (number, info.rank) for rank, other in enumerate(numbers))

    @property
    def use_agent_store(self) -> bool:
        """The ranks meet at the store that the agents serve."""
        return True

    def get_backend(self) -> str:
        """Name of the backend."""
        return self._inner.get_backend()

    def is_closed(self) -> bool:
        """Whether the run is over."""
        return self._inner.is_closed()

    def set_closed(self) -> None:
        """End the run for all nodes."""
        self._inner.set_closed()

    def num_nodes_waiting(self) -> int:
        """Nodes that wait for the next attempt to join it."""
        return self._inner.num_nodes_waiting() if self._options.several_nodes else 0

    def get_run_id(self) -> str:
        """The rendezvous' name."""
        return self._inner.get_run_id()

    def shutdown(self) -> bool:
        """Leave; closes the rendezvous for all nodes."""
        return self._inner.shutdown()


def _address(store: Store) -> tuple[str, int]:
    """Host and port of the server under the prefixes."""
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return store.host, store.port  # pyright: ignore[reportAttributeAccessIssue] -- c10d's backend makes a TCPStore
