"""Checkpoints on disk: written atomically, with hashes that show damage.

Each checkpoint `x.ckpt`, a file or a directory, has a manifest `x.ckpt.manifest` with its step, and the size and
SHA-256 of each of its files. While a checkpoint is overwritten, the old one is on disk with the manifest of the new
one, so a manifest also contains the hashes of the checkpoint before.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from launcher.core.atomic_write import write_file
from launcher.core.errors import ResumeError
from launcher.process.activity import doing
from strategies.folder_save import replace_folder

MANIFEST_SUFFIX = ".manifest"
CHECKPOINT_PATTERN = "*.ckpt"
# Several readers get more from a disk, up to a limit.
_HASHED_AT_ONCE = 8


def manifest_path(checkpoint: Path) -> Path:
    """The path of a checkpoint's manifest."""
    return checkpoint.with_name(checkpoint.name + MANIFEST_SUFFIX)


def publish(temporary: Path, checkpoint: Path, step: int | None, *, with_manifest: bool = True) -> None:
    """Rename a complete checkpoint file on the same disk to its final name, replacing an older one.

    `step` is the number of optimizer steps if known. Without a manifest, as in a folder of the user, the folder gets
    the same files as with plain Lightning.

    Raises:
        OSError: the disk is full or read-only; the older checkpoint is kept.
    """
    write_manifest(temporary, checkpoint, step, with_manifest=with_manifest)
    _replace_by_file(temporary, checkpoint)
    _sync(checkpoint.parent)


def _replace_by_file(temporary: Path, checkpoint: Path) -> None:
    # A DeepSpeed folder of that name, if the run used DeepSpeed before.
    before = checkpoint.with_name(f"{checkpoint.stem}-before{checkpoint.suffix}") if checkpoint.is_dir() else None
    if before is not None:
        shutil.rmtree(before, ignore_errors=True)
        checkpoint.rename(before)
    temporary.replace(checkpoint)
    if before is not None:
        shutil.rmtree(before, ignore_errors=True)


def publish_again(checkpoint: Path, other: Path) -> None:
    """Give a complete checkpoint, a file or a directory, a second name in its folder, replacing an older one.

    Both share the files' content where the disk has hard links: a checkpoint is replaced, never changed.

    Raises:
        OSError: the disk is full or read-only; the older checkpoint is kept.
    """
    is_folder = checkpoint.is_dir()
    temporary = other.with_name(f".{other.name}.{'new' if is_folder else 'tmp'}")
    try:
        if is_folder:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.copytree(checkpoint, temporary, copy_function=_link)
        else:
            _link(checkpoint, temporary)
        manifest = _read_manifest(checkpoint)
        if manifest is not None:
            before = _read_manifest(other) or {}
            versions = [*manifest["versions"][:1], *before.get("versions", [])[:1]]
            _write_versions(other, manifest.get("step"), versions, checkpoint)
        if is_folder:
            replace_folder(temporary, other)
        else:
            _replace_by_file(temporary, other)
        _sync(other.parent)
    except BaseException:  # Ctrl-C too leaves no partial copy; raised on
        shutil.rmtree(temporary, ignore_errors=True) if is_folder else temporary.unlink(missing_ok=True)
        raise


def _link(source: str | Path, target: str | Path) -> None:
    Path(target).unlink(missing_ok=True)
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a disk without hard links, or too many of this file
        shutil.copy2(source, target)
        _sync(Path(target))


def write_manifest(temporary: Path, checkpoint: Path, step: int | None, *, with_manifest: bool = True) -> None:
    """Sync a complete checkpoint, a file or a directory, and write the manifest for its final name.

    Without a manifest, one of an older checkpoint is removed.
    """
    for file in _files(temporary):
        _sync(file)
    if not with_manifest:
        manifest_path(checkpoint).unlink(missing_ok=True)
        return
    before = _read_manifest(checkpoint) or {}
    versions = [{"files": _hashes(temporary)}, *before.get("versions", [])[:1]]
    _write_versions(checkpoint, step, versions, temporary)


def _write_versions(checkpoint: Path, step: Any, versions: list[Any], written: Path) -> None:
    write_file(manifest_path(checkpoint), json.dumps({"step": step, "versions": versions}) + "\n")
    # In a folder of the user, all users who may read the checkpoint may read its manifest too.
    manifest_path(checkpoint).chmod(stat.S_IMODE(written.stat().st_mode) & 0o666)


def remove_partial_checkpoints(folder: Path) -> None:
    """Remove what an interrupted save has left; complete checkpoints have other names."""
    for pattern in (".*.ckpt.tmp", ".*.ckpt.new"):
        for path in folder.glob(pattern):
            with contextlib.suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def read_step(checkpoint: Path) -> int | None:
    """The optimizer steps done at a checkpoint, from its manifest; None if not known."""
    try:
        step = (_read_manifest(checkpoint) or {}).get("step")
    except OSError:
        return None
    return step if isinstance(step, int) else None


