"""Disks that cannot be written: a full disk, a quota, a read-only disk or missing rights, as one `StorageError`."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launcher.checkpoint.snapshot import Snapshot
from launcher.core.errors import StorageError, TrainingError
from strategies.units import format_bytes

_REASONS = {
    errno.ENOSPC: "disk_full",
    errno.EDQUOT: "quota",
    errno.EFBIG: "quota",
    errno.EROFS: "read_only",
    errno.EACCES: "no_permission",
    errno.EPERM: "no_permission",
}
# A disk with less free space counts as full.
_FULL_BELOW = 1 << 20
_torch_save: Any = torch.save


def save_to_file(content: Any, path: Path, opener: Callable[[str, int], int] | None = None, **options: Any) -> None:
    """Write `content`, maybe a `Snapshot`, with `torch.save` to a new file; `options` are for it.

    Raises:
        StorageError: the disk is full or not writable; the partial file is removed.
        TrainingError: names a part of `content` that cannot be pickled.
    """
    try:
        with open(path, "wb", opener=opener) as file:
            _save_to_stream(content, file, **options)
    except BaseException as error:  # Ctrl-C too leaves no partial file; raised on
        path.unlink(missing_ok=True)
        explain_unsaveable(error, content)
        explained = explain_os_error(error, path.parent, lambda: measure_size(content))
        if explained is None:
            raise
        raise explained from error


def explain_unsaveable(error: BaseException, content: Any) -> None:
    """Raise a `TrainingError` that names the part of `content` because of which it cannot be pickled, if one is."""
    if isinstance(error, pickle.PicklingError | AttributeError | TypeError) and (found := find_unsaveable(content)):
        raise TrainingError(
            f"the checkpoint cannot be saved: {found}: {error}; remove this object from the state"
        ) from error


def find_unsaveable(value: Any, key: str = "") -> str | None:
    """Key and class of the first part of a checkpoint that cannot be pickled, such as a lambda; None without one."""
    if isinstance(value, Tensor):
        return None
    if isinstance(value, Mapping | list | tuple):
        parts: Iterable[tuple[Any, Any]] = value.items() if isinstance(value, Mapping) else enumerate(value)
        found = (find_unsaveable(part, f"{key}.{name}" if key else str(name)) for name, part in parts)
        return next((text for text in found if text is not None), None)
    try:
        pickle.dumps(value, protocol=2)
    except Exception:  # noqa: BLE001 -- its class may raise any error
        return f"{key} ({type(value).__module__}.{type(value).__qualname__})"
    return None


def _save_to_stream(content: Any, file: Any, **options: Any) -> None:
    writer = _RecordingWriter(file)
    try:
        _dump(content, writer, **options)
    except RuntimeError as error:
        # torch's C++ code replaces the error of the disk by an assertion about its own counters.
        raise error if writer.error is None else writer.error from error


def _dump(content: Any, file: Any, **options: Any) -> None:
    if isinstance(content, Snapshot):
        content.write(file)
    else:
        _torch_save(content, file, **options)


@contextlib.contextmanager
def explained_saves(checkpoint: Path) -> Iterator[None]:
    """Replace `torch.save`, which is called for the files of a checkpoint's folder, by `save_to_file`.

    Raises:
        StorageError: the disk is full or not writable, with the bytes that this rank writes; the folder is removed.
    """
    written: list[int] = []

    def save(content: Any, file: Any, **options: Any) -> None:
        if isinstance(file, str | os.PathLike):
            save_to_file(content, Path(file), **options)
            written.append(Path(file).stat().st_size)
        else:
            _save_to_stream(content, file, **options)

    torch.save = save
    try:
        with explained_writes(checkpoint.parent):
            yield
    except StorageError as error:
        shutil.rmtree(checkpoint, ignore_errors=True)
        # As if this rank had not begun; the other ranks need space too.
        needed = None if error.needed_bytes is None else error.needed_bytes + sum(written)
        free = None if error.free_bytes is None else error.free_bytes + sum(written)
        raise _make_error(error.reason, checkpoint.parent, needed, free) from error
    except BaseException:  # Ctrl-C too leaves no partial folder
        shutil.rmtree(checkpoint, ignore_errors=True)
        raise
    finally:
        torch.save = _torch_save


@contextlib.contextmanager
def explained_writes(folder: Path) -> Iterator[None]:
    """Raise a `StorageError` for an error of the disk while files in `folder` are written."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        explained = explain_os_error(error, folder)
        if explained is None:
            raise
        raise explained from error


