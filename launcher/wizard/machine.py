"""Facts that the set-up wizard uses: devices of this machine, partitions of the cluster, the key of W&B."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from launcher.hardware.devices import Hardware, detect_hardware
from slurm.partitions import Partition, PartitionsError, read_partitions
from strategies.precision import AUTO, RankCapability, reconcile


@dataclass(frozen=True, slots=True)
class MachineFacts:
    """This machine and its cluster; no partitions without SLURM. Remarks are facts that could not be read, and why."""

    host: str
    hardware: Hardware
    partitions: tuple[Partition, ...] = ()
    wandb_online: bool = False
    remarks: tuple[str, ...] = ()

    @property
    def best_precision(self) -> str:
        """The precision that `auto` is on this machine."""
        device = self.hardware.device
        capability = RankCapability(0, self.host, device.kind, device.name, frozenset(device.native_dtypes))
        return str(reconcile(AUTO, [capability]).precision)


def detect_machine() -> MachineFacts:
    """Read the facts; if SLURM does not answer, that is a remark."""
    # Here: it imports the loggers of Lightning, which takes seconds.
    from launcher.config.schema import WandbOptions
    from launcher.loggers.wandb_settings import resolve_mode

    partitions, remarks = (), ()
    try:
        partitions = read_partitions()
    except PartitionsError as error:
        remarks = (f"no partitions of SLURM are offered: {error}",)
    online = resolve_mode(WandbOptions(), os.environ)[0] == "online"
    return MachineFacts(socket.gethostname(), detect_hardware("auto", 0), partitions, online, remarks)
