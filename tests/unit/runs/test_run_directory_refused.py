"""A run directory that cannot be created: the error states why, and no earlier run is changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.config.schema import TrainerOptions
from launcher.core.errors import ResumeError, RunDirectoryError
from launcher.runs.directory import open_run_directory, write_plan
from tests.support.run_directories import config, ended, everything, fill, make_run, small_disk


@pytest.mark.parametrize("place", ["/proc/runs", "FILE", "FILE/below"])
def test_a_folder_that_cannot_be_created_is_named(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("a file")
    runs = Path(place.replace("FILE", str(tmp_path / "file")))
    with pytest.raises(RunDirectoryError, match="cannot be created") as caught:
        open_run_directory(config(runs))
    assert str(runs / "first") in str(caught.value)
    assert (tmp_path / "file").read_text() == "a file"


def test_a_path_too_long_for_the_system_is_reported(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="cannot be created: File name too long"):
        open_run_directory(config(tmp_path / ("x" * 300)))


def test_a_checkpoints_path_too_long_for_the_system_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match="cannot be read: File name too long"):
        open_run_directory(config(tmp_path, resume="x" * 300))


def test_a_dangling_link_in_place_of_the_runs_folder_is_reported(tmp_path: Path) -> None:
    (tmp_path / "runs").symlink_to(tmp_path / "nowhere" / "x")
    with pytest.raises(RunDirectoryError, match="cannot be created"):
        open_run_directory(config(tmp_path / "runs"))


@pytest.mark.parametrize("size", ["4k", "8k"])
def test_a_full_disk_is_reported_and_no_files_stay(tmp_path: Path, size: str) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, size):
        with pytest.raises(RunDirectoryError, match="No space left on device"):
            open_run_directory(config(disk))
        assert not list(disk.iterdir())


def without_lock(files: dict[str, tuple[int, int, bytes]]) -> dict[str, tuple[int, int, bytes]]:
    return {name: file for name, file in files.items() if not name.startswith(".lock")}


def test_a_full_disk_neither_damages_nor_locks_an_earlier_run(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, "64k"):
        path = make_run(disk)
        fill(disk)
        before = without_lock(everything(path))
        with pytest.raises(RunDirectoryError, match="No space left on device"):
            open_run_directory(config(disk, resume="auto", trainer=TrainerOptions(max_epochs=9)))
        assert without_lock(everything(path)) == before
        (disk / "filler").unlink()
        assert ended(open_run_directory(config(disk, resume="auto"))).path == path


def test_a_plan_that_does_not_fit_on_the_disk_keeps_the_earlier_one(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, "64k"):
        run = ended(open_run_directory(config(disk)))
        write_plan(run, {"a": 1})
        fill(disk)
        before = everything(run.path)
        with pytest.raises(RunDirectoryError, match=r"plan\.json cannot be written .* No space left"):
            write_plan(run, {"a": "x" * 9000})
        assert everything(run.path) == before
