"""A full, limited or read-only disk while a checkpoint is written."""

from __future__ import annotations

import errno
import io
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from launcher.checkpoint.atomic_io import AtomicCheckpointIO
from launcher.checkpoint.manifest import find_problem, remove_partial_checkpoints
from launcher.checkpoint.reader import Trust
from launcher.checkpoint.storage import explain_any_os_error, explained_saves, measure_size
from launcher.core.errors import StorageError
from tests.support.run_directories import small_disk

CONTENT = {"state_dict": {"weight": torch.zeros(500_000)}, "global_step": 3}
SMALL = {"state_dict": {"weight": torch.zeros(5_000)}, "global_step": 1}


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("full") / "disk"
    with small_disk(folder, "1m"):
        yield folder


def test_a_full_disk_is_reported_with_sizes_and_keeps_the_earlier_checkpoint(disk: Path) -> None:
    run = disk / "run"
    io_plugin = AtomicCheckpointIO(Trust(run))
    io_plugin.save_checkpoint(dict(SMALL), run / "checkpoints" / "last.ckpt")
    with pytest.raises(StorageError) as caught:
        io_plugin.save_checkpoint(dict(CONTENT), run / "checkpoints" / "last.ckpt")
    error = caught.value
    whole = io.BytesIO()
    torch.save(CONTENT, whole)
    assert (error.reason, error.folder) == ("disk_full", str(run / "checkpoints"))
    assert error.needed_bytes == len(whole.getvalue()) == measure_size(CONTENT)
    assert error.free_bytes == shutil.disk_usage(run).free
    assert str(error).startswith(f"no space left on {run / 'checkpoints'}: 1.91 MiB needed, ")
    assert find_problem(run / "checkpoints" / "last.ckpt") is None
    assert sorted(file.name for file in (run / "checkpoints").iterdir()) == ["last.ckpt", "last.ckpt.manifest"]


def test_a_folder_of_files_is_reported_as_one_and_removed(disk: Path) -> None:
    fresh = disk / ".x.ckpt.new"
    fresh.mkdir()

    def save_both() -> None:
        with explained_saves(fresh):
            torch.save(SMALL, fresh / "model")
            torch.save(CONTENT, str(fresh / "optimizer"))

    with pytest.raises(StorageError) as caught:
        save_both()
    assert (caught.value.reason, caught.value.folder) == ("disk_full", str(disk))
    assert caught.value.needed_bytes == (measure_size(SMALL) or 0) + (measure_size(CONTENT) or 0)
    assert not fresh.exists()
    assert torch.save.__name__ == "save"
    torch.save(SMALL, io.BytesIO())


def test_a_limit_of_the_files_size_is_reported(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(StorageError) as caught:
            AtomicCheckpointIO(Trust(tmp_path)).save_checkpoint(dict(CONTENT), tmp_path / "a.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert (caught.value.reason, list(tmp_path.iterdir())) == ("quota", [])


@pytest.mark.parametrize(
    ("number", "reason", "text"),
    [
        (errno.EDQUOT, "quota", "the disk quota or the limit of a file's size is reached in "),
        (errno.EROFS, "read_only", " is on a read-only disk"),
        (errno.EACCES, "no_permission", "no permission to write in "),
    ],
)
def test_other_errors_of_a_disk_are_told_apart(tmp_path: Path, number: int, reason: str, text: str) -> None:
    error = RuntimeError("a logger's own words")
    error.__cause__ = OSError(number, "x", str(tmp_path / "metrics.csv"))
    found = explain_any_os_error(error, tmp_path)
    assert found is not None
    assert (found.reason, found.folder) == (reason, str(tmp_path))
    assert text in str(found)


def test_an_error_of_the_users_own_files_stays_as_it_is(tmp_path: Path) -> None:
    for error in (ValueError("x"), FileNotFoundError(errno.ENOENT, "x", "y"), PermissionError(errno.EACCES, "x", "/y")):
        assert explain_any_os_error(error, tmp_path) is None


def test_a_write_without_a_file_name_is_explained_by_the_full_disk(disk: Path) -> None:
    filler = disk / "filler"
    try:
        with pytest.raises(OSError, match="No space left") as caught:
            filler.write_bytes(b"x" * 2_000_000)
        found = explain_any_os_error(caught.value, disk)
        assert found is not None
        assert (found.reason, found.folder) == ("disk_full", str(disk))
        elsewhere = explain_any_os_error(caught.value, filler.parent.parent)
        assert elsewhere is not None
        assert (elsewhere.reason, elsewhere.folder) == ("disk_full", None)
        assert str(elsewhere) == "no space left on the disk of a logger or of another file"
    finally:
        filler.unlink()


def test_partial_checkpoints_are_removed_and_complete_ones_kept(tmp_path: Path) -> None:
    (tmp_path / ".a.ckpt.new").mkdir()
    for name in (".last.ckpt.tmp", "last.ckpt", "last.ckpt.manifest", ".a.ckpt.new/model"):
        (tmp_path / name).write_text("x")
    remove_partial_checkpoints(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "last.ckpt.manifest"]
