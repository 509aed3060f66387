"""The lock of a run directory: a file with a record of the owner, which the next owner can check.

Each owner has a number and a file `.lock-<number>`, which is created exclusively: of several processes that take over
from the same owner one succeeds, even on a disk without locks. The owner with the largest number is the current one.
Its file is never removed, only marked as released, so that no number is used twice.

Whether an owner still runs is decided from its process if that is visible from here, otherwise by the kernel's lock
(`flock`) on its file, unless the disk has no locks. The package filelock does not fit: it keeps no record of the owner,
and cannot decide on a disk without locks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from launcher.process.background import is_running, start_time

_NAME = re.compile(r"\.lock-(\d+)")
# A disk without locks: Lustre mounted without flock, NFS without a lock service, some FUSE file systems.
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}
# Seconds after which the writer of an incomplete record counts as dead.
_WRITTEN_WITHIN = 60.0
# A reader holds the lock briefly.
_LOCK_TRIES = 50
_LOCK_PAUSE = 0.01

State = Literal["ended", "running", "unknown"]


@dataclass(frozen=True, slots=True)
class Owner:
    """The process that owns a run's directory, as recorded.

    Attributes:
        pid: process id in its own namespace.
        started: its start in clock ticks since the boot; process ids are reused.
        host: name of its host.
        boot: id of the boot of its host; None if unknown.
        namespace: of its process ids, as of a container; None if unknown.
        token: unique to the owner.
        locked: whether it holds the kernel's lock on its file.
    """

    pid: int
    started: int | None
    host: str
    boot: str | None
    namespace: str | None
    token: str
    job: str | None = None
    requeues: int = 0
    locked: bool = False
    released: bool = False

    @classmethod
    def this_process(cls, env: Mapping[str, str]) -> Owner:
        """This process, with a new token."""
        requeues = env.get("SLURM_RESTART_COUNT", "")
        return cls(os.getpid(), start_time(os.getpid()), os.uname().nodename, _boot(), _namespace(),
                   secrets.token_hex(8), env.get("SLURM_JOB_ID"),
                   int(requeues) if requeues.isdecimal() else 0)  # fmt: skip

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class DirectoryOwnedError(Exception):
    """Another process owns the directory, or may own it.

    Attributes:
        owner: that process; None if it has not written its record yet.
        state: 'running', or 'unknown' if that cannot be determined from here.
    """

    def __init__(self, owner: Owner | None, path: Path, state: State) -> None:
        super().__init__(f"{path} is locked by {owner or 'a process that starts'}")
        self.owner, self.path, self.state = owner, path, state


@dataclass(frozen=True, slots=True)
class RunLock:
    """The lock of a run directory, until its release or the process's end. Children do not inherit `descriptor`."""

    path: Path
    descriptor: int
    owner: Owner

    @property
    def notice(self) -> str | None:
        """A notice to the user if the lock does not work between hosts."""
        if self.owner.locked:
            return None
        return (
            f"the disk of {self.path.parent} has no file locks (flock): a second process of this run is rejected on "
            f"{self.owner.host}; on other hosts, even after this run has ended, until the lock file is removed"
        )

    def release(self) -> None:
        """Release the directory."""
        # A fork has a copy of this object, but does not own the lock.
        if _HELD.pop(self.descriptor, None) is None or self.owner.pid != os.getpid():
            return
        # On a full disk the end of this process has the same effect.
        with contextlib.suppress(OSError):
            _write(self.descriptor, dataclasses.replace(self.owner, released=True))
        os.close(self.descriptor)


# Locks of this process by their descriptors, for the fork hook.
_HELD: dict[int, RunLock] = {}
_fork_hook_set = False


def acquire_lock(folder: Path, env: Mapping[str, str], *, previous: str | None = None) -> RunLock:
    """Become the owner of a run's folder.

    `previous` is the token of the owner in an earlier attempt of this launch, which the agent has ended.

    Raises:
        DirectoryOwnedError: another process owns it.
        OSError: the disk is full or read-only.
    """
    own = Owner.this_process(env)
    number = _newest(folder)
    if number:
        owner, state = _read_owner_file(_file(folder, number), own, previous, writable=True)
        if state != "ended":
            raise DirectoryOwnedError(owner, _file(folder, number), state)
    path = _file(folder, number + 1)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise DirectoryOwnedError(None, path, "running") from None
    try:
        own = dataclasses.replace(own, locked=_flock(descriptor, fcntl.LOCK_EX) is True)
        _write(descriptor, own)
        newest = _newest(folder)
        if newest != number + 1:
            # This process read the number long ago; other owners have followed since.
            raise DirectoryOwnedError(None, _file(folder, newest), "running")
    except BaseException:  # Ctrl-C too: the record of a process that is not the owner must not stay
        os.close(descriptor)
        path.unlink(missing_ok=True)
        raise
    for old in _numbers(folder):
        if old <= number:
            _file(folder, old).unlink(missing_ok=True)
    lock = RunLock(path, descriptor, own)
    _hold(lock)
    return lock


