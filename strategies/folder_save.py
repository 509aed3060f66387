"""Saves a checkpoint folder of several ranks under a temporary name, so that a kill leaves no partial checkpoint."""

from __future__ import annotations

import contextlib
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strategies.base import CheckpointHooks

if TYPE_CHECKING:
    from lightning.pytorch.strategies import ParallelStrategy


@contextlib.contextmanager
def saved_folder(
    strategy: ParallelStrategy, filepath: str | Path, checkpoint: Mapping[str, Any], hooks: CheckpointHooks | None
) -> Iterator[Path]:
    """A temporary folder for the files of all ranks, which gets the name `filepath` in the end. All ranks enter it."""
    path = Path(strategy.broadcast(str(filepath)))
    fresh = path.with_name(f".{path.name}.new")
    step = checkpoint.get("global_step")
    with contextlib.nullcontext() if hooks is None else hooks.writing(fresh):
        if strategy.is_global_zero:
            shutil.rmtree(fresh, ignore_errors=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            # As private as the folder it is in.
            fresh.mkdir(mode=stat.S_IMODE(path.parent.stat().st_mode))
        strategy.barrier()
        yield fresh
    strategy.barrier()
    if strategy.is_global_zero:
        if hooks is not None:
            hooks.on_written(fresh, path, step)
        replace_folder(fresh, path)
    strategy.barrier()


def replace_folder(fresh: Path, path: Path) -> None:
    """Replace a folder or a file by a folder; a valid checkpoint exists at every moment.

    Between the two renames it is `<name>-before.ckpt`, which a resume finds like any checkpoint.
    """
    before = path.with_name(f"{path.stem}-before{path.suffix}")
    if path.is_dir():
        shutil.rmtree(before, ignore_errors=True)
        path.rename(before)
    elif path.exists():
        path.rename(before)
    fresh.rename(path)
    if before.is_dir() and not before.is_symlink():
        shutil.rmtree(before, ignore_errors=True)
    else:
        before.unlink(missing_ok=True)
