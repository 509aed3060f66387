"""Reads a checkpoint's files. Untrusted code runs only if this run wrote the file, or the user trusts it.

`hyper_parameters` and other values that a fit takes from its own objects never run code, even in a trusted file.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import stat
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from launcher.checkpoint.manifest import find_problem, manifest_path
from launcher.checkpoint.objects import Foreign, UnreadableError, make_objects
from launcher.checkpoint.pickle_nodes import NODES
from launcher.core.errors import ResumeError, first_line

# A checkpoint that was consolidated for this attempt, in the run directory.
CONSOLIDATED = ".resume-whole.ckpt"
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Trust:
    """Which checkpoints may run code when they are loaded: those that the run wrote, or all (`resume_trust`).

    The run's own checkpoints may run code only if no other user can write to the run directory. `has_all`: also objects
    that a fit does not need are created, as hyperparameters. `kept`: the folder of the states that survivors of this
    launch have saved.
    """

    run: Path | None = None
    everywhere: bool = False
    has_all: bool = False
    kept: Path | None = None

    def objection(self, checkpoint: Path, *, is_written: bool = True) -> str | None:
        """Why a checkpoint may not run code; None if it may. `is_written` is false before its manifest exists."""
        if self.everywhere:
            return None
        place = checkpoint.absolute()
        owns = (each.absolute() for each in (self.run, self.kept) if each is not None)
        run = next((each for each in owns if place.is_relative_to(each)), None)
        if run is None or ".." in place.parts:
            return "it is not one of this run's own checkpoints"
        try:
            folders = [run, *(run / part for part in reversed(place.relative_to(run).parents[:-1]))]
            for path in [*folders, *([place] if is_written else [])]:
                status = path.lstat()
                if stat.S_ISLNK(status.st_mode) or status.st_uid != os.geteuid():
                    return f"{path} is a link, or belongs to another user"
                if status.st_mode & (0o077 if path in folders else 0o022):
                    return f"other users have access to {path} (mode {stat.S_IMODE(status.st_mode):o}; chmod 700)"
            if not is_written or place == run / CONSOLIDATED:
                return None
            if not manifest_path(place).exists():
                return "it has no manifest, so its origin is not known"
        except OSError as error:
            return f"it cannot be read: {error.strerror or error}"
        return find_problem(place)


def read_file(
    file: Path | BinaryIO,
    trust: Trust | None,
    *,
    of: Path | None = None,
    map_location: Any = "cpu",
    mmap: bool = True,
    outline: bool = False,
) -> Any:
    """Read a file that `torch.save` has written.

    Args:
        file: its path, or an open file; `of` then names the checkpoint.
        trust: whether objects of classes other than torch's and plain values are created; None replaces them with
            `NotLoaded`.
        of: the checkpoint that the file is a part of; the file itself if not given.
        map_location: as for `torch.load`.
        mmap: whether the tensors stay on the disk.
        outline: only check whether these objects may be created, and replace them with `NotLoaded`.

    Raises:
        ResumeError: not a checkpoint, a damaged one, or one whose loading would run untrusted code.
    """
    checkpoint: Any = of or file
    try:
        loaded, is_tree = _load(file, map_location, mmap)
        if not is_tree:
            return loaded
        has_all = trust is not None and trust.has_all
        content, foreign = make_objects(loaded, trusted=False, has_all=has_all)
        if not foreign or trust is None:
            return content
        objection = trust.objection(checkpoint)
        if objection is not None:
            raise ResumeError(
                f"resume: {checkpoint} contains objects whose loading would run code: {list_objects(foreign)}; this is "
                f"allowed for a run's own checkpoints only, and {objection}; if you trust its author, give "
                "--resume-trust"
            )
        return content if outline else make_objects(loaded, trusted=True, has_all=has_all)[0]
    except ResumeError:
        raise
    except UnreadableError as error:
        raise ResumeError(
            f"resume: {checkpoint} contains an object that cannot be created again: {first_line(error)}; remove it "
            "from the checkpoint, or start a new run with another --name"
        ) from error
    except Exception as error:  # A damaged or malicious file may raise any error.
        raise ResumeError(
            f"resume: {checkpoint} is not a checkpoint, or is damaged: {first_line(error)}; give another checkpoint"
        ) from error


def foreign_objects(file: Path) -> tuple[Foreign, ...]:
    """The objects of a file that a fit needs and only untrusted code can create; any error if it is no checkpoint."""
    loaded, is_tree = _load(file, "cpu", mmap=True)
    return make_objects(loaded, trusted=False)[1] if is_tree else ()


@contextlib.contextmanager
def guarded_loads(checkpoint: Path, trust: Trust | None) -> Iterator[None]:
    """Replace `torch.load`, which DeepSpeed and torch's sharded checkpoints call for their files, by `read_file`."""

    def load(file: Any, map_location: Any = None, **_: Any) -> Any:
        opened = Path(file) if isinstance(file, str | os.PathLike) else file
        return read_file(opened, trust, of=checkpoint, map_location=map_location, mmap=False)

    before = torch.load
    torch.load = load
    try:
        yield
    finally:
        torch.load = before


def _load(file: Path | BinaryIO, map_location: Any, mmap: bool) -> tuple[Any, bool]:
    """The content and False if torch's `weights_only` loads it; otherwise the nodes of its pickle and True."""
    options = {"map_location": map_location, "mmap": mmap}
    try:
        return _torch_load(file, **options, weights_only=True), False
    except RuntimeError as error:
        if "mmap can only be used" in str(error):
            raise RuntimeError("it is not in the format that `torch.save` of torch 1.6 and later writes") from error
        raise
    except pickle.UnpicklingError:
        # Formats other than the current one of `torch.save` can only be unpickled.
        if not isinstance(file, Path):
            file.seek(0)
            file = io.BytesIO(file.read())
        if not _is_archive(file):
            raise
        if not isinstance(file, Path):
            file.seek(0)
        return _torch_load(file, **options, weights_only=False, pickle_module=NODES), True


# `guarded_loads` replaces it.
_torch_load = torch.load


def _is_archive(file: Path | BinaryIO) -> bool:
    if (isinstance(file, Path) and file.suffix == ".safetensors") or not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        names = [Path(name).name for name in archive.namelist()]
    # A TorchScript archive contains code that torch would run.
    return "data.pkl" in names and "constants.pkl" not in names


def list_objects(foreign: Sequence[Foreign]) -> str:
    """The first objects, and the number of the others."""
    more = f" and {len(foreign) - _SHOWN} more" if len(foreign) > _SHOWN else ""
    return ", ".join(map(str, foreign[:_SHOWN])) + more


def as_mapping(content: Any, path: Path) -> Mapping[str, Any]:
    """The content of a checkpoint; a `ResumeError` if it is not a mapping."""
    if not isinstance(content, dict):
        raise ResumeError(
            f"resume: {path} contains a {type(content).__name__}, not a Lightning checkpoint; give another one"
        )
    return content
