"""NVMe folders for ZeRO offload: those of a config, and their state on a rank."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.config.schema import RunConfig
from strategies.deepspeed_config import NVME_PATH
from strategies.deepspeed_merge import nvme_paths


@dataclass(frozen=True, slots=True)
class NvmeFolder:
    """A folder as one rank sees it.

    Attributes:
        free_bytes: free space for this user; 0 if it cannot be used.
        problem: why it cannot be used; None if it can.
        device: number of its file system; folders on the same one share the free space.
    """

    path: str
    free_bytes: int = 0
    problem: str | None = None
    device: int = 0


def find_offload_folders(config: RunConfig) -> tuple[str, ...]:
    """The folders of the config's strategy and of the candidates; a DeepSpeed file must be read already."""
    user = config.deepspeed_config if isinstance(config.deepspeed_config, Mapping) else {}
    return tuple(dict.fromkeys((*nvme_paths(config.strategy, user), NVME_PATH)))


def inspect_folders(paths: Iterable[str]) -> tuple[NvmeFolder, ...]:
    """The state of each path in this process. A missing folder is a problem: DeepSpeed would create it on any disk."""
    return tuple(map(_inspect, paths))


def _inspect(path: str) -> NvmeFolder:
    folder = Path(path)
    try:
        if not folder.exists():
            return NvmeFolder(path, problem="does not exist")
        if not folder.is_dir():
            return NvmeFolder(path, problem="is not a folder")
        if not os.access(folder, os.W_OK | os.X_OK):
            return NvmeFolder(path, problem="cannot be written")
        status, device = os.statvfs(folder), folder.stat().st_dev
    except OSError as error:
        return NvmeFolder(path, problem=f"cannot be read ({error.strerror})")
    return NvmeFolder(path, status.f_bavail * status.f_frsize, device=device)
