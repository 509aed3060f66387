"""Keeps two runs out of one directory: who owns it is written in a file, which the next owner can check.

The owners of a directory have numbers, and each has a file `.lock-<number>`, which is created exclusively: of several
processes that take over from the same owner one succeeds, also on a disk without locks. The owner with the largest
number counts. Its file is never removed, only marked as released, so that a number is not given twice.

Whether an owner still runs is known from its process where that can be seen from here. Elsewhere the kernel's lock
(`flock`) on its file shows it, unless the disk has no locks. The package filelock does not fit: a lock of its own has
no record of the owner, and it has no answer for a disk without locks.
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
# A disk without locks: Lustre mounted without flock, NFS without a lock service, some user-space file systems.
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}
# Seconds until a record that is not readable counts as one whose writer died in the middle.
_WRITTEN_WITHIN = 60.0
# A reader holds the lock for a moment.
_LOCK_TRIES = 50
_LOCK_PAUSE = 0.01

State = Literal["ended", "running", "unknown"]


@dataclass(frozen=True, slots=True)
class Owner:
    """A process that owns a run's directory, as its record says.

    Attributes:
        pid: its number, seen from its own namespace.
        started: its start in clock ticks since the boot, as numbers are used again.
        host: its host's name.
        boot: of this boot of its host; None if not known.
        namespace: of its process numbers, as of a container; None if not known.
        token: a word that no other owner has.
        job: its SLURM job; None outside of SLURM.
        requeues: how often the job had been requeued.
        locked: whether it holds the kernel's lock on its file.
        released: whether it has given the directory back.
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
    """Another process has the directory, or may have it.

    Attributes:
        owner: that process; None if it has not written its record yet.
        path: its file.
        state: 'running', or 'unknown' where that cannot be found out from here.
    """

    def __init__(self, owner: Owner | None, path: Path, state: State) -> None:
        super().__init__(f"{path} is held by {owner or 'a process that begins'}")
        self.owner, self.path, self.state = owner, path, state


@dataclass(frozen=True, slots=True)
class RunLock:
    """Keeps other runs out until it is released or this process ends, however that happens.

    Attributes:
        path: the file.
        descriptor: of the file, open; children of this process do not have it.
        owner: what is in the file.
    """

    path: Path
    descriptor: int
    owner: Owner

    @property
    def notice(self) -> str | None:
        """What the user should know about this lock."""
        if self.owner.locked:
            return None
        return (
            f"the disk of {self.path.parent} has no file locks (flock): another process on {self.owner.host} is kept "
            "out of this run, and another host is told which file to remove once this run has ended"
        )

    def release(self) -> None:
        """Let other runs in."""
        # A fork has copied this object, not the right to it.
        if _HELD.pop(self.descriptor, None) is None or self.owner.pid != os.getpid():
            return
        # On a full disk the end of this process says the same.
        with contextlib.suppress(OSError):
            _write(self.descriptor, dataclasses.replace(self.owner, released=True))
        os.close(self.descriptor)


# Locks of this process by their descriptors, for the fork hook.
_HELD: dict[int, RunLock] = {}
_fork_hook_set = False


def acquire(folder: Path, env: Mapping[str, str], *, previous: str | None = None) -> RunLock:
    """Become the owner of `folder`.

    Args:
        folder: of the run.
        env: says which SLURM job this is.
        previous: token of the owner in an earlier attempt of this launch, which the agent has ended.

    Raises:
        DirectoryOwnedError: another process has it.
        OSError: the disk is full or read-only.
    """
    own = Owner.this_process(env)
    number = _newest(folder)
    if number:
        owner, state = _look(_file(folder, number), own, previous, writable=True)
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
            # This process looked long ago; others have come and gone since.
            raise DirectoryOwnedError(None, _file(folder, newest), "running")
    except BaseException:  # Ctrl-C too: a record of a process that is not the owner must not stay
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
    """Who trains the run; 'unknown' where it cannot be seen from here whether that process still runs."""
    try:
        number = _newest(folder)
        if number:
            return _look(_file(folder, number), Owner.this_process({}), None, writable=False)
    except OSError:
        return None, "unknown"  # somebody else's
    return None, "ended"


def remove_lock(folder: Path) -> None:
    """Remove the files of a folder that is itself about to be removed."""
    for number in _numbers(folder):
        _file(folder, number).unlink(missing_ok=True)


def owner_state(owner: Owner, own: Owner, previous: str | None) -> State:
    """Whether another owner still runs, as far as that can be known without its file's lock.

    Args:
        owner: the other.
        own: this process.
        previous: token of this launch's earlier attempt.
    """
    if owner.released:
        return "ended"
    if None not in (own.boot, own.namespace) and (owner.boot, owner.namespace) == (own.boot, own.namespace):
        return "running" if is_running(owner.pid, owner.started) else "ended"
    # SLURM and the agent end every process of a job, or of an attempt, before they start the next.
    requeued = owner.job is not None and owner.job == own.job and owner.requeues < own.requeues
    return "ended" if requeued or owner.token == previous else "unknown"


def _look(path: Path, own: Owner, previous: str | None, *, writable: bool) -> tuple[Owner | None, State]:
    """The owner of a file, None if it is not written; and whether it still runs."""
    try:
        flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        # Its owner was overtaken just now.
        return None, "running"
    try:
        owner = _read(descriptor)
        if owner is None:
            age = time.time() - os.fstat(descriptor).st_mtime
            return None, "running" if age < _WRITTEN_WITHIN else "ended"
        state = owner_state(owner, own, previous)
        if state == "unknown" and owner.locked:
            # A reader's lock is shared, so that two readers don't take each other for the owner.
            free = _flock(descriptor, fcntl.LOCK_EX if writable else fcntl.LOCK_SH)
            state = "unknown" if free is None else "ended" if free else "running"
        return owner, state
    finally:
        os.close(descriptor)


def _hold(lock: RunLock) -> None:
    global _fork_hook_set
    _HELD[lock.descriptor] = lock
    if not _fork_hook_set:
        # A hook cannot be taken back, so there is one for all locks.
        _fork_hook_set = True
        # A lock on an open file lives as long as any process has the file open: a loader's worker must not.
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
    # On NFS another host sees the record only once it is on the server.
    os.fsync(descriptor)


def _read(descriptor: int) -> Owner | None:
    try:
        values: dict[str, Any] = json.loads(os.pread(descriptor, 4096, 0))
        return Owner(**values)
    except (ValueError, TypeError):
        return None


def _numbers(folder: Path) -> list[int]:
    matches = (_NAME.fullmatch(name) for name in os.listdir(folder))  # noqa: PTH208 -- bare names are wanted
    return [int(match[1]) for match in matches if match]


def _newest(folder: Path) -> int:
    """The largest number of an owner, 0 without one."""
    return max(_numbers(folder), default=0) if folder.exists() else 0


def _file(folder: Path, number: int) -> Path:
    return folder / f".lock-{number}"


def _boot() -> str | None:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _namespace() -> str | None:
    with contextlib.suppress(OSError):
        return str(Path("/proc/self/ns/pid").readlink())
