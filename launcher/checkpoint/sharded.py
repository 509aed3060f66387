"""Checkpoints of sharded trainings: a folder that torch's distributed checkpoints and Lightning can read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from launcher.checkpoint.reader import Trust, as_mapping, read_file
from launcher.core.errors import ResumeError, first_line
from strategies.sharded_files import METADATA, read_all, read_metadata, to_plain_optimizer


def is_sharded_folder(path: Path) -> bool:
    """Whether a checkpoint is such a folder."""
    return path.is_dir() and (path / METADATA).exists()


def read_sharded_outline(path: Path, trust: Trust | None = None, *, outline: bool = False) -> Mapping[str, Any]:
    """The part that Lightning saved, with meta tensors of the right shapes instead of the weights.

    Raises:
        ResumeError: damaged, or its loading would run untrusted code.
    """
    try:
        entries = read_metadata(path).state_dict_metadata
    except Exception as error:
        raise ResumeError(f"resume: {path} is damaged: {first_line(error)}; give another checkpoint") from error
    state = {
        name.removeprefix("state_dict."): torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for name, entry in entries.items()
        if name.startswith("state_dict.") and isinstance(entry, TensorStorageMetadata)
    }
    meta = as_mapping(read_file(path / "meta.pt", trust, of=path, outline=outline), path)
    return {**meta, "state_dict": state, "optimizer_states": []}


def read_sharded(path: Path, trust: Trust | None = None) -> dict[str, Any]:
    """The content as Lightning would have saved it in one file. Raises as `read_sharded_outline`."""
    meta = as_mapping(read_file(path / "meta.pt", trust, of=path), path)
    values = read_all(path)
    optimizers = [to_plain_optimizer(values[key])[0] for key in sorted(values) if key.startswith("optimizer_")]
    return {**meta, "state_dict": values["state_dict"], "optimizer_states": optimizers}
