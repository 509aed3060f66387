"""What the set-up wizard finds around it: this machine's devices, the cluster's partitions, W&B's key."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from launcher.hardware.devices import Hardware, detect_hardware
from slurm.partitions import Partition, PartitionsError, read_partitions


@dataclass(frozen=True, slots=True)
class MachineFacts:
    """What is here.

    Attributes:
        host: name of this machine.
        hardware: its devices.
        partitions: the cluster's; none without SLURM.
        wandb_online: whether W&B has a key.
        remarks: what could not be found out, and why.
    """

    host: str
    hardware: Hardware
    partitions: tuple[Partition, ...] = ()
    wandb_online: bool = False
    remarks: tuple[str, ...] = ()


def detect_machine() -> MachineFacts:
    """Look around; SLURM that does not answer is a remark."""
    # Lightning's loggers come with it: seconds that only the wizard spends.
    from launcher.config.schema import WandbOptions
    from launcher.loggers.wandb_settings import resolve_mode

    partitions: tuple[Partition, ...] = ()
    remarks: tuple[str, ...] = ()
    try:
        partitions = read_partitions()
    except PartitionsError as error:
        remarks = (f"SLURM is here, but its partitions are not known: {error}",)
    online = resolve_mode(WandbOptions(), os.environ)[0] == "online"
    return MachineFacts(socket.gethostname(), detect_hardware("auto", 0), partitions, online, remarks)
