"""Valid checkpoints, and how damaged ones are found."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import launcher.checkpoint.manifest
from launcher.checkpoint.atomic_io import AtomicCheckpointIO
from launcher.checkpoint.manifest import (
    candidates,
    find_problem,
    manifest_path,
    newest_valid,
    publish,
    remove_checkpoint,
    write_manifest,
)
from launcher.core.errors import ResumeError, StorageError
from launcher.runs.selection import find_run
from tests.support.run_directories import config, fill, make_run, small_disk


def _save(path: Path, content: bytes, step: int = 1) -> Path:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    publish(temporary, path, step)
    return path


def _save_folder(path: Path, step: int = 1, **files: bytes) -> Path:
    fresh = path.with_name(f".{path.name}.new")
    (fresh / "inner").mkdir(parents=True)
    for name, content in files.items():
        (fresh / "inner" / name).write_bytes(content)
    write_manifest(fresh, path, step)
    if path.exists():
        path.rename(path.with_name(f"{path.stem}-before{path.suffix}"))
    fresh.rename(path)
    return path


def test_saved_checkpoint_is_valid_and_has_its_step(tmp_path: Path) -> None:
    path = _save(tmp_path / "last.ckpt", b"weights", 7)
    assert path.read_bytes() == b"weights"
    assert find_problem(path) is None
    assert json.loads(manifest_path(path).read_text())["step"] == 7
    assert sorted(f.name for f in tmp_path.iterdir()) == ["last.ckpt", "last.ckpt.manifest"]


@pytest.mark.parametrize(
    ("damage", "expected"),
    [(b"weight", "6 bytes of 7"), (b"weighTs", "SHA-256 differs"), (b"", "0 bytes of 7")],
)
def test_damage_is_found_and_described(tmp_path: Path, damage: bytes, expected: str) -> None:
    path = _save(tmp_path / "last.ckpt", b"weights")
    path.write_bytes(damage)
    assert expected in (find_problem(path) or "")


def test_file_of_another_program_is_valid(tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_bytes(b"from elsewhere")
    assert find_problem(tmp_path / "x.ckpt") is None


def test_old_checkpoint_is_valid_after_a_kill_between_manifest_and_rename(tmp_path: Path) -> None:
    path = _save(tmp_path / "last.ckpt", b"old", 1)
    temporary = tmp_path / ".last.ckpt.tmp"
    temporary.write_bytes(b"new")
    write_manifest(temporary, path, 2)  # power failure here
    assert find_problem(path) is None
    assert path.read_bytes() == b"old"


def test_a_damaged_manifest_is_not_trusted(tmp_path: Path) -> None:
    path = _save(tmp_path / "last.ckpt", b"weights")
    manifest_path(path).write_text("{")
    assert find_problem(path) == "its manifest is damaged"


def test_folder_is_valid_if_all_its_files_are(tmp_path: Path) -> None:
    path = _save_folder(tmp_path / "last.ckpt", a=b"1", b=b"22")
    assert find_problem(path) is None
    (path / "inner" / "a").unlink()
    assert "inner/a" in (find_problem(path) or "")
    (path / "inner" / "a").write_bytes(b"2")
    assert "inner/a in it has changed" in (find_problem(path) or "")


def test_old_folder_is_found_after_a_kill_during_replacement(tmp_path: Path) -> None:
    _save_folder(tmp_path / "last.ckpt", 1, a=b"1")
    _save_folder(tmp_path / "last.ckpt", 2, a=b"2")
    (tmp_path / "last.ckpt" / "inner" / "a").write_bytes(b"torn")
    found, skipped = newest_valid(tmp_path, "last.ckpt")
    assert found == tmp_path / "last-before.ckpt"
    assert [*skipped] == [tmp_path / "last.ckpt"]


def test_damaged_checkpoint_is_skipped_for_an_older_one(tmp_path: Path) -> None:
    run = make_run(tmp_path, checkpoint=None)
    folder = run / "checkpoints"
    for age, name in enumerate(["epoch=2.ckpt", "epoch=1.ckpt", "epoch=0.ckpt"]):
        os.utime(_save(folder / name, name.encode()), (1e9 - age, 1e9 - age))
    _save(folder / "last.ckpt", b"newest").write_bytes(b"newes")
    (folder / "epoch=2.ckpt").write_bytes(b"torn")

    place = find_run(config(tmp_path, resume="auto"))
    assert place.resume_from == folder / "epoch=1.ckpt"
    assert [notice.split(" is skipped: ")[0].rpartition("/")[2] for notice in place.notices] == [
        "last.ckpt", "epoch=2.ckpt"
    ]  # fmt: skip


def test_run_without_a_valid_checkpoint_is_not_started_again(tmp_path: Path) -> None:
    run = make_run(tmp_path, checkpoint=None)
    _save(run / "checkpoints" / "last.ckpt", b"newest").write_bytes(b"newes")
    with pytest.raises(
        ResumeError, match=r"no checkpoint in .*/first/checkpoints is valid:\n.*5 bytes of 6\n.*another --name"
    ):
        find_run(config(tmp_path, resume="auto"))


def test_explicit_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    path = _save(tmp_path / "mine.ckpt", b"weights")
    path.write_bytes(b"weighTs")
    with pytest.raises(ResumeError, match=r"mine.ckpt is damaged: it has changed") as caught:
        find_run(config(tmp_path, name="other", resume=str(path)))
    manifest = Path(str(caught.value).partition(" or remove ")[2].partition(" if you changed")[0])
    # A checkpoint that the user changed is not damaged.
    manifest.unlink()
    assert find_run(config(tmp_path, name="other", resume=str(path))).resume_from == path


def test_each_file_of_a_checkpoint_of_many_ranks_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Syncing so many files would take long.
    monkeypatch.setattr(launcher.checkpoint.manifest, "_sync", lambda path: None)
    path = _save_folder(tmp_path / "a.ckpt", **{f"rank-{n}": b"%d" % n for n in range(1030)})
    # As in a new process.
    launcher.checkpoint.manifest._sha256.cache_clear()
    read: list[str] = []
    digest = hashlib.file_digest

    def counting(file: Any, kind: str) -> Any:
        read.append(file.name)
        return digest(file, kind)

    monkeypatch.setattr(hashlib, "file_digest", counting)
    for _ in range(2):
        assert find_problem(path) is None
    assert len(read) == len(set(read)) == 1030


def test_removal_takes_the_manifest_too(tmp_path: Path) -> None:
    remove_checkpoint(_save(tmp_path / "a.ckpt", b"1"))
    remove_checkpoint(_save_folder(tmp_path / "b.ckpt", a=b"1"))
    assert list(tmp_path.iterdir()) == []


def test_checkpoint_io_is_private_atomic_and_runs_no_code(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.ckpt"
    io = AtomicCheckpointIO()
    io.save_checkpoint({"state_dict": {"w": torch.ones(3)}, "global_step": 4}, path)
    assert find_problem(path) is None
    assert path.stat().st_mode & 0o777 == 0o600
    assert io.load_checkpoint(path)["global_step"] == 4

    class Code:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "executed"),))

    torch.save({"x": Code()}, path)
    for weights_only in (None, True):
        with pytest.raises(ResumeError, match="would run code: x"):
            io.load_checkpoint(path, weights_only=weights_only)
    assert not (tmp_path / "executed").exists()


def test_full_disk_keeps_the_older_checkpoint(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "256k"):
        path, io = tmp_path / "disk" / "last.ckpt", AtomicCheckpointIO()
        io.save_checkpoint({"w": torch.ones(4), "global_step": 1}, path)
        fill(tmp_path / "disk")
        with pytest.raises(StorageError, match=r"no space left on .*: 392 KiB needed, 0 B free"):
            io.save_checkpoint({"w": torch.ones(100_000), "global_step": 2}, path)
        assert find_problem(path) is None
        assert io.load_checkpoint(path)["global_step"] == 1
        assert [f.name for f in candidates(tmp_path / "disk", "last.ckpt")] == ["last.ckpt"]
        assert not (tmp_path / "disk" / ".last.ckpt.tmp").exists()
