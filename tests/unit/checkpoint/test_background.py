"""Checkpoints that are written beside the training: what is copied, and what waits for what."""

from __future__ import annotations

import io
import os
import resource
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from launcher.checkpoint import snapshot as snapshots
from launcher.checkpoint.atomic_io import AtomicCheckpointIO
from launcher.checkpoint.background import BackgroundWriter
from launcher.checkpoint.manifest import find_problem, publish_again, read_step
from launcher.checkpoint.reader import Trust
from launcher.checkpoint.snapshot import HostMemoryError, SnapshotMemory
from launcher.core.errors import StorageError, TrainingError


class Held(BackgroundWriter):
    """Begins each write when `gate` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()

    def start(self, write: Any) -> None:
        super().start(lambda: (self.gate.wait(60), write()))


def _content() -> dict[str, Any]:
    base = torch.arange(100_000, dtype=torch.float32)
    tied = nn.Parameter(torch.ones(300, 300))
    return {
        "state_dict": {
            "a": tied,
            "b": tied,
            "view": base[10:20],
            "strided": base.view(100, 1000).t(),
            "empty": base[:0],
        },
        "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0), "momentum": torch.full((50_000,), 2.0)}}}],
        "half": torch.ones(70_000, dtype=torch.bfloat16),
        "callbacks": {"own": {"numbers": np.arange(5), "nested": [{"list": [1, 2]}, ("x", 3)]}},
        "global_step": 3,
    }


def _saved(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def _change(value: Any) -> None:
    """Every number in place, as a training does."""
    if isinstance(value, Tensor):
        with torch.no_grad():
            value.add_(1)
    elif isinstance(value, np.ndarray):
        value += 1
    elif isinstance(value, dict):
        for each in value.values():
            _change(each)
        value["new"] = 1
    elif isinstance(value, list):
        for each in value:
            _change(each)
        value.append(4)
    elif isinstance(value, tuple):
        for each in value:
            _change(each)


def test_a_snapshot_is_what_torch_would_have_written_whatever_changes_later() -> None:
    memory, content = SnapshotMemory(), _content()
    for _ in range(3):
        expected, file = _saved(content), io.BytesIO()
        taken = memory.take(content)
        _change(content)
        taken.write(file)
        assert file.getvalue() == expected
        assert _saved(content) != expected


def test_memory_of_large_tensors_is_used_again() -> None:
    memory, content = SnapshotMemory(), {"large": torch.zeros(100_000), "other": torch.zeros(200_000)}

    def places() -> list[int]:
        return [part.data_ptr() for _, part, size in memory.take(content).records if size >= 400_000]

    first = places()
    assert len(first) == 2
    assert places() == first
    content["other"] = torch.zeros(300_000)
    assert places()[0] == first[0]


def test_too_little_memory_writes_at_once_with_one_notice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "available_memory", lambda: 0)
    with pytest.raises(HostMemoryError, match=r"391 KiB needed, 0 B free"):
        SnapshotMemory().take({"a": torch.zeros(100_000)})
    notices: list[str] = []
    writer = BackgroundWriter(notices.append)
    plugin = AtomicCheckpointIO(Trust(tmp_path), background=writer)
    for name in ("a.ckpt", "b.ckpt"):
        with writer.opened():
            plugin.save_checkpoint(_content(), tmp_path / name)
            assert find_problem(tmp_path / name) is None
    assert len(notices) == 1
    assert notices[0].startswith("checkpoints are written while the training waits: the host has too little memory")


def test_only_an_accepted_save_is_written_in_the_background_and_the_next_one_waits(tmp_path: Path) -> None:
    writer = Held()
    plugin = AtomicCheckpointIO(Trust(tmp_path), background=writer)
    first, second = tmp_path / "a.ckpt", tmp_path / "b.ckpt"
    with writer.opened():
        plugin.save_checkpoint(_content(), first)
    assert not first.exists()
    threading.Timer(0.05, writer.gate.set).start()
    plugin.save_checkpoint(_content(), second)
    assert [find_problem(path) for path in (first, second)] == [None, None]
    assert first.read_bytes() == second.read_bytes() == _saved(_content())
    assert first.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("reader", ["load_checkpoint", "teardown"])
def test_a_reader_waits(tmp_path: Path, reader: str) -> None:
    writer = Held()
    plugin = AtomicCheckpointIO(Trust(tmp_path), background=writer)
    with writer.opened():
        plugin.save_checkpoint(_content(), tmp_path / "a.ckpt")
    threading.Timer(0.05, writer.gate.set).start()
    getattr(plugin, reader)(*([tmp_path / "a.ckpt"] if reader == "load_checkpoint" else []))
    assert find_problem(tmp_path / "a.ckpt") is None


def test_actions_follow_the_write_in_their_order() -> None:
    writer, done = Held(), []
    writer.after_write(lambda: done.append("at once"))
    with writer.opened():
        writer.after_write(lambda: done.append("event"))
        writer.start(lambda: done.append("file"))
    writer.after_write(lambda: done.append("removal"))
    assert done == ["at once"]
    writer.gate.set()
    writer.wait()
    writer.after_write(lambda: done.append("later"))
    assert done == ["at once", "file", "event", "removal", "later"]


def test_without_a_handed_over_write_actions_follow_the_save() -> None:
    writer, done = BackgroundWriter(), []
    with writer.opened():
        writer.after_write(lambda: done.append("event"))
        assert done == []
    assert done == ["event"]

    def fail() -> None:
        with writer.opened():
            writer.after_write(lambda: done.append("not reached"))
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        fail()
    writer.after_write(lambda: done.append("next"))
    assert done == ["event", "next"]


def test_an_error_is_raised_once_and_nothing_follows_a_failed_write(tmp_path: Path) -> None:
    writer, done = BackgroundWriter(), []
    plugin = AtomicCheckpointIO(Trust(tmp_path), background=writer)
    earlier = tmp_path / "run" / "earlier.ckpt"
    plugin.save_checkpoint(_content(), earlier)
    # A folder of that name: the file cannot be created, whoever runs this.
    (tmp_path / "run" / ".a.ckpt.tmp").mkdir()
    with writer.opened():
        plugin.save_checkpoint(_content(), tmp_path / "run" / "a.ckpt")
    writer._thread.join()  # pyright: ignore[reportPrivateUsage, reportOptionalMemberAccess]
    writer.after_write(earlier.unlink)
    with pytest.raises(OSError, match="directory"):
        writer.check()
    writer.check()
    assert done == []
    assert find_problem(earlier) is None
    with writer.opened():
        plugin.save_checkpoint(_content(), tmp_path / "run" / "b.ckpt")
    writer.wait()
    assert find_problem(tmp_path / "run" / "b.ckpt") is None


def test_errors_of_the_disk_and_of_objects_are_those_of_a_save_that_waits(tmp_path: Path) -> None:
    writer = BackgroundWriter()
    plugin = AtomicCheckpointIO(Trust(tmp_path), background=writer)
    with (
        pytest.raises(TrainingError, match=r"the checkpoint cannot be saved: own.f \(builtins.function\)"),
        writer.opened(),
    ):
        plugin.save_checkpoint({"own": {"f": lambda: 1}}, tmp_path / "a.ckpt")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with writer.opened():
            plugin.save_checkpoint(_content(), tmp_path / "a.ckpt")
        with pytest.raises(StorageError) as caught:
            writer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert (caught.value.reason, caught.value.needed_bytes) == ("quota", len(_saved(_content())))
    assert list(tmp_path.iterdir()) == []


def test_a_second_name_shares_the_file_and_replaces_the_older_checkpoint(tmp_path: Path) -> None:
    plugin = AtomicCheckpointIO(Trust(tmp_path))
    new, last = tmp_path / "step=3.ckpt", tmp_path / "last.ckpt"
    plugin.save_checkpoint({"global_step": 1}, last)
    plugin.save_checkpoint(_content(), new)
    publish_again(new, last)
    assert (find_problem(last), read_step(last), new.samefile(last)) == (None, 3, True)
    plugin.save_checkpoint({"global_step": 4}, last)
    assert (find_problem(new), read_step(new), read_step(last)) == (None, 3, 4)


def test_a_disk_without_hard_links_gets_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("no hard links")

    plugin = AtomicCheckpointIO(Trust(tmp_path))
    plugin.save_checkpoint(_content(), tmp_path / "a.ckpt")
    monkeypatch.setattr(os, "link", refuse)
    publish_again(tmp_path / "a.ckpt", tmp_path / "last.ckpt")
    assert find_problem(tmp_path / "last.ckpt") is None
    assert not (tmp_path / "a.ckpt").samefile(tmp_path / "last.ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.ckpt", "a.ckpt.manifest", "last.ckpt", "last.ckpt.manifest",
    ]  # fmt: skip


def test_forks_beside_a_write_run_and_the_file_is_valid(tmp_path: Path) -> None:
    # As loader workers that begin while a checkpoint is written.
    writer = BackgroundWriter()
    plugin = AtomicCheckpointIO(Trust(tmp_path), background=writer)
    with writer.opened():
        plugin.save_checkpoint({"state_dict": {"w": torch.zeros(10_000_000)}, "global_step": 1}, tmp_path / "a.ckpt")
    codes: list[int] = []
    for _ in range(5):
        pid = os.fork()
        if not pid:
            torch.save({"w": torch.zeros(1000)}, io.BytesIO())
            os._exit(0)
        codes.append(os.waitpid(pid, 0)[1])
    writer.wait()
    assert (codes, find_problem(tmp_path / "a.ckpt")) == ([0] * 5, None)
