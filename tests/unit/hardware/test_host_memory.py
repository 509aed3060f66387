"""Free memory of the host, and of the control group of this process."""

from __future__ import annotations

from pathlib import Path

from launcher.hardware.host_memory import available_memory


def _machine(folder: Path, *, group: str = "0::/job\n", limit: str = "max") -> tuple[Path, Path]:
    proc, groups = folder / "proc", folder / "cgroup"
    (proc / "self").mkdir(parents=True)
    (groups / "job").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 100 kB\nMemFree: 10 kB\nMemAvailable: 60 kB\n")
    (proc / "self" / "cgroup").write_text(group)
    (groups / "job" / "memory.max").write_text(limit)
    (groups / "job" / "memory.current").write_text("20480")
    (groups / "job" / "memory.stat").write_text("anon 10000\nfile 4096\n")
    return proc, groups


def test_the_smaller_of_machine_and_group_counts(tmp_path: Path) -> None:
    assert available_memory(*_machine(tmp_path / "free")) == 60 << 10
    assert available_memory(*_machine(tmp_path / "limited", limit="40960")) == 40960 - 20480 + 4096
    assert available_memory(*_machine(tmp_path / "full", limit="4096")) == 0
    assert available_memory(*_machine(tmp_path / "version 1", group="3:memory:/job\n", limit="4096")) == 60 << 10


def test_an_unknown_system_has_no_answer(tmp_path: Path) -> None:
    assert available_memory(tmp_path, tmp_path) is None


def test_this_machine_has_free_memory() -> None:
    assert (available_memory() or 0) > 1 << 20
