"""The code as it is when a job is submitted, so that later edits don't reach a job that waits."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from launcher.core.errors import QueueError
from launcher.jobs.secret_files import secrets_in

# A repository larger than this holds data, not code.
_MOST_BYTES = 500_000_000
# A folder without code and with more ignored entries is one of data, in which git knows a file or two.
_MOST_LINKS = 1000


def take_snapshot(cwd: Path, folder: Path, leave_out: Path) -> Path | None:
    """Copy what git knows or would take, as it is on disk now, submodules too.

    What git ignores is linked, not copied, and so are files with secrets.

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
    # As git writes its folder: without links above it.
    leave_out = leave_out.parent.resolve() / leave_out.name
    try:
        _copy(root, folder, _listed(root), leave_out)
        here = folder / cwd.resolve().relative_to(root.resolve())
        here.mkdir(parents=True, exist_ok=True)
        _link_the_rest(root, folder, here, leave_out)
    except OSError as error:
        raise QueueError(
            f"the code cannot be copied to {folder}: {error.filename or folder}: {error.strerror or error}; make "
            "space, or that file readable, or use --no-snapshot"
        ) from error
    return here


def _listed(root: Path, prefix: str = "") -> list[str]:
    """Files that git knows or would take, those of submodules and of repositories inside too."""
    listed = _git(root / prefix, "ls-files", "-z", "--cached", "--others", "--exclude-standard") or b""
    names: list[str] = []
    for name in dict.fromkeys(prefix + os.fsdecode(each) for each in listed.split(b"\0") if each):
        inner = root / name
        if inner.is_dir() and not inner.is_symlink():
            # Of a submodule that is not checked out there are no files.
            names += _listed(root, f"{name.rstrip('/')}/") if (inner / ".git").exists() else []
        else:
            names.append(name)
    return names


def _copy(root: Path, folder: Path, names: list[str], leave_out: Path) -> None:
    total = 0
    for name in names:
        source = root / name
        # A deleted file that is not committed yet.
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
        if source.is_symlink():
            target.symlink_to(_same_place(source, root, folder, leave_out))
        elif secrets := secrets_in(source):
            sys.stderr.write(
                f"notice: {name} holds a secret ({secrets[0]}): the job gets it as a link, not as a copy\n"
            )
            target.symlink_to(source)
        else:
            shutil.copy2(source, target, follow_symlinks=False)


def _same_place(link: Path, root: Path, folder: Path, leave_out: Path) -> Path:
    """Where a link of the original leads in the copy; out of the code, to where it led."""
    to = link.readlink()
    place = Path(os.path.normpath(link.parent / to))
    if not place.is_relative_to(root) or place.is_relative_to(leave_out):
        return place
    return folder / place.relative_to(root) if to.is_absolute() else to


def _link_the_rest(root: Path, folder: Path, here: Path, leave_out: Path) -> None:
    """What git ignores, at any depth: compiled modules, generated files and data must be found in the copy too."""
    for parent, folders, _ in os.walk(folder):
        copy = Path(parent)
        original = root / copy.relative_to(folder)
        missing = [entry for entry in original.iterdir() if _is_missing(entry, copy, leave_out)]
        if len(missing) > _MOST_LINKS and not here.is_relative_to(copy) and not any(copy.rglob("*.py")):
            sys.stderr.write(
                f"notice: {original} has {len(missing)} entries that git ignores: the job gets that folder as a "
                "link, so later edits in it reach the job\n"
            )
            shutil.rmtree(copy)
            copy.symlink_to(original)
            folders.clear()
            continue
        for entry in missing:
            (copy / entry.name).symlink_to(entry)


def _is_missing(entry: Path, copy: Path, leave_out: Path) -> bool:
    is_code = entry.name not in (".git", "__pycache__") and entry != leave_out
    return is_code and not os.path.lexists(copy / entry.name)


def _git(cwd: Path, *words: str) -> bytes | None:
    done = subprocess.run(["git", *words], cwd=cwd, capture_output=True, check=False)  # noqa: S607 -- git is on PATH
    return done.stdout if done.returncode == 0 else None
