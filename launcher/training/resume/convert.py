"""Consolidate a sharded checkpoint into one file on rank zero, for another strategy or for `launcher convert`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from launcher.checkpoint.export import save_private, save_safetensors, save_sharded_folder
from launcher.checkpoint.formats import format_of, format_written_by
from launcher.checkpoint.manifest import find_problem
from launcher.checkpoint.reader import CONSOLIDATED, Trust
from launcher.core.errors import LauncherError, ResumeError
from launcher.training.context import RunContext

# What `convert_checkpoint` writes: a state dict or all that Lightning saves, as one file or as a folder.
KINDS = ("weights", "safetensors", "lightning", "sharded")


@contextlib.contextmanager
def loadable_checkpoint(ctx: RunContext) -> Iterator[Path | None]:
    """The run's checkpoint in a form that the planned strategy can load; a consolidated file is removed afterwards.

    Every rank calls this, within the process group.

    Raises:
        ResumeError: the checkpoint cannot be consolidated.
    """
    resume, plan = ctx.run.resume_from, ctx.plan
    if resume is None:
        yield None
        return
    saved, planned = format_of(resume), format_written_by(plan.strategy.name)
    if saved.is_loadable(resume, planned, plan.deepspeed, plan.world_size):
        yield resume
        return
    source = saved.describe(resume)
    ctx.output.notice(f"{resume.name} was saved by {source}: it is consolidated for {plan.strategy.name}")
    consolidated, rank = ctx.run.path / CONSOLIDATED, ctx.topology.rank
    _on_rank_zero(rank, lambda: save_private(saved.read_consolidated(resume, ctx.trust), consolidated))
    try:
        yield consolidated
    finally:
        if rank == 0:
            consolidated.unlink(missing_ok=True)


def convert_checkpoint(source: Path, target: Path, kind: str = "weights", *, trusted: bool = False) -> int:
    """Write a checkpoint in another format, and return the number of weights.

    Args:
        source: a checkpoint of any strategy.
        target: the file or folder to write.
        kind: one of `KINDS`.
        trusted: whether loading may run code in the checkpoint; for the formats with all content.

    Raises:
        ResumeError: `source` is not a checkpoint, or `target` exists or cannot be written.
    """
    if not source.exists():
        raise ResumeError(f"convert: {source} does not exist; give the path of a checkpoint")
    if target.exists():
        raise ResumeError(f"convert: {target} exists already and is not overwritten; give another name")
    problem = find_problem(source)
    if problem is not None:
        raise ResumeError(f"convert: {source} is damaged: {problem}; give another checkpoint")
    try:
        content, state = _read(source, Trust(everywhere=trusted, has_all=True), kind)
    except ResumeError as error:
        raise ResumeError(str(error).replace("resume: ", "convert: ", 1)) from error
    try:
        if kind == "safetensors":
            return save_safetensors(state, target)
        if kind == "sharded":
            save_sharded_folder(content, target)
        else:
            save_private(dict(content if kind == "lightning" else state), target)
    except OSError as error:
        raise ResumeError(
            f"convert: {target} cannot be written: {error.strerror or error}; give another path"
        ) from error
    return len(state)


def _read(source: Path, trust: Trust, kind: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The content that a kind needs, and the weights; a file may be a state dict itself."""
    found = format_of(source)
    has_all = kind in ("lightning", "sharded")
    content = found.read_consolidated(source, trust) if has_all else {}
    state: Any = content.get("state_dict") if has_all else found.read_weights(source)
    if state is None and not source.is_dir() and kind != "lightning":
        content = found.read_consolidated(source)
        if content and all(isinstance(value, Tensor) for value in content.values()):
            state, content = content, {"state_dict": content}
    if not isinstance(state, Mapping):
        raise ResumeError(
            f"convert: {source} has no state_dict; give a checkpoint that Lightning or DeepSpeed wrote, or a file of "
            "`launcher convert` for another format of weights"
        )
    return content, state


def _on_rank_zero(rank: int, action: Callable[[], None]) -> None:
    """Run `action` on rank zero while the others wait; all ranks raise its error."""
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
