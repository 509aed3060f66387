"""Folders in the working directory with the names of the launcher's packages."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from launcher.core.errors import ConfigError
from launcher.process.background import is_running
from launcher.runs.submission_record import read_records
from launcher.user_code.imports import import_class
from slurm.job import SlurmJob
from slurm.render import JobExecutor
from tests.support.processes import run, torchrun
from tests.support.runs import events_of
from tests.support.slurm_cluster import wait_until

_THEIRS = "from lightning.pytorch.demos.boring_classes import BoringModel\nclass Net(BoringModel): pass\n"
_FIT = ("--model", "theirs.Net", "--trainer.max_steps", "2", "--trainer.limit_val_batches", "0",
        "--accelerator", "cpu", "--wandb.mode", "disabled", "--name", "it")  # fmt: skip


def _folders(place: Path, *names: str) -> None:
    for name in names:
        (place / name).mkdir()
        (place / name / "__init__.py").write_text("raise RuntimeError('imported by mistake')\n")
    (place / "theirs.py").write_text(_THEIRS)


@pytest.mark.slow
def test_folders_are_not_imported_by_the_console_script_its_background_run_and_its_ranks(tmp_path: Path) -> None:
    _folders(tmp_path, "strategies", "slurm", "launcher")
    script = str(Path(sys.executable).with_name("launcher"))
    run([script, "submit", "--cluster", "local", *_FIT, "--devices", "2"], tmp_path, timeout=180).check()
    record = read_records(tmp_path / "runs" / "it")[-1]
    try:
        wait_until("the end", lambda: not is_running(record["pid"], record["started"]), 180)
    finally:
        if is_running(record["pid"], record["started"]):
            os.killpg(record["pid"], signal.SIGKILL)
    assert [event["step"] for event in events_of(tmp_path / "runs" / "it", "finished")] == [2]


@pytest.mark.slow
def test_folders_are_not_imported_under_torchrun(tmp_path: Path) -> None:
    # `-m` imports a folder named launcher before any code of the launcher runs.
    _folders(tmp_path, "strategies", "slurm")
    run(torchrun(1, "fit", *_FIT), tmp_path, timeout=180).check()
    assert [event["step"] for event in events_of(tmp_path / "runs" / "it", "finished")] == [2]


def test_a_slurm_task_does_not_search_the_working_directory_first(tmp_path: Path) -> None:
    script = JobExecutor(SlurmJob("it"), tmp_path, "/a b/python").batch_script()
    assert "'/a b/python' -P -u -m submitit.core._submit" in script


@pytest.mark.parametrize("path", ["strategies.dqn.Net", "strategies.Net", "uses_it.Net", "uses_name.Net",
                                  "uses_attribute.Net"])  # fmt: skip
def test_a_class_in_such_a_folder_is_rejected_with_the_folders_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    (tmp_path / "strategies").mkdir()
    (tmp_path / "uses_it.py").write_text("from strategies.dqn import Net\n")
    (tmp_path / "uses_name.py").write_text("from strategies import dqn\n")
    (tmp_path / "uses_attribute.py").write_text("import strategies\nNet = strategies.NET\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError) as caught:
        import_class(path, object, "model.class_path")
    (problem,) = caught.value.problems
    assert problem.message.startswith(f"{tmp_path}/strategies has the name of one of the launcher's own packages")


def test_a_package_of_such_a_name_that_was_imported_first_is_reported(tmp_path: Path) -> None:
    _folders(tmp_path, "slurm")
    (tmp_path / "slurm" / "__init__.py").write_text("")
    ended = run([sys.executable, "-c", "import slurm, launcher"], tmp_path).check(1)
    assert "launcher has a package of that name: rename it, or import launcher first" in ended.output
