"""The store that the ranks meet at, and the process group over it.

The group is made here and not by Lightning because torchelastic's store outlives an attempt: a group over the bare
store finds the addresses of dead ranks in it, and the restart fails or hangs. Each attempt gets a prefix of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.core.errors import AgreementError, TopologyError
from launcher.hardware.topology import Topology
from launcher.process.open_resources import keep_open

if TYPE_CHECKING:
    from torch.distributed import Store

# The stores that this process is connected to, and how many trainings each has had.
_stores: dict[tuple[str, int, int], tuple[Store, int]] = {}

_ENDED = "launcher/script-ended"


def open_store(topology: Topology, timeout: float) -> Store:
    """Connect to the store of this run's ranks; rank zero serves it where no agent does.

    A process that trains again keeps its connection: the server of the training before could be gone in the middle of
    this one. Each training has a prefix of its own.

    Args:
        topology: this rank's place.
        timeout: seconds to wait for the server.

    Raises:
        AgreementError: nobody serves the store.
    """
    import torch.distributed as dist

    if topology.master_addr is None or topology.master_port is None:
        return dist.HashStore()
    place = (topology.master_addr, topology.master_port, topology.rank)
    if place in _stores:
        store, trainings = _stores[place]
        _stores[place] = (store, trainings + 1)
        store.set_timeout(timedelta(seconds=timeout))
        return dist.PrefixStore(f"training-{trainings}", store)
    serves = topology.rank == 0 and not topology.agent_store
    try:
        store = dist.TCPStore(
            topology.master_addr,
            topology.master_port,
            is_master=serves,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
        )
    except RuntimeError as error:
        role = "serve" if serves else "reach"
        raise AgreementError(
            f"rank {topology.rank} ({topology.host}) cannot {role} the store at {topology.master_addr}:"
            f"{topology.master_port}: {error}; look at rank 0's log, and whether that port is open between the nodes",
            [0],
        ) from error
    _stores[place] = (store, 1)
    return store


@contextmanager
def process_group(
    store: Store,
    topology: Topology,
    backend: str | None,
    attempt: str,
    timeout: float,
    dumps: Path | None = None,
    *,
    stays: bool = False,
) -> Iterator[None]:
    """A process group that only the ranks of this attempt can meet in; nothing without a backend.

    One that the user's code has made is taken as it is, as Lightning does, and stays.

    Args:
        store: shared by the ranks.
        topology: this rank's place.
        backend: 'gloo', 'nccl' or None.
        attempt: a word that this attempt's ranks agreed on.
        timeout: seconds after which a collective that waits for a rank fails.
        dumps: folder in which NCCL's watchdog leaves its flight record when it ends this rank, for torch's own tools.
        stays: whether it is left open after a training that ended well, for the Trainer that is returned.

    Raises:
        TopologyError: the user's own group is of other ranks.
    """
    if backend is None:
        yield
        return
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        found = (dist.get_rank(), dist.get_world_size())
        if found != (topology.rank, topology.world_size):
            raise TopologyError(
                f"this process is rank {found[0]} of {found[1]} in a process group that was there already, and rank "
                f"{topology.rank} of {topology.world_size} in this training; end that group first"
            )
        yield
        return
    device = None
    if backend == "nccl":
        device = torch.device("cuda", topology.local_rank)
        torch.cuda.set_device(device)
        if dumps is not None:
            # Read when the group is made; torch's own place is one for all runs of the user.
            os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
            os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(dumps / "flight-record-rank-"))
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(f"launcher/{attempt}/group", store),
        rank=topology.rank,
        world_size=topology.world_size,
        timeout=timedelta(seconds=timeout),
        device_id=device,
    )
    try:
        yield
    except BaseException:  # Ctrl-C too: a group that is left must not outlive the run; raised on
        # The others may be in a collective that this rank never joins, and NCCL would wait for them; gloo does not.
        if backend != "nccl":
            dist.destroy_process_group()
        elif stays:
            keep_open(_abort)
        raise
    if stays:
        keep_open(_destroy)
    else:
        _destroy()


def announce_end() -> None:
    """Tell the other ranks of this script that rank zero takes part in no further training."""
    for store, _ in _stores.values():
        with suppress(RuntimeError):
            store.set(_ENDED, "1")


def rank_zero_has_ended() -> bool:
    """Whether rank zero of this script has told so."""
    with suppress(RuntimeError):  # its store is gone, which who waits for it finds out
        return any(store.check([_ENDED]) for store, _ in _stores.values())
    return False


def _abort() -> None:
    """Leave a group whose collectives may have begun on some ranks only."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.distributed_c10d._abort_process_group()


def _destroy() -> None:
    import torch.distributed as dist

    # The script may have done so itself.
    if dist.is_initialized():
        dist.destroy_process_group()
