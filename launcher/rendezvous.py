"""Where the agents of all nodes meet: torchelastic's c10d rendezvous, with node numbers and one store for everything.

The ranks use the rendezvous' own store, on the endpoint. torchelastic would serve a second one on whichever node became
number 0 first, and nodes that stay would look for it there after that node is gone.
"""

from __future__ import annotations

import secrets
import socket

from torch.distributed import PrefixStore, Store
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousParameters, registry
from torch.distributed.elastic.rendezvous.api import RendezvousStoreInfo

from launcher.errors import TopologyError
from launcher.launch_options import LaunchOptions

_RUN_ID = "launcher"


def make_rendezvous(options: LaunchOptions) -> NumberedRendezvous:
    """Serve or reach the rendezvous of this run.

    Raises:
        TopologyError: the endpoint cannot be served or reached.
    """
    own = {} if options.node_rank is None else {"is_host": options.node_rank == 0}
    if not options.several_nodes:
        own = {"is_host": True}
    parameters = RendezvousParameters(
        backend="c10d",
        endpoint=f"{options.endpoint_host}:{options.endpoint_port}",
        run_id=options.run_id or (_RUN_ID if options.several_nodes else secrets.token_hex(8)),
        min_nodes=options.min_nodes,
        max_nodes=options.max_nodes,
        local_addr=None if options.several_nodes else "127.0.0.1",
        join_timeout=int(options.join_timeout),
        last_call_timeout=max(1, int(options.last_call)),
        **own,
    )
    try:
        handler = registry.get_rendezvous_handler(parameters)
    except Exception as error:
        # c10d raises its own classes, or a bare RuntimeError, for a taken port and a host that is not there.
        where = f"{options.endpoint_host}:{options.endpoint_port}"
        what = "serve" if own.get("is_host") else "reach"
        raise TopologyError(
            f"--rdzv-endpoint {where}: cannot {what} it from {socket.gethostname()}: {_root(error)}; is the port free "
            "on node 0 and open between the nodes? Port 0 takes a free one on a single node"
        ) from error
    return NumberedRendezvous(handler, options)


def _root(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).splitlines()[0] if str(error) else type(error).__name__


class NumberedRendezvous(RendezvousHandler):
    """torchelastic's rendezvous; a node keeps the number that `--node-rank` gave it where the nodes are fixed."""

    def __init__(self, inner: RendezvousHandler, options: LaunchOptions) -> None:
        self._inner = inner
        self._options = options

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for the other nodes.

        Raises:
            TopologyError: two nodes have the same number.
        """
        info = self._inner.next_rendezvous()
        rank = info.rank
        number = self._options.node_rank
        if number is not None and self._options.min_nodes == self._options.max_nodes:
            if info.store.add(f"launcher/node/{number}", 1) > 1:
                raise TopologyError(f"--node-rank {number} was given on two nodes; each node needs a number of its own")
            rank = number
        host, port = _address(info.store)
        return RendezvousInfo(info.store, rank, info.world_size, RendezvousStoreInfo(host, port))

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
