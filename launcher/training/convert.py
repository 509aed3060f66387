"""A checkpoint of one strategy made loadable by another: put together into one file, on rank zero."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launcher.checkpoint.formats import format_of, format_written_by
from launcher.checkpoint.reader import PUT_TOGETHER, Trust
from launcher.core.atomic_write import replace_file
from launcher.core.errors import LauncherError, ResumeError
from launcher.planning.plan import Plan
from launcher.runs.directory import RunDirectory


@contextlib.contextmanager
def loadable_checkpoint(
    resume: Path | None, plan: Plan, run: RunDirectory, rank: int, notice: Callable[[str], None], trust: Trust
) -> Iterator[Path | None]:
    """The checkpoint as the planned strategy can load it; a file that had to be made for it is gone afterwards.

    Every rank calls it, with the process group there.

    Args:
        resume: what to go on from.
        plan: strategy, ranks and DeepSpeed config of this run.
        run: where a file is made.
        rank: this rank.
        notice: told of a change.
        trust: which checkpoints may run code when they are loaded.

    Raises:
        ResumeError: the pieces cannot be put together.
    """
    if resume is None:
        yield resume
        return
    saved, planned = format_of(resume), format_written_by(plan.strategy.name)
    if saved.is_loadable(resume, planned, plan.deepspeed, plan.world_size):
        yield resume
        return
    notice(f"{resume.name} was saved by {saved.describe(resume)}: it is put together for {plan.strategy.name}")
    whole = run.path / PUT_TOGETHER
    _on_rank_zero(rank, lambda: save_private(saved.read_consolidated(resume, trust), whole))
    try:
        yield whole
    finally:
        if rank == 0:
            whole.unlink(missing_ok=True)


def convert_checkpoint(source: Path, target: Path) -> int:
    """Write a checkpoint's weights as one plain state dict, loadable with `weights_only` and without this program.

    Args:
        source: a checkpoint of any strategy.
        target: the file to write; it must not exist.

    Returns:
        The number of tensors.

    Raises:
        ResumeError: `source` is no checkpoint, or `target` exists or cannot be written.
    """
    if not source.exists():
        raise ResumeError(f"convert: {source} does not exist; give the path of a checkpoint")
    if target.exists():
        raise ResumeError(f"convert: {target} exists already, and is left alone; give another name")
    content = format_of(source).read_consolidated(source)
    state: Any = content.get("state_dict")
    if not isinstance(state, Mapping):
        raise ResumeError(f"convert: {source} has no state_dict; give a checkpoint that Lightning or DeepSpeed wrote")
    try:
        save_private(dict(state), target)
    except OSError as error:
        raise ResumeError(
            f"convert: {target} cannot be written: {error.strerror or error}; give another place"
        ) from error
    return len(state)


def save_private(content: Any, path: Path) -> None:
    """`torch.save` to a file of mode 0600, whole or not at all."""
    with replace_file(path) as file:
        torch.save(content, file)


def _on_rank_zero(rank: int, action: Callable[[], None]) -> None:
    """Rank zero acts while the others wait, and its error is everybody's."""
    failure: list[str | None] = [None]
    if rank == 0:
        try:
            action()
        except (LauncherError, OSError) as error:
            failure = [str(error)]
    if dist.is_initialized():
        dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise ResumeError(failure[0])
