"""The folder of a launch in shared memory: private, found by its ranks, and removed once its launch has ended."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.process import kept_folder
from launcher.process.kept_folder import KEPT_VARIABLE, can_restart, create_kept_folder, find_kept_folder, in_use
from launcher.process.rank_status import FOLDER_VARIABLE


@pytest.fixture(autouse=True)
def _memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_folder, "_SHARED_MEMORY", tmp_path)


def test_all_ranks_of_a_launch_find_one_private_folder(tmp_path: Path) -> None:
    made = create_kept_folder()
    assert made is not None
    assert made.parent == tmp_path
    assert made.stat().st_mode & 0o777 == 0o700
    assert create_kept_folder() == made
    assert find_kept_folder({FOLDER_VARIABLE: "x", KEPT_VARIABLE: str(made)}) == made


@pytest.mark.parametrize(
    ("env", "has_folder"),
    [
        ({}, False),
        ({FOLDER_VARIABLE: "x"}, False),
        ({FOLDER_VARIABLE: "x", KEPT_VARIABLE: "", "TORCHELASTIC_MAX_RESTARTS": "3"}, False),
        ({FOLDER_VARIABLE: "x", KEPT_VARIABLE: "missing"}, False),
        ({"TORCHELASTIC_MAX_RESTARTS": "0", "TORCHELASTIC_RESTART_COUNT": "0"}, False),
        ({"TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_RESTART_COUNT": "3"}, True),
        ({"TORCHELASTIC_MAX_RESTARTS": "three", "TORCHELASTIC_RESTART_COUNT": "0"}, False),
        ({"TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_RESTART_COUNT": "2"}, True),
    ],
)
def test_a_rank_has_a_folder_only_if_it_is_or_may_be_restarted(env: dict[str, str], has_folder: bool) -> None:
    found = find_kept_folder(env)
    assert (found is not None) == has_folder
    assert found is None or f"-{os.getppid()}-" in found.name


def test_the_last_attempt_of_torchrun_keeps_nothing() -> None:
    env = {"TORCHELASTIC_MAX_RESTARTS": "2"}
    assert [can_restart({**env, "TORCHELASTIC_RESTART_COUNT": str(count)}) for count in range(3)] == [True, True, False]
    assert not can_restart({})
    assert can_restart({FOLDER_VARIABLE: "x"})


def test_the_folder_of_another_user_or_a_link_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = create_kept_folder()
    assert made is not None
    made.chmod(0o755)
    other = tmp_path / "disk"
    other.mkdir()
    monkeypatch.setattr(kept_folder.tempfile, "gettempdir", lambda: str(other))
    used = create_kept_folder()
    assert used is not None
    assert used.parent == other, "an open folder in shared memory is not used"
    made.rmdir()
    target = tmp_path / "target"
    target.mkdir(mode=0o700)
    made.symlink_to(target)
    assert create_kept_folder() == used
    assert find_kept_folder({FOLDER_VARIABLE: "x", KEPT_VARIABLE: str(made)}) is None


def test_the_folder_of_a_launch_that_has_ended_is_removed_unless_a_rank_uses_it(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    left = create_kept_folder(process.pid)
    assert left is not None
    (left / "step-3.ckpt").write_bytes(b"state")
    kept_folder.remove_left_folders(tmp_path)
    assert left.exists(), "its launch runs"
    process.communicate(b"\n")
    with in_use(left):
        kept_folder.remove_left_folders(tmp_path)
        assert left.exists(), "a rank that this process cannot see may use it"
    kept_folder.remove_left_folders(tmp_path)
    assert not left.exists()