def read_owner(folder: Path) -> tuple[Owner | None, State]:
    """The owner of a run and its state; 'unknown' if it cannot be determined from here."""
    try:
        number = _newest(folder)
        if number:
            return _read_owner_file(_file(folder, number), Owner.this_process({}), None, writable=False)
    except OSError:
        return None, "unknown"  # another user's
    return None, "ended"


def remove_lock(folder: Path) -> None:
    """Remove the lock files of a folder that will be removed."""
    for number in _numbers(folder):
        _file(folder, number).unlink(missing_ok=True)


def find_owner_state(owner: Owner, own: Owner, previous: str | None) -> State:
    """Whether an owner still runs, as far as `own`, this process, can determine it without the lock on its file.

    `previous` is the token of this launch's earlier attempt.
    """
    if owner.released:
        return "ended"
    if None not in (own.boot, own.namespace) and (owner.boot, owner.namespace) == (own.boot, own.namespace):
        return "running" if is_running(owner.pid, owner.started) else "ended"
    # SLURM ends all processes of a job, and the agent those of an attempt, before they start the next.
    requeued = owner.job is not None and owner.job == own.job and owner.requeues < own.requeues
    return "ended" if requeued or owner.token == previous else "unknown"


def _read_owner_file(path: Path, own: Owner, previous: str | None, *, writable: bool) -> tuple[Owner | None, State]:
    """The owner in a file, None if it is not written yet, and whether it still runs."""
    try:
        flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        # The next owner has just removed it.
        return None, "running"
    try:
        owner = _read(descriptor)
        if owner is None:
            age = time.time() - os.fstat(descriptor).st_mtime
            return None, "running" if age < _WRITTEN_WITHIN else "ended"
        state = find_owner_state(owner, own, previous)
        if state == "unknown" and owner.locked:
            # Readers take a shared lock, so that they do not see each other as the owner.
            free = _flock(descriptor, fcntl.LOCK_EX if writable else fcntl.LOCK_SH)
            state = "unknown" if free is None else "ended" if free else "running"
        return owner, state
    finally:
        os.close(descriptor)


def _hold(lock: RunLock) -> None:
    global _fork_hook_set
    _HELD[lock.descriptor] = lock
    if not _fork_hook_set:
        # A hook cannot be removed, so there is one for all locks.
        _fork_hook_set = True
        # A lock is held as long as any process has the file open: the workers of a loader must close it.
        os.register_at_fork(after_in_child=_close_in_child)


def _close_in_child() -> None:
    for descriptor in _HELD:
        os.close(descriptor)
    _HELD.clear()


def _flock(descriptor: int, kind: int) -> bool | None:
    """Take the kernel's lock; None if the disk has no locks."""
    for _ in range(_LOCK_TRIES):
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_LOCK_PAUSE)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return None
        else:
            return True
    return False


def _write(descriptor: int, owner: Owner) -> None:
    data = json.dumps(dataclasses.asdict(owner)).encode() + b"\n"
    os.pwrite(descriptor, data, 0)
    os.ftruncate(descriptor, len(data))
    # On NFS other hosts see the record only when it is on the server.
    os.fsync(descriptor)


def _read(descriptor: int) -> Owner | None:
    try:
        values: dict[str, Any] = json.loads(os.pread(descriptor, 4096, 0))
        return Owner(**values)
    except (ValueError, TypeError):
        return None


def _numbers(folder: Path) -> list[int]:
    matches = (_NAME.fullmatch(name) for name in os.listdir(folder))  # noqa: PTH208 -- names without paths
    return [int(match[1]) for match in matches if match]


def _newest(folder: Path) -> int:
    """The number of the current owner; 0 without one."""
    return max(_numbers(folder), default=0) if folder.exists() else 0


def _file(folder: Path, number: int) -> Path:
    return folder / f".lock-{number}"


def _boot() -> str | None:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _namespace() -> str | None:
    with contextlib.suppress(OSError):
        return str(Path("/proc/self/ns/pid").readlink())
