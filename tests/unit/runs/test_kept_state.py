"""The state that survivors of a failure have saved: which one the next attempt uses."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from launcher.checkpoint.atomic_io import AtomicCheckpointIO
from launcher.checkpoint.reader import Trust
from launcher.config.schema import RunConfig
from launcher.runs.kept_state import KEPT_STATES, find_kept_state, find_kept_step, remove_kept_states, state_path
from launcher.runs.selection import find_run


def _save(folder: Path, batches: int, step: int, name: str | None = None) -> Path:
    path = state_path(folder, batches) if name is None else folder / name
    AtomicCheckpointIO(Trust(folder)).save_checkpoint({"global_step": step, "weights": torch.rand(64)}, path)
    return path


def _damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif how == "changed":
        path.write_bytes(data[:200] + bytes([data[200] ^ 1]) + data[201:])
    elif how == "no manifest":
        path.with_name(f"{path.name}.manifest").unlink()
    else:
        path.write_bytes(b"")


def test_the_later_of_two_states_is_used(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    _save(tmp_path, 9, 9)
    later = _save(tmp_path / "disk", 10, 10)
    (tmp_path / "kept-step-12.claim").touch()
    assert find_kept_state([tmp_path, None, tmp_path / "disk"]) == (later, ())
    assert find_kept_step([tmp_path, tmp_path / "disk"]) == 10
    remove_kept_states(tmp_path)
    assert find_kept_state([tmp_path]) == (None, ())
    assert not list(tmp_path.glob("kept-step-*"))


@pytest.mark.parametrize("how", ["cut", "changed", "no manifest", "empty"])
def test_a_damaged_state_is_skipped_with_a_notice(tmp_path: Path, how: str) -> None:
    before, later = _save(tmp_path, 9, 9), _save(tmp_path, 10, 10)
    _damage(later, how)
    found, notices = find_kept_state([tmp_path])
    assert found == before
    assert len(notices) == 1
    assert str(later) in notices[0]


@pytest.mark.parametrize(("kept", "saved", "uses_kept"), [(7, 4, True), (7, 7, True), (7, 8, False), (7, None, True)])
@pytest.mark.parametrize("on_disk", [False, True])
def test_a_restart_continues_from_the_later_of_state_and_checkpoint(
    tmp_path: Path, kept: int, saved: int | None, uses_kept: bool, on_disk: bool
) -> None:
    run, memory = tmp_path / "runs" / "a", tmp_path / "memory"
    (run / "checkpoints").mkdir(parents=True, mode=0o700)
    run.chmod(0o700)
    memory.mkdir()
    (run / "config.yaml").write_text(RunConfig().to_yaml())
    folder = run / KEPT_STATES if on_disk else memory
    folder.mkdir(exist_ok=True)
    state = _save(folder, kept, kept)
    last = None if saved is None else _save(run / "checkpoints", 0, saved, "last.ckpt")
    config = RunConfig(name="a", runs_dir=str(tmp_path / "runs"), resume="auto")
    place = find_run(config, restart_of="a", kept_folder=memory)
    assert place.resume_from == (state if uses_kept else last)
    # Another launch starts from what the run itself has saved.
    shutil.rmtree(memory)
    later = find_run(config, kept_folder=None)
    assert later.resume_from == last