def remove_checkpoint(checkpoint: Path) -> None:
    """Remove a checkpoint and its manifest."""
    if checkpoint.is_dir():
        shutil.rmtree(checkpoint)
    else:
        checkpoint.unlink(missing_ok=True)
    manifest_path(checkpoint).unlink(missing_ok=True)


def find_problem(checkpoint: Path) -> str | None:
    """Describe damage to a checkpoint's files; None if they are unchanged.

    A checkpoint without a manifest, as of another program, counts as valid.
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
        return f"{len(missing)} of its files are missing, such as {missing[0]}"
    changed = next((name for name, value in wanted.items() if found[name] != value), None)
    if changed is None:
        return "its manifest is damaged"
    (size, _), (now, _) = wanted[changed], found[changed]
    # In a checkpoint of one file, the file has no name.
    what = f"{changed} in it" if changed else "it"
    return f"{what} has {now} bytes of {size}" if size != now else f"{what} has changed (SHA-256 differs)"


def choose_checkpoint(folder: Path | None, last: str, explicit: Path | None) -> tuple[Path | None, tuple[str, ...]]:
    """Choose the checkpoint to resume from: one of the run's own, otherwise the explicit one that the user gave.

    Args:
        folder: checkpoints of the run; None ignores them.
        last: name of the checkpoint to try first.
        explicit: None without one.

    Returns:
        Its path, None for a fresh start; and a notice for each damaged checkpoint that was skipped.

    Raises:
        ResumeError: all checkpoints of the run are damaged, or the one that the user gave is.
    """
    found, skipped = (None, {}) if folder is None else newest_valid(folder, last)
    notices = tuple(f"checkpoint {path} is skipped: {problem}" for path, problem in skipped.items())
    if found is not None:
        return found, notices
    if explicit is None:
        if not notices:
            return None, ()
        listed = "\n".join(f"  {notice}" for notice in notices)
        raise ResumeError(
            f"no checkpoint in {folder} is valid:\n{listed}\n"
            "start a new run with another --name, or resume from another checkpoint: --resume PATH"
        )
    problem = find_problem(explicit)
    if problem is not None:
        raise ResumeError(
            f"resume: {explicit} is damaged: {problem}; give another checkpoint, or remove "
            f"{manifest_path(explicit)} if you changed the checkpoint yourself"
        )
    return explicit, notices


def newest_valid(folder: Path, last: str) -> tuple[Path | None, dict[Path, str]]:
    """The newest valid checkpoint, None without one, and the problems of those skipped; `last` is tried first."""
    skipped: dict[Path, str] = {}
    for checkpoint in candidates(folder, last):
        problem = find_problem(checkpoint)
        if problem is None:
            return checkpoint, skipped
        skipped[checkpoint] = problem
    return None, skipped


def candidates(folder: Path, last: str) -> list[Path]:
    """All checkpoints of a run in the order in which a resume tries them."""
    found = sorted(folder.glob(CHECKPOINT_PATTERN), key=lambda path: path.stat().st_mtime, reverse=True)
    return sorted(found, key=lambda path: path.name != last)


def _read_manifest(checkpoint: Path) -> dict[str, Any] | None:
    """The manifest; None without one. Invalid JSON counts as an empty manifest, which matches no checkpoint."""
    name = checkpoint.name
    if name.startswith("."):
        name = name.removeprefix(".").removesuffix(".old")
    try:
        values = json.loads(manifest_path(checkpoint.with_name(name)).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def _files(path: Path) -> Iterator[Path]:
    yield from sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _hashes(path: Path) -> dict[str, list[Any]]:
    """Size and SHA-256 of each file, by its relative path; in threads, as hashing releases the GIL."""
    files = list(_files(path))
    with ThreadPoolExecutor(min(len(files), _HASHED_AT_ONCE, len(os.sched_getaffinity(0))) or 1) as pool:
        hashes = list(pool.map(_size_and_hash, files))
    single = not path.is_dir()
    return {"" if single else str(file.relative_to(path)): found for file, found in zip(files, hashes, strict=True)}


def _size_and_hash(file: Path) -> list[Any]:
    status = file.stat()
    return [status.st_size, _sha256(file, status.st_size, status.st_mtime_ns, status.st_ino)]


# Unbounded: a sharded checkpoint has a few files of each rank, and all are checked again.
@cache
def _sha256(file: Path, size: int, changed: int, inode: int) -> str:
    """Hexadecimal digits; the other arguments make sure that a changed file is read again."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Wait until a file's content, or a directory's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
