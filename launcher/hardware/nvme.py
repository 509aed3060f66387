"""The folders that ZeRO offloads to on NVMe: which a config means, and what a rank finds there."""

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
        path: as the config has it.
        free_bytes: room for this user; 0 if it cannot be used.
        problem: why it cannot be used; None if it can.
        device: number of the file system that it lies on: folders of one share its room.
    """

    path: str
    free_bytes: int = 0
    problem: str | None = None
    device: int = 0


def offload_folders(config: RunConfig) -> tuple[str, ...]:
    """The folders that a run of this config may offload to: those of its strategy, and the one of a candidate.

    Args:
        config: a file of DeepSpeed's settings is read in already.
    """
    user = config.deepspeed_config if isinstance(config.deepspeed_config, Mapping) else {}
    return tuple(dict.fromkeys((*nvme_paths(config.strategy, user), NVME_PATH)))


def look_at(paths: Iterable[str]) -> tuple[NvmeFolder, ...]:
    """What this process finds at each path. DeepSpeed would make a missing one, wherever that then lies."""
    return tuple(map(_look_at, paths))


def _look_at(path: str) -> NvmeFolder:
    folder = Path(path)
    try:
        if not folder.exists():
            return NvmeFolder(path, problem="does not exist")
        if not folder.is_dir():
            return NvmeFolder(path, problem="is no folder")
        if not os.access(folder, os.W_OK | os.X_OK):
            return NvmeFolder(path, problem="cannot be written")
        status, device = os.statvfs(folder), folder.stat().st_dev
    except OSError as error:
        return NvmeFolder(path, problem=f"cannot be looked at ({error.strerror})")
    return NvmeFolder(path, status.f_bavail * status.f_frsize, device=device)
