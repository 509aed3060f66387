"""Writes the content of a checkpoint in a format that other programs read."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launcher.checkpoint.sharded import write_sharded
from launcher.core.atomic_write import private_umask, replace_file


def save_private(content: Any, path: Path) -> None:
    """`torch.save` to a file of mode 0600, atomically."""
    with replace_file(path) as file:
        torch.save(content, file)


def save_safetensors(state: Mapping[str, Any], path: Path) -> int:
    """Write the tensors of a state dict to a safetensors file, and return their number; other values are left out.

    The format has no tensors that share memory, such as tied weights: each name gets a copy.

    Raises:
        OSError: it cannot be written.
    """
    from safetensors import SafetensorError
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

    with private_umask(), _disk_errors(SafetensorError):
        _write_and_rename(path, lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"}))
    return len(tensors)


def save_sharded_folder(content: Mapping[str, Any], path: Path) -> None:
    """Write a folder of torch's distributed checkpoints, atomically."""
    with private_umask():
        _write_and_rename(path, lambda temporary: write_sharded(content, temporary))


@contextlib.contextmanager
def _disk_errors(kind: type[Exception]) -> Iterator[None]:
    """Raise an `OSError` in place of a library's own error of a write."""
    try:
        yield
    except kind as error:
        raise OSError(str(error)) from error


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
