"""Checkpoints on disk: written whole or not at all, and known by their hashes, so that a damaged one is found.

Beside each checkpoint `x.ckpt`, a file or a directory, lies `x.ckpt.manifest`: its step, and the size and SHA-256 of
each of its files. A checkpoint that is overwritten is for a moment on disk with the next one's manifest, so a manifest
keeps what its checkpoint was before, too.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from launcher.core.atomic_write import write_file
from launcher.core.errors import ResumeError
from launcher.process.activity import doing

MANIFEST_SUFFIX = ".manifest"
CHECKPOINT_PATTERN = "*.ckpt"
# Disks give more to several readers, up to a point.
_HASHED_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class SkippedCheckpoint:
    """A checkpoint that cannot be resumed, and why."""

    path: Path
    reason: str


def manifest_of(checkpoint: Path) -> Path:
    """Where a checkpoint's manifest is."""
    return checkpoint.with_name(checkpoint.name + MANIFEST_SUFFIX)


def publish(temporary: Path, checkpoint: Path, step: int | None, *, with_manifest: bool = True) -> None:
    """Give a finished checkpoint of one file its name, in place of the one that has it.

    Args:
        temporary: the file, complete, on the same disk.
        checkpoint: its name.
        step: optimizer steps that it holds; None if not known.
        with_manifest: false in a folder of the user's, which holds what Lightning would put there.

    Raises:
        OSError: the disk is full or read-only; what had the name before has it still.
    """
    if with_manifest:
        note_hashes(temporary, checkpoint, step)
    else:
        _sync(temporary)
        manifest_of(checkpoint).unlink(missing_ok=True)
    # DeepSpeed's folder of that name, if the run has trained with another strategy before.
    before = checkpoint.with_name(f"{checkpoint.stem}-before{checkpoint.suffix}") if checkpoint.is_dir() else None
    if before is not None:
        shutil.rmtree(before, ignore_errors=True)
        checkpoint.rename(before)
    temporary.replace(checkpoint)
    _sync(checkpoint.parent)
    if before is not None:
        shutil.rmtree(before, ignore_errors=True)


def note_hashes(temporary: Path, checkpoint: Path, step: int | None) -> None:
    """Get a finished checkpoint, a file or a directory, onto the disk, and write the manifest for its name to be.

    Args:
        temporary: where it is.
        checkpoint: the name that it will have.
        step: optimizer steps that it holds; None if not known.
    """
    for file in _files(temporary):
        _sync(file)
    before = _read_manifest(checkpoint) or {}
    versions = [{"files": _hashes(temporary)}, *before.get("versions", [])[:1]]
    write_file(manifest_of(checkpoint), json.dumps({"step": step, "versions": versions}) + "\n")
    # Whoever may read a checkpoint in a folder of the user's may check it, too.
    manifest_of(checkpoint).chmod(stat.S_IMODE(temporary.stat().st_mode) & 0o666)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint and its manifest."""
    if checkpoint.is_dir():
        shutil.rmtree(checkpoint)
    else:
        checkpoint.unlink(missing_ok=True)
    manifest_of(checkpoint).unlink(missing_ok=True)


def problem_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files; None if they are as they were written.

    One without a manifest is another program's, or older: nothing is known against it.
    """
    try:
        manifest = _read_manifest(checkpoint)
        if manifest is None:
            return None
        with doing(f"checking the hashes of {checkpoint}"):
            found = _hashes(checkpoint)
    except OSError as error:
        return f"it cannot be read: {error.strerror or error}"
    versions = [version.get("files") for version in manifest.get("versions", [])]
    if found in versions:
        return None
    wanted = versions[0] if versions and isinstance(versions[0], dict) else {}
    missing = sorted(set(wanted) - set(found))
    if missing:
        return f"{len(missing)} of its files are missing, as {missing[0]}"
    changed = next((name for name, value in wanted.items() if found[name] != value), None)
    if changed is None:
        return "its manifest is damaged"
    (size, _), (now, _) = wanted[changed], found[changed]
    # A checkpoint of one file has no name inside.
    what = f"{changed} in it" if changed else "it"
    return f"{what} has {now} bytes of {size}" if size != now else f"{what} is not what was written (SHA-256 differs)"


