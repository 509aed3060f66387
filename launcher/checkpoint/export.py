"""Writes the content of a checkpoint in a format that other programs read."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launcher.checkpoint.sharded import write_sharded
from launcher.core.atomic_write import replace_file


def save_private(content: Any, path: Path) -> None:
    """`torch.save` to a file of mode 0600, atomically."""
    with replace_file(path) as file:
        torch.save(content, file)


def save_safetensors(state: Mapping[str, Any], path: Path) -> int:
    """Write the tensors of a state dict to a safetensors file, and return their number; other values are left out.

    The format has no tensors that share memory, such as tied weights: each name gets a copy.
    """
    from safetensors.torch import save_file

    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            continue
        storage = value.untyped_storage()
        is_own = storage.data_ptr() not in seen and storage.nbytes() == value.nbytes
        seen.add(storage.data_ptr())
        tensors[name] = value.detach().contiguous() if is_own else value.detach().clone().contiguous()

    def write(temporary: Path) -> None:
        with temporary.open("xb", opener=_private):
            pass
        save_file(tensors, temporary, metadata={"format": "pt"})
        temporary.chmod(0o600)

    _write_and_rename(path, write)
    return len(tensors)


def save_sharded_folder(content: Mapping[str, Any], path: Path) -> None:
    """Write a folder of torch's distributed checkpoints, atomically."""
    _write_and_rename(path, lambda temporary: write_sharded(content, temporary))


def _write_and_rename(path: Path, write: Callable[[Path], Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        write(temporary)
        temporary.rename(path)
    except BaseException:  # Ctrl-C too leaves no partial file
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        raise


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)