def explain_os_error(
    error: BaseException, folder: Path, measure: Callable[[], int | None] = lambda: None
) -> StorageError | None:
    """The error to raise if a disk is the cause of `error`; None otherwise. `measure` returns the needed bytes."""
    found = _find_os_error(error)
    if found is None or found.errno is None:
        return None
    reason, needed = _REASONS[found.errno], measure()
    return _make_error(reason, folder, needed, _free_bytes(folder) if reason == "disk_full" else None)


def explain_any_os_error(error: BaseException, run: Path) -> StorageError | None:
    """As `explain_os_error`, for code that may write anywhere, such as a logger; rights only count in the run."""
    found = _find_os_error(error)
    if found is None or found.errno is None:
        return None
    reason = _REASONS[found.errno]
    file = Path(os.fsdecode(found.filename)).absolute() if isinstance(found.filename, str | bytes) else None
    if reason == "no_permission" and (file is None or not file.is_relative_to(run)):
        return None
    folder = _find_full_disk(run) if file is None else file.parent
    if folder is None:
        # The traceback, which is printed too, shows what was written.
        text = _describe(reason, Path("the disk of a logger or of another file"), None, None)
        return StorageError(text, reason=reason)
    return explain_os_error(found, folder)


def measure_size(content: Any) -> int | None:
    """The bytes that `torch.save` writes for `content`; None if it cannot be saved."""
    counter = _CountingWriter()
    try:
        _dump(content, counter)
    except Exception:  # noqa: BLE001 -- only for the text of another error
        return None
    return counter.size


def _find_os_error(error: BaseException | None) -> OSError | None:
    """The first error of a disk in a chain of causes."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in _REASONS:
            return error
        error = error.__cause__ or error.__context__
    return None


def _make_error(reason: str, folder: Path, needed: int | None, free: int | None) -> StorageError:
    text = _describe(reason, folder, needed, free)
    return StorageError(text, reason=reason, folder=str(folder), needed_bytes=needed, free_bytes=free)


def _describe(reason: str, folder: Path, needed: int | None, free: int | None) -> str:
    size = "" if needed is None else f": {format_bytes(needed)} needed"
    if reason == "disk_full":
        if free is not None and free > max(needed or 0, _FULL_BELOW) and _has_no_inode(folder):
            return f"no space left on {folder}: the disk has no free inode for another file"
        have = "" if free is None else f"{', ' if size else ': '}{format_bytes(free)} free"
        return f"no space left on {folder}{size}{have}"
    if reason == "quota":
        return f"the disk quota or the limit of a file's size is reached in {folder}{size}"
    if reason == "read_only":
        return f"{folder} is on a read-only disk{size}"
    return f"no permission to write in {folder}{size}"


def _free_bytes(folder: Path) -> int | None:
    with contextlib.suppress(OSError):
        return shutil.disk_usage(folder).free
    return None


def _has_no_inode(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        status = os.statvfs(folder)
        return status.f_files > 0 and status.f_favail == 0
    return False


def _find_full_disk(run: Path) -> Path | None:
    """The folder that the error of a write without a file name is about."""
    candidates = [folder for folder in (run, Path(tempfile.gettempdir()), Path.cwd()) if folder.exists()]
    free = {folder: _free_bytes(folder) for folder in candidates}
    full = [folder for folder, size in free.items() if size is not None and size < _FULL_BELOW]
    return next(iter(full), None)


class _RecordingWriter:
    """A file that keeps the error of a write, which torch's C++ code replaces."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


class _CountingWriter:
    """Counts bytes and keeps none."""

    def __init__(self) -> None:
        self.size = 0

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self.size += size
        return size

    def flush(self) -> None:
        pass
