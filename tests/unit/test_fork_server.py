from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from launcher.config import RunConfig, TrainerOptions
from launcher.errors import TopologyError
from launcher.fork_server import PreloadReport, choose_start_method
from launcher.launch_options import LaunchOptions
from launcher.local_start import modules_to_preload
from launcher.preload import USER_MODULES, preload
from launcher.ranks import likely_ranks, wanted_ranks


def test_ranks_are_forked_unless_that_would_break_them() -> None:
    assert choose_start_method(PreloadReport()) == ("forkserver", None)
    assert choose_start_method(PreloadReport(failed=(("mine", "ValueError"),))) == ("forkserver", None)
    for report, word in (
        (None, "died"),
        (PreloadReport(cuda=True), "initialises CUDA"),
        (PreloadReport(threads=("mine",)), "starts threads (mine)"),
    ):
        method, notice = choose_start_method(report)
        assert method == "spawn"
        assert notice is not None
        assert word in notice


def test_a_module_that_fails_is_noted_and_the_next_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "fails_on_import.py").write_text("raise ValueError('mine')\n")
    (tmp_path / "exits_on_import.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "works_on_import.py").write_text("")
    report = preload(["fails_on_import", "exits_on_import", "nowhere_at_all", USER_MODULES, "works_on_import"])
    assert [name for name, _ in report["failed"]] == ["fails_on_import", "exits_on_import", "nowhere_at_all"]
    assert report["failed"][0][1] == "ValueError: mine"
    assert "works_on_import" in sys.modules
    assert report["threads"] == []


def test_threads_of_the_users_modules_count_and_those_of_libraries_do_not(tmp_path: Path) -> None:
    # In a process of its own: a thread started on import cannot be taken back.
    thread = "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True, name='{}').start()\n"
    (tmp_path / "library.py").write_text(thread.format("theirs"))
    (tmp_path / "users.py").write_text(thread.format("mine"))
    script = "from launcher.preload import preload; print(preload(['library', ':', 'users'])['threads'])"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "['mine']\n"


def test_what_is_preloaded() -> None:
    config = RunConfig(
        model={"class_path": "mine.Model", "init_args": {"inner": {"class_path": "other.pkg.Inner"}}},
        data={"class_path": "mine.Data"},
        trainer=TrainerOptions(callbacks=[{"class_path": "calls.Back"}]),
    )
    modules = modules_to_preload(config, {})
    assert modules[modules.index(USER_MODULES) + 1 :] == ["mine", "other.pkg", "calls"]
    assert "wandb" in modules
    assert "deepspeed" not in modules
    # Imported before its accelerator is known it would take the wrong one.
    zero = RunConfig(strategy="deepspeed_stage_2")
    assert "deepspeed" in modules_to_preload(zero, {"DS_ACCELERATOR": "cpu"})
    assert "deepspeed" not in modules_to_preload(zero, {})


@pytest.mark.parametrize(
    ("config", "options", "ranks"),
    [
        (RunConfig(), LaunchOptions(), 1),
        (RunConfig(devices=3), LaunchOptions(), 3),
        (RunConfig(), LaunchOptions(nproc_per_node=4), 4),
        (RunConfig(accelerator="cpu"), LaunchOptions(nproc_per_node="cpu"), 7),
        (RunConfig(accelerator="cpu"), LaunchOptions(nproc_per_node="auto"), 7),
    ],
)
def test_the_number_of_ranks_and_the_guess_without_torch(
    config: RunConfig, options: LaunchOptions, ranks: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 7)
    assert wanted_ranks(config, options) == ranks
    assert likely_ranks(config, options, gpus=tmp_path / "none") == ranks


def test_the_guess_counts_the_drivers_gpus(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    assert likely_ranks(RunConfig(), LaunchOptions(), gpus=tmp_path) == 2
    assert likely_ranks(RunConfig(accelerator="cpu"), LaunchOptions(), gpus=tmp_path) == 1


def test_two_different_numbers_of_ranks_are_refused() -> None:
    with pytest.raises(TopologyError, match="--nproc-per-node means 4 ranks here, but devices is 2"):
        wanted_ranks(RunConfig(devices=2), LaunchOptions(nproc_per_node=4))


def test_the_agents_modules_that_come_before_torch_do_not_import_it() -> None:
    script = ("import sys, launcher.cli, launcher.local_start, launcher.fork_server, launcher.ranks\n"
              "print([m for m in ('torch', 'lightning', 'wandb', 'deepspeed') if m in sys.modules])")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"
