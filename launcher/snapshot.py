"""The code as it is when a job is submitted, so that later edits don't reach a job that waits."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from launcher.errors import QueueError

# A repository larger than this holds data, not code.
_MOST_BYTES = 500_000_000


def take_snapshot(cwd: Path, folder: Path, leave_out: Path) -> Path | None:
    """Copy what git knows or would take, as it is on disk now; what git ignores (data, `.env`) is linked, not copied.

    submitit's `RsyncSnapshot` takes checked-in files alone, and needs rsync; a file that is not added yet would be
    missing on the nodes.

    Args:
        cwd: where the run is submitted.
        folder: to make; on a disk that the nodes share.
        leave_out: folder of the runs, which is not code.

    Returns:
        The folder in the copy that `cwd` is in the original; None if `cwd` is in no git repository.

    Raises:
        QueueError: the repository is too large, or the disk full.
    """
    if shutil.which("git") is None:
        return None
    asked = _git(cwd, "rev-parse", "--show-toplevel")
    if asked is None:
        return None
    root = Path(os.fsdecode(asked).rstrip("\n"))
    listed = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard") or b""
    try:
        _copy(root, folder, [os.fsdecode(name) for name in listed.split(b"\0") if name], leave_out)
        here = folder / cwd.resolve().relative_to(root.resolve())
        here.mkdir(parents=True, exist_ok=True)
        for original, copy in {root: folder, cwd: here}.items():
            _link_the_rest(original, copy, leave_out)
    except OSError as error:
        raise QueueError(
            f"the code cannot be copied to {folder}: {error.strerror or error}; make space, or use --no-snapshot"
        ) from error
    return here


def _copy(root: Path, folder: Path, names: list[str], leave_out: Path) -> None:
    total = 0
    for name in dict.fromkeys(names):
        source = root / name
        # A deleted file that is not committed yet, or a submodule.
        if not (source.is_file() or source.is_symlink()) or source.is_relative_to(leave_out):
            continue
        total += source.lstat().st_size
        if total > _MOST_BYTES:
            raise QueueError(
                f"{root} has more than {_MOST_BYTES // 1_000_000} MB that git does not ignore; add its data to "
                ".gitignore, or use --no-snapshot"
            )
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target, follow_symlinks=False)


def _link_the_rest(original: Path, copy: Path, leave_out: Path) -> None:
    """Relative paths to data must hold in the copy too."""
    for entry in original.iterdir():
        target = copy / entry.name
        if entry.name in (".git", "__pycache__") or entry == leave_out or target.exists() or target.is_symlink():
            continue
        target.symlink_to(entry)


def _git(cwd: Path, *words: str) -> bytes | None:
    done = subprocess.run(["git", *words], cwd=cwd, capture_output=True, check=False)  # noqa: S607 -- git is on PATH
    return done.stdout if done.returncode == 0 else None
