"""The store that the ranks meet at, and the process group over it.

The group is made here and not by Lightning because torchelastic's store outlives an attempt: a group over the bare
store finds the addresses of dead ranks in it, and the restart fails or hangs. Each attempt gets a prefix of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.errors import AgreementError
from launcher.topology import Topology

if TYPE_CHECKING:
    from torch.distributed import Store


def open_store(topology: Topology, timeout: float) -> Store:
    """Connect to the store of this run's ranks; rank zero serves it where no agent does.

    Args:
        topology: this rank's place.
        timeout: seconds to wait for the server.

    Raises:
        AgreementError: nobody serves the store.
    """
    import torch.distributed as dist

    if topology.master_addr is None or topology.master_port is None:
        return dist.HashStore()
    serves = topology.rank == 0 and not topology.agent_store
    try:
        return dist.TCPStore(
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


@contextmanager
def process_group(
    store: Store, topology: Topology, backend: str | None, attempt: str, timeout: float, dumps: Path | None = None
) -> Iterator[None]:
    """A process group that only the ranks of this attempt can meet in; nothing without a backend.

    Args:
        store: shared by the ranks.
        topology: this rank's place.
        backend: 'gloo', 'nccl' or None.
        attempt: a word that this attempt's ranks agreed on.
        timeout: seconds after which a collective that waits for a rank fails.
        dumps: folder in which NCCL's watchdog leaves its flight record when it ends this rank, for torch's own tools.
    """
    if backend is None:
        yield
        return
    import torch
    import torch.distributed as dist

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
        raise
    dist.destroy_process_group()
