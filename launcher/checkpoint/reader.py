"""Reads a checkpoint's files. Code from outside runs only if this run has written the file, or the user trusts it.

`hyper_parameters` and what else a fit takes from its own objects never runs anything, wherever the file is from.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import stat
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from launcher.checkpoint.manifest import manifest_of, problem_of
from launcher.checkpoint.objects import Foreign, UnreadableError, make_objects
from launcher.checkpoint.pickle_nodes import NODES
from launcher.core.errors import ResumeError

# A checkpoint that was put together for this attempt, in the run's directory.
CONSOLIDATED = ".resume-whole.ckpt"
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Trust:
    """Which checkpoints may run code when they are loaded.

    Attributes:
        run: directory of the run; what it has written itself may, if nobody else can write there.
        everywhere: whether all may (`resume_trust`).
    """

    run: Path | None = None
    everywhere: bool = False

    def objection(self, checkpoint: Path, *, is_written: bool = True) -> str | None:
        """Why a checkpoint may not run code; None if it may.

        Args:
            checkpoint: its path.
            is_written: false for one whose manifest is still to be written.
        """
        if self.everywhere:
            return None
        place, run = checkpoint.absolute(), None if self.run is None else self.run.absolute()
        if run is None or not place.is_relative_to(run) or ".." in place.parts:
            return "it is not one of this run's own checkpoints"
        try:
            folders = [run, *(run / part for part in reversed(place.relative_to(run).parents[:-1]))]
            for path in [*folders, *([place] if is_written else [])]:
                status = path.lstat()
                if stat.S_ISLNK(status.st_mode) or status.st_uid != os.geteuid():
                    return f"{path} is a link, or belongs to somebody else"
                if status.st_mode & (0o077 if path in folders else 0o022):
                    return f"others can get at {path} (mode {stat.S_IMODE(status.st_mode):o}; chmod 700)"
            if not is_written or place == run / CONSOLIDATED:
                return None
            if not manifest_of(place).exists():
                return "it has no manifest, so it is not known who has written it"
        except OSError as error:
            return f"it cannot be looked at: {error.strerror or error}"
        return problem_of(place)


def read_file(
    file: Path,
    trust: Trust | None,
    *,
    of: Path | None = None,
    map_location: Any = "cpu",
    mmap: bool = True,
    outline: bool = False,
) -> Any:
    """What is in a file that `torch.save` has written.

    Args:
        file: it.
        trust: whether objects of other classes than torch's and plain values are made; None leaves `NotLoaded` in
            their places.
        of: the checkpoint that the file is a part of; itself if not given.
        map_location: as for `torch.load`.
        mmap: whether the tensors stay on the disk.
        outline: only look whether the objects might be made, and leave `NotLoaded` in their places.

    Raises:
        ResumeError: no checkpoint, a damaged one, or one whose loading would run code that nobody trusts.
    """
    checkpoint = of or file
    try:
        tree = _load(file, map_location, mmap)
        if not isinstance(tree, _Tree):
            return tree
        content, foreign = make_objects(tree.root, trusted=False)
        if not foreign or trust is None:
            return content
        objection = trust.objection(checkpoint)
        if objection is not None:
            raise _refusal(checkpoint, foreign, objection)
        return content if outline else make_objects(tree.root, trusted=True)[0]
    except ResumeError:
        raise
    except UnreadableError as error:
        raise ResumeError(
            f"resume: {checkpoint} holds an object that cannot be made again: {plain(error)}; keep it out of the "
            "checkpoint, or start again under another --name"
        ) from error
    except Exception as error:  # What a damaged file, or one that was made to do harm, raises cannot be listed.
        raise ResumeError(
            f"resume: {checkpoint} is no checkpoint, or is damaged: {plain(error)}; give another checkpoint"
        ) from error


def foreign_objects(file: Path) -> tuple[Foreign, ...]:
    """The objects of a file that only code from outside can make and that a fit needs.

    Raises:
        Exception: whatever a file that is no checkpoint raises.
    """
    tree = _load(file, "cpu", mmap=True)
    return make_objects(tree.root, trusted=False)[1] if isinstance(tree, _Tree) else ()


@contextlib.contextmanager
def guarded_loads(checkpoint: Path, trust: Trust | None) -> Iterator[None]:
    """Every `torch.load` within reads a part of a checkpoint as `read_file` does: DeepSpeed's own, which unpickle."""

    def load(file: Any, map_location: Any = None, **_: Any) -> Any:
        return read_file(Path(file), trust, of=checkpoint, map_location=map_location, mmap=False)

    before = torch.load
    torch.load = load
    try:
        yield
    finally:
        torch.load = before


def plain(error: BaseException) -> str:
    """The first line of an error's text, without the codes for terminals that torch puts into it."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    return text.splitlines()[0] if text else type(error).__name__


@dataclass(frozen=True, slots=True)
class _Tree:
    root: Any


def _load(file: Path, map_location: Any, mmap: bool) -> Any:
    """The content if torch itself takes it for safe; else the nodes of its pickle."""
    try:
        return _torch_load(file, map_location=map_location, mmap=mmap, weights_only=True)
    except pickle.UnpicklingError:
        # Other formats than `torch.save`'s of today have no way but to be unpickled.
        if not _is_archive(file):
            raise
        return _Tree(_torch_load(file, map_location=map_location, mmap=mmap, weights_only=False, pickle_module=NODES))


# `guarded_loads` puts another in its place.
_torch_load = torch.load


def _is_archive(file: Path) -> bool:
    if file.suffix == ".safetensors" or not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        names = [Path(name).name for name in archive.namelist()]
    # TorchScript's, which torch would run.
    return "data.pkl" in names and "constants.pkl" not in names


def _refusal(checkpoint: Path, foreign: Sequence[Foreign], objection: str) -> ResumeError:
    return ResumeError(
        f"resume: {checkpoint} holds objects whose loading would run code: {listed(foreign)}; this is done for a run's "
        f"own checkpoints only, and {objection}; if you trust who has written it: --resume-trust"
    )


def listed(foreign: Sequence[Foreign]) -> str:
    """The first of the objects, and how many more there are."""
    more = f" and {len(foreign) - _SHOWN} more" if len(foreign) > _SHOWN else ""
    return ", ".join(map(str, foreign[:_SHOWN])) + more


def as_mapping(content: Any, path: Path) -> Mapping[str, Any]:
    """The content of a checkpoint.

    Raises:
        ResumeError: it is no mapping.
    """
    if not isinstance(content, dict):
        raise ResumeError(f"resume: {path} holds a {type(content).__name__}, no Lightning checkpoint; give another one")
    return content
