"""Connects the agents of all nodes, with one store for agents and ranks.

A single node, and numbered nodes that are all required, use `FixedRendezvous`. Nodes that may join and leave use
torchelastic's c10d rendezvous, whose last call lasts a part of a second in every attempt.

The ranks use the rendezvous' store. torchelastic would serve a second store on the first node number 0, and nodes that
stay would look for it there after that node has left.
"""

from __future__ import annotations

import secrets
import socket
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousParameters, registry
from torch.distributed.elastic.rendezvous.api import RendezvousStoreInfo
from torch.distributed.elastic.rendezvous.utils import _matches_machine_hostname

from launcher.agent.fixed_rendezvous import FixedRendezvous, NumberedNode
from launcher.config.launch_options import LaunchOptions
from launcher.core.errors import TopologyError

_RUN_ID = "launcher"
_CONNECT_TIMEOUT = 60.0


def make_rendezvous(options: LaunchOptions) -> RendezvousHandler:
    """Serve the rendezvous of this run or connect to it.

    Raises:
        TopologyError: the endpoint cannot be served or reached.
    """
    # None: torchelastic finds out which node serves the store.
    node = options.node_rank if options.several_nodes else 0
    is_host = None if node is None else node == 0
    try:
        if node is not None and options.min_nodes == options.max_nodes:
            return _make_fixed_rendezvous(options, node)
        return OneStoreRendezvous(registry.get_rendezvous_handler(_parameters(options, is_host)), options)
    except Exception as error:
        # c10d raises its own classes, or RuntimeError, for a port in use and an unknown host.
        action = "serve" if is_host else "reach"
        raise TopologyError(
            f"--rdzv-endpoint {options.endpoint_host}:{options.endpoint_port}: cannot {action} it from "
            f"{socket.gethostname()}: {_first_cause(error)}; check that the port is free on node 0 and open between "
            "the nodes; on a single node port 0 takes a free one"
        ) from error


def describe_lost_store(options: LaunchOptions) -> str:
    """The message for a run whose store does not answer any more."""
    return (
        f"the run ends: the node that serves the rendezvous at {options.endpoint_host}:{options.endpoint_port} has "
        "failed, and no other node can replace it; start the run again on all nodes, with --resume auto it continues "
        "from its last checkpoint"
    )


def _make_fixed_rendezvous(options: LaunchOptions, node: int) -> FixedRendezvous:
    host, port = options.endpoint_host, options.endpoint_port
    store = TCPStore(host, port, is_master=node == 0, multi_tenant=True, wait_for_workers=False,
                     timeout=timedelta(seconds=_CONNECT_TIMEOUT))  # fmt: skip
    run_id = options.run_id or (_RUN_ID if options.several_nodes else secrets.token_hex(8))
    this_node = NumberedNode(node, options.max_nodes, run_id)
    address = RendezvousStoreInfo(host, store.port)
    return FixedRendezvous(PrefixStore(run_id, store), address, this_node, options.join_timeout)


def _parameters(options: LaunchOptions, is_host: bool | None) -> RendezvousParameters:
    return RendezvousParameters(
        backend="c10d",
        endpoint=f"{options.endpoint_host}:{options.endpoint_port}",
        run_id=options.run_id or _RUN_ID,
        min_nodes=options.min_nodes,
        max_nodes=options.max_nodes,
        local_addr=None,
        join_timeout=int(options.join_timeout),
        last_call_timeout=max(1, int(options.last_call)),
        **({} if is_host is None else {"is_host": is_host}),
    )


def _first_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).splitlines()[0] if str(error) else type(error).__name__


class OneStoreRendezvous(RendezvousHandler):
    """torchelastic's rendezvous, whose store the ranks use too."""

    def __init__(self, inner: RendezvousHandler, options: LaunchOptions) -> None:
        self._inner = inner
        self._options = options

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for the other nodes."""
        info = self._inner.next_rendezvous()
        host, port = _server_address(info.store)
        return RendezvousInfo(
            info.store, self._order_by_node_rank(info), info.world_size, RendezvousStoreInfo(host, port)
        )

    def _order_by_node_rank(self, info: RendezvousInfo) -> int:
        """This node's position among the nodes that joined, ordered by `--node-rank`.

        torchelastic orders them by host name and process id, so rank 0 could be on any node. The run cannot lose the
        node that serves the rendezvous, so rank 0, which writes the run's files, should be there. Nodes without a
        number come last.
        """
        number = self._options.max_nodes if self._options.node_rank is None else self._options.node_rank
        info.store.set(f"launcher/number/{info.rank}", str(number))
        numbers = [int(info.store.get(f"launcher/number/{rank}")) for rank in range(info.world_size)]
        return sum((other, rank) < (number, info.rank) for rank, other in enumerate(numbers))

    @property
    def use_agent_store(self) -> bool:
        """The ranks use the agents' store."""
        return True

    def get_backend(self) -> str:
        """Name of the backend."""
        return self._inner.get_backend()

    def is_closed(self) -> bool:
        """Whether the run has ended."""
        return self._inner.is_closed()

    def set_closed(self) -> None:
        """End the run for all nodes."""
        self._inner.set_closed()

    def num_nodes_waiting(self) -> int:
        """Number of nodes that wait to join the next attempt."""
        return self._inner.num_nodes_waiting() if self._options.several_nodes else 0

    def get_run_id(self) -> str:
        """Name of the rendezvous."""
        return self._inner.get_run_id()

    def shutdown(self) -> bool:
        """Leave; closes the rendezvous for all nodes."""
        return self._inner.shutdown()


class FreshStoreRendezvous(OneStoreRendezvous):
    """A rendezvous that gives the ranks of each attempt an empty store, as torchrun does.

    `init_process_group` writes the same keys in every attempt, and does not wait for keys that an earlier one has left.
    The first attempt uses the store of the rendezvous: a port that the user has given is the MASTER_PORT of the ranks.
    """

    def __init__(self, inner: RendezvousHandler, options: LaunchOptions) -> None:
        super().__init__(inner, options)
        self._server: TCPStore | None = None

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for the other nodes; the node of rank 0 then serves a store."""
        info = self._inner.next_rendezvous()
        key = "launcher/ranks-store"
        if info.rank == 0:
            host, port = self._serve(info)
            info.store.set(key, f"{host} {port}")
        host, _, port = info.store.get(key).decode().partition(" ")
        return RendezvousInfo(info.store, info.rank, info.world_size, RendezvousStoreInfo(host, int(port)))

    def _serve(self, info: RendezvousInfo) -> tuple[str, int]:
        host, port = _server_address(info.store)
        self._server = None
        if _underlying_store(info.store).add("launcher/attempts", 1) == 1:
            return host, port
        if self._options.several_nodes and not _matches_machine_hostname(host):
            host = socket.getfqdn()
        self._server = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        return host, self._server.port


def _server_address(store: Store) -> tuple[str, int]:
    """Host and port of the TCPStore below the prefixes."""
    found = _underlying_store(store)
    return found.host, found.port


def _underlying_store(store: Store) -> TCPStore:
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    assert isinstance(store, TCPStore)  # noqa: S101 -- c10d's backend makes one
    return store
