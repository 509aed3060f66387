"""`launcher.runs.lock`: one owner of a directory, also after crashes and forks, on disks with and without locks."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.runs import lock as run_lock
from launcher.runs.lock import DirectoryOwnedError, Owner, acquire_lock, find_owner_state, read_owner
from tests.support.rank_threads import run_ranks

HERE = Owner.this_process({})
ELSEWHERE = dataclasses.replace(HERE, host="n2", boot="another", token="other")


@pytest.fixture(params=[None, errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the disk has locks."""
    if request.param is None:
        return True

    def refuse(descriptor: int, kind: int) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)
    return False


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that owns `tmp_path`."""
    program = "import sys, pathlib\nfrom launcher.runs.lock import acquire_lock\n"
    program += "acquire_lock(pathlib.Path(sys.argv[1]), {}); print('owns', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "owns\n"
        yield process
        process.kill()


def rewrite(folder: Path, **changes: Any) -> Path:
    """Change the record of the newest owner."""
    file = max(folder.glob(".lock-*"))
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return file


def test_a_second_owner_is_rejected_until_the_first_releases_the_lock(tmp_path: Path, disk: bool) -> None:
    first = acquire_lock(tmp_path, {})
    assert (first.notice is None) is disk
    for _ in range(2):
        with pytest.raises(DirectoryOwnedError) as caught:
            acquire_lock(tmp_path, {})
        assert (caught.value.owner, caught.value.state) == (first.owner, "running")
    assert read_owner(tmp_path) == (first.owner, "running")
    first.release()
    assert read_owner(tmp_path)[1] == "ended"
    acquire_lock(tmp_path, {}).release()
    assert len(list(tmp_path.iterdir())) == 1


def test_another_process_is_rejected_and_its_death_is_detected(
    tmp_path: Path, disk: bool, other: subprocess.Popen[str]
) -> None:
    with pytest.raises(DirectoryOwnedError, match=f"process {other.pid} on ") as caught:
        acquire_lock(tmp_path, {})
    assert caught.value.state == "running"
    other.kill()
    other.wait()
    assert read_owner(tmp_path)[1] == "ended"
    acquire_lock(tmp_path, {}).release()


def test_a_zombie_is_not_an_owner(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    other.kill()
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
    acquire_lock(tmp_path, {}).release()


def test_children_do_not_hold_the_lock_and_cannot_release_it(tmp_path: Path) -> None:
    lock = acquire_lock(tmp_path, {})

    def child(answers: Any) -> None:
        lock.release()
        links = (Path(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd"))  # noqa: PTH208 -- bare numbers
        answers.send([str(link) for link in links if link.exists() and link.samefile(lock.path)])
        answers.recv()

    ours, theirs = multiprocessing.Pipe()
    worker = multiprocessing.get_context("fork").Process(target=child, args=(theirs,), daemon=True)
    worker.start()
    try:
        assert ours.recv() == []
        assert read_owner(tmp_path) == (lock.owner, "running")
        # Another host sees only the kernel's lock if this process has ended and its worker has not.
        os.close(lock.descriptor)
        rewrite(tmp_path, boot="another")
        acquire_lock(tmp_path, {}).release()
    finally:
        ours.send("end")
        worker.join()
        run_lock._HELD.clear()


@pytest.mark.parametrize(
    ("owner", "own", "previous", "state"),
    [
        (HERE, HERE, None, "running"),
        (dataclasses.replace(HERE, released=True), HERE, None, "ended"),
        (dataclasses.replace(HERE, started=1), HERE, None, "ended"),  # another process has its number now
        # The process is visible, which overrides the agent's token, another one in each process of the tests.
        pytest.param(HERE, HERE, HERE.token, "running", id="own token"),
        (ELSEWHERE, HERE, None, "unknown"),
        (dataclasses.replace(HERE, namespace="pid:[1]"), HERE, None, "unknown"),
        (dataclasses.replace(HERE, boot=None), dataclasses.replace(HERE, boot=None), None, "unknown"),
        (ELSEWHERE, HERE, "other", "ended"),
        (ELSEWHERE, HERE, "third", "unknown"),
        (dataclasses.replace(ELSEWHERE, job="7"), dataclasses.replace(HERE, job="7", requeues=1), None, "ended"),
        (dataclasses.replace(ELSEWHERE, job="7"), dataclasses.replace(HERE, job="7"), None, "unknown"),
        (dataclasses.replace(ELSEWHERE, job="7"), dataclasses.replace(HERE, job="8", requeues=1), None, "unknown"),
        (ELSEWHERE, dataclasses.replace(HERE, requeues=1), None, "unknown"),
    ],
)
def test_what_is_known_of_an_owner(owner: Owner, own: Owner, previous: str | None, state: str) -> None:
    assert find_owner_state(owner, own, previous) == state


def test_a_requeued_job_takes_over_its_lock(tmp_path: Path) -> None:
    lock = acquire_lock(tmp_path, {"SLURM_JOB_ID": "7"})
    rewrite(tmp_path, boot="another", host="n2")
    with pytest.raises(DirectoryOwnedError):
        acquire_lock(tmp_path, {"SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "1"})
    acquire_lock(tmp_path, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}).release()
    lock.release()


@pytest.mark.slow
@pytest.mark.parametrize("held", [True, False])
def test_the_kernels_lock_decides_about_another_host(tmp_path: Path, held: bool) -> None:
    lock = acquire_lock(tmp_path, {})
    file = rewrite(tmp_path, boot="another", host="n2")
    if not held:
        os.close(lock.descriptor)
        run_lock._HELD.clear()
        acquire_lock(tmp_path, {}).release()
        return
    assert read_owner(tmp_path)[1] == "running"
    with pytest.raises(DirectoryOwnedError) as caught:
        acquire_lock(tmp_path, {})
    assert (caught.value.path, caught.value.state) == (file, "running")
    lock.release()


def test_the_state_on_another_host_is_unknown_without_locks(tmp_path: Path) -> None:
    lock = acquire_lock(tmp_path, {})
    file = rewrite(tmp_path, boot="another", host="n2", locked=False)
    with pytest.raises(DirectoryOwnedError) as caught:
        acquire_lock(tmp_path, {})
    assert (caught.value.path, caught.value.state) == (file, "unknown")
    # Its launch knows that the process has ended.
    acquire_lock(tmp_path, {}, previous=lock.owner.token).release()
    lock.release()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}'])
def test_an_incomplete_record_counts_for_a_minute(tmp_path: Path, text: str) -> None:
    file = tmp_path / ".lock-4"
    file.write_text(text)
    with pytest.raises(DirectoryOwnedError):
        acquire_lock(tmp_path, {})
    os.utime(file, (1e9, 1e9))
    lock = acquire_lock(tmp_path, {})
    assert lock.path == tmp_path / ".lock-5"
    lock.release()


def test_no_link_is_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".lock-1").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        acquire_lock(folder, {})
    assert victim.read_text() == "precious"


def test_one_of_many_concurrent_processes_becomes_the_owner(tmp_path: Path, disk: bool) -> None:
    for _ in range(20):
        acquire_lock(tmp_path, {}).release()
        together = threading.Barrier(8)

        def come(together: threading.Barrier = together) -> run_lock.RunLock:
            together.wait(10)
            return acquire_lock(tmp_path, {})

        results = run_ranks([come] * 8)
        (lock,) = [result for result in results if isinstance(result, run_lock.RunLock)]
        assert all(isinstance(result, DirectoryOwnedError) for result in results if result is not lock)
        lock.release()


def test_a_process_with_an_outdated_number_does_not_become_the_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look: Callable[..., Any] = run_lock._read_owner_file
    others: list[run_lock.RunLock] = []

    def slow_look(*arguments: Any, **options: Any) -> Any:
        answer = look(*arguments, **options)
        monkeypatch.setattr(run_lock, "_read_owner_file", look)
        # In the meantime one owner starts and ends, and another starts.
        acquire_lock(tmp_path, {}).release()
        others.append(acquire_lock(tmp_path, {}))
        return answer

    acquire_lock(tmp_path, {}).release()
    monkeypatch.setattr(run_lock, "_read_owner_file", slow_look)
    with pytest.raises(DirectoryOwnedError):
        acquire_lock(tmp_path, {})
    assert read_owner(tmp_path) == (others[0].owner, "running")
    others[0].release()
