"""Run directories for tests: created, inspected, and on a full disk."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from launcher.config.schema import RunConfig
from launcher.runs.directory import RunDirectory, open_run_directory

MODEL = {"class_path": "my_pkg.Model", "init_args": {"lr": 1e-5}}


def config(runs: Path, name: str | None = "first", **more: Any) -> RunConfig:
    return RunConfig(**{"name": name, "runs_dir": str(runs), "model": MODEL, **more})


def ended(run: RunDirectory) -> RunDirectory:
    """Release the lock, as if the run's process had ended."""
    assert run.lock is not None
    run.release()
    return run


def make_run(runs: Path, name: str = "first", checkpoint: str | None = "last.ckpt", **more: Any) -> Path:
    run = ended(open_run_directory(config(runs, name, **more)))
    if checkpoint:
        (run.checkpoints / checkpoint).write_bytes(b"weights")
    return run.path


def everything(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mode, path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size},nr_inodes=100", "none", str(folder)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if mounted.returncode:
        reason = f"needs the right to mount a tmpfs: {mounted.stderr.strip()}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> None:
    with (folder / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)
