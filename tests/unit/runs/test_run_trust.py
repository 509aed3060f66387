"""In a shared folder of runs, files that another user has prepared are neither written nor trusted."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.core.atomic_write import write_file
from launcher.core.errors import RunDirectoryError
from launcher.core.events import EventLog
from launcher.runs.directory import open_run_directory
from launcher.runs.selection import find_run
from launcher.runs.trust import find_run_folder_problem
from slurm.ownership import is_own
from slurm.rendezvous import RendezvousError, join_rendezvous
from tests.support.processes import run
from tests.support.run_directories import config, make_run

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
SOMEBODY = 54321
VICTIM = "# mine\n"


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    file = tmp_path / "bashrc"
    file.write_text(VICTIM)
    return file


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    runs = tmp_path / "runs"
    runs.mkdir()
    # The mode of a group's folder, for any umask.
    runs.chmod(0o1777)
    return runs


@pytest.mark.parametrize("name", ["events.jsonl", "config.yaml", "plan.json", "wandb/run_id"])
def test_a_link_in_a_run_directory_is_rejected(shared: Path, victim: Path, name: str) -> None:
    path = make_run(shared)
    (path / name).unlink(missing_ok=True)
    (path / name).symlink_to(victim)
    for resume in ("auto", "none"):
        with pytest.raises(RunDirectoryError, match="is a link, and the launcher does not write through links"):
            open_run_directory(config(shared, resume=resume))
    assert victim.read_text() == VICTIM


def laid(link: Path, victim: Path) -> Path:
    link.symlink_to(victim)
    return link


def test_no_file_is_written_through_a_link(shared: Path, victim: Path) -> None:
    events = EventLog(laid(shared / "events.jsonl", victim), 0)
    events.write("step")
    assert events.lost == 1
    link = laid(shared / "plan.json", victim)
    write_file(link, "{}")
    assert (link.is_symlink(), link.read_text()) == (False, "{}")
    logs = shared / "x" / "rank-0.log"
    logs.parent.mkdir()
    laid(logs, victim)
    text = (
        "import os, sys; from pathlib import Path; from launcher.process.rank_log import RankLog\n"
        "runs = Path(sys.argv[1])\n"
        "log = RankLog(runs, 1); (runs / 'link').symlink_to(runs.parent / 'bashrc')\n"
        "(runs / 'link').rename(log.path)\n"
        "try: log.attach()\nexcept FileExistsError: log.path.unlink(); log.attach()\n"
        "print('said'); log.move_to(runs / 'x/rank-0.log'); log.detach()"
    )
    run([sys.executable, "-c", text, str(shared)], shared).check()
    assert "said" in logs.read_text()
    assert victim.read_text() == VICTIM


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
@pytest.mark.parametrize("folder", ["", "checkpoints", "logs"])
def test_a_directory_that_others_can_write_is_rejected_until_a_chmod(shared: Path, mode: int, folder: str) -> None:
    path = make_run(shared)
    (path / folder).chmod(mode)
    with pytest.raises(RunDirectoryError, match=rf"can be written by other users \(mode {mode:o}\).*chmod go-w"):
        find_run(config(shared, resume="auto"))
    (path / folder).chmod(mode & ~(stat.S_IWGRP | stat.S_IWOTH))
    open_run_directory(config(shared, resume="auto")).release()


def to_somebody(path: Path) -> None:
    os.chown(path, SOMEBODY, SOMEBODY, follow_symlinks=False)


@needs_root
@pytest.mark.parametrize("folder", ["", "checkpoints", "wandb"])
def test_another_users_directory_is_rejected_and_skipped_by_resume_auto(shared: Path, folder: str) -> None:
    path = make_run(shared)
    to_somebody(path / folder)
    with pytest.raises(RunDirectoryError, match=f"belongs to user {SOMEBODY}"):
        open_run_directory(config(shared, resume="auto"))
    assert find_run(config(shared, name=None, resume="auto")).path != path


@needs_root
@pytest.mark.parametrize("folder", ["", "checkpoints"])
def test_another_users_link_is_rejected_and_the_users_own_is_followed(
    shared: Path, tmp_path: Path, folder: str
) -> None:
    path = make_run(shared)
    place, moved = path / folder, tmp_path / "elsewhere"
    place.rename(moved)
    place.symlink_to(moved)
    open_run_directory(config(shared, resume="auto")).release()
    to_somebody(place)
    with pytest.raises(RunDirectoryError, match=f"is a link of user {SOMEBODY}"):
        open_run_directory(config(shared, resume="auto"))


def test_a_folder_of_runs_may_be_a_link_to_another_disk(tmp_path: Path, shared: Path) -> None:
    (tmp_path / "link").symlink_to(shared)
    open_run_directory(config(tmp_path / "link")).release()
    open_run_directory(config(tmp_path / "link", resume="auto")).release()


@needs_root
def test_root_may_use_the_runs_of_the_folders_owner(shared: Path) -> None:
    path = make_run(shared)
    for each in (shared, path, *path.rglob("*")):
        to_somebody(each)
    assert find_run_folder_problem(path) is None
    to_somebody(path)
    os.chown(path, SOMEBODY + 1, SOMEBODY + 1)
    assert "belongs to user 54322" in str(find_run_folder_problem(path))


@needs_root
def test_a_new_file_shows_this_user_on_a_disk_that_maps_owners(shared: Path) -> None:
    file = shared / "file"
    file.touch()
    to_somebody(file)
    assert not is_own(file.stat(), shared)
    file.unlink()
    file.touch()
    assert is_own(file.stat(), shared)


@pytest.mark.parametrize("kind", ["link", pytest.param("file", marks=needs_root)])
def test_a_rendezvous_of_another_user_is_not_joined(shared: Path, kind: str) -> None:
    place = shared / ".rendezvous-1-0-0.json"
    text = '{"hosts": ["127.0.0.1"], "port": 1, "answers": 1, "token": "t"}'
    if kind == "link":
        (shared / "theirs").write_text(text)
        place.symlink_to(shared / "theirs")
    else:
        place.write_text(text)
        to_somebody(place)
    # No wait: the clock has passed the limit at the second check.
    times: Callable[[], float] = iter([0.0, 0.0, 9.0]).__next__
    with pytest.raises(RendezvousError, match="is not trusted"):
        join_rendezvous(place, 1, 1.0, times)


def test_checking_a_private_folder_writes_nothing(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True, mode=0o700)
    before = run.parent.stat().st_mtime_ns
    assert find_run_folder_problem(run) is None
    assert run.parent.stat().st_mtime_ns == before
