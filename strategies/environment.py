"""The location of a rank for Lightning, and the devices of its node."""

from __future__ import annotations

import torch
from lightning.fabric.plugins.environments import ClusterEnvironment
from typing_extensions import override

from strategies.base import BuildOptions, RankLocation


class FixedClusterEnvironment(ClusterEnvironment):
    """Gives Lightning the rank's location, so that it does not read the environment or start processes."""

    def __init__(self, location: RankLocation) -> None:
        super().__init__()
        self._location = location

    @property
    @override
    def creates_processes_externally(self) -> bool:
        return True

    @property
    @override
    def main_address(self) -> str:
        return self._location.main_address

    @property
    @override
    def main_port(self) -> int:
        return self._location.main_port

    @staticmethod
    @override
    def detect() -> bool:
        return False

    @override
    def world_size(self) -> int:
        return self._location.world_size

    @override
    def set_world_size(self, size: int) -> None:
        if size != self._location.world_size:
            raise ValueError(f"Lightning counts {size} ranks, the launcher agreed on {self._location.world_size}")

    @override
    def global_rank(self) -> int:
        return self._location.rank

    @override
    def set_global_rank(self, rank: int) -> None:
        if rank != self._location.rank:
            raise ValueError(f"Lightning calls this rank {rank}, the launcher {self._location.rank}")

    @override
    def local_rank(self) -> int:
        return self._location.local_rank

    @override
    def node_rank(self) -> int:
        return self._location.node_rank


def devices_of(options: BuildOptions) -> list[torch.device]:
    """The devices of a node's ranks, in the order of the local ranks."""
    return [device_of(options.device_kind, n) for n in range(options.location.local_world_size)]


def device_of(kind: str, index: int) -> torch.device:
    """The device of a local rank."""
    return torch.device("cpu") if kind == "cpu" else torch.device(kind, index)