def choose_checkpoint(folder: Path | None, last: str, explicit: Path | None) -> tuple[Path | None, tuple[str, ...]]:
    """What to go on from.

    Args:
        folder: of a run whose own checkpoints come first, None to leave them out.
        last: name of the one that is looked at first.
        explicit: the checkpoint that was asked for, None if none was.

    Returns:
        Its path, None for a fresh start; and a notice for each damaged one that was skipped.

    Raises:
        ResumeError: the run's checkpoints are all damaged, or the one that was asked for is.
    """
    found, passed = (None, ()) if folder is None else newest_valid(folder, last)
    notices = tuple(f"checkpoint {damaged.path} is skipped: {damaged.reason}" for damaged in passed)
    if found is not None:
        return found, notices
    if explicit is None:
        if not notices:
            return None, ()
        listed = "\n".join(f"  {notice}" for notice in notices)
        raise ResumeError(
            f"no checkpoint in {folder} is whole:\n{listed}\n"
            "start again under another --name, or from a checkpoint elsewhere: --resume PATH"
        )
    problem = problem_of(explicit)
    if problem is not None:
        raise ResumeError(
            f"resume: {explicit} is damaged: {problem}; give another checkpoint, or remove "
            f"{manifest_of(explicit)} if you have changed it yourself"
        )
    return explicit, notices


def newest_valid(folder: Path, last: str) -> tuple[Path | None, tuple[SkippedCheckpoint, ...]]:
    """The checkpoint to go on from: `last`, else the newest one that is whole.

    Returns:
        Its path, None if there is none; and the damaged ones that were skipped on the way.
    """
    passed: list[SkippedCheckpoint] = []
    for checkpoint in candidates(folder, last):
        problem = problem_of(checkpoint)
        if problem is None:
            return checkpoint, tuple(passed)
        passed.append(SkippedCheckpoint(checkpoint, problem))
    return None, tuple(passed)


def candidates(folder: Path, last: str) -> list[Path]:
    """All checkpoints of a run, the one to go on from first."""
    found = sorted(folder.glob(CHECKPOINT_PATTERN), key=lambda path: path.stat().st_mtime, reverse=True)
    return sorted(found, key=lambda path: path.name != last)


def _read_manifest(checkpoint: Path) -> dict[str, Any] | None:
    """The manifest; None without one. One that is no JSON counts as empty, and nothing fits it."""
    name = (
        checkpoint.name.removeprefix(".").removesuffix(".old") if checkpoint.name.startswith(".") else checkpoint.name
    )
    try:
        values = json.loads(manifest_of(checkpoint.with_name(name)).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def _files(path: Path) -> Iterator[Path]:
    yield from sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _hashes(path: Path) -> dict[str, list[Any]]:
    """Size and SHA-256 of each file, by its path inside; several files at once, as hashing leaves other threads run."""
    files = list(_files(path))
    with ThreadPoolExecutor(min(len(files), _HASHED_AT_ONCE, len(os.sched_getaffinity(0))) or 1) as pool:
        hashes = list(pool.map(_size_and_hash, files))
    single = not path.is_dir()
    return {"" if single else str(file.relative_to(path)): found for file, found in zip(files, hashes, strict=True)}


def _size_and_hash(file: Path) -> list[Any]:
    status = file.stat()
    return [status.st_size, _sha256(file, status.st_size, status.st_mtime_ns, status.st_ino)]


# Without a bound: a sharded checkpoint has a few files of each rank, and all are looked at again.
@cache
def _sha256(file: Path, size: int, changed: int, inode: int) -> str:
    """Hexadecimal digits; a file that has not changed is read once."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Wait until a file's content, or a directory's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
