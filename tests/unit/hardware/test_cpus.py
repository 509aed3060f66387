"""`launcher.hardware.cpus`: cores that may be used, by affinity and by control groups."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launcher.hardware.cpus import usable_cpus


def _group(root: Path, path: str, **files: str) -> None:
    folder = root / path
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", 6), ("400000 100000", 4), ("150000 100000", 1), ("50000 100000", 1), ("1600000 100000", 6)],
)
def test_a_quota_below_the_affinity_mask_counts(
    quota: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    proc = tmp_path / "self"
    proc.write_text("0::/job/step\n")
    _group(tmp_path, "fs/job", cpu__max=quota)
    _group(tmp_path, "fs/job/step", cpu__max="max 100000")
    assert usable_cpus(proc, tmp_path / "fs") == cores


def test_version_1_and_a_path_of_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    proc = tmp_path / "self"
    proc.write_text("12:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n0::/\n")
    _group(tmp_path, "fs/cpu", cpu__cfs_quota_us="300000\n", cpu__cfs_period_us="100000\n")
    assert usable_cpus(proc, tmp_path / "fs") == 3
    _group(tmp_path, "fs/cpu", cpu__cfs_quota_us="-1\n")
    assert usable_cpus(proc, tmp_path / "fs") == 6


def test_this_process_has_a_core(tmp_path: Path) -> None:
    assert 1 <= usable_cpus() <= len(os.sched_getaffinity(0))
    assert usable_cpus(tmp_path / "none") == len(os.sched_getaffinity(0))
