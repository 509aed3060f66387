"""A run is given by its name, or by its path or one in it, to each command that takes one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.cli import cancel, logs, status
from launcher.core.errors import LauncherError, NoSuchRunError, ReportError
from launcher.report.source import find_run_directory, find_sweep_folder
from launcher.runs.lookup import find_run_named, locate_run
from launcher.runs.sweep_record import write_members

# From the folder that contains `runs`; FOLDER is its absolute path.
FOUND = ("it", "it/", "runs/it", "runs/it/", "./runs/it", "runs/../runs/it", "FOLDER/runs/it", "runs/it/logs",
         "runs/it/logs/rank-0.log", "it/logs", "runs/it/events.jsonl", "linked")  # fmt: skip
MISSING = ("it-2", "runs/it-2", "runs/it/nothing", ".", "..", "runs", "", " ", "\0", "it\0", "project", "x" * 300)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    run = tmp_path / "runs" / "it"
    (run / "logs").mkdir(parents=True)
    (run / "logs" / "rank-0.log").write_text("a line of rank 0\n")
    events = ({"kind": "run_started"}, {"kind": "planned"}, {"kind": "finished", "step": 4, "reason": "max_epochs"})
    (run / "events.jsonl").write_text("".join(json.dumps({"time": 1.0, "rank": 0, **each}) + "\n" for each in events))
    (run / "config.yaml").write_text("seed: 1\n")
    (tmp_path / "linked").symlink_to(run)
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "config.yaml").write_text("of the user's own program: 1\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("given", FOUND)
def test_each_command_finds_the_run(folder: Path, capfd: pytest.CaptureFixture[str], given: str) -> None:
    given = given.replace("FOLDER", str(folder))
    name = "linked" if given == "linked" else "it"
    assert status.run([given]) == 0
    assert capfd.readouterr().out.splitlines()[1].split()[:2] == [name, "done"]
    assert logs.run([given]) == 0
    assert capfd.readouterr().out == "a line of rank 0\n"
    assert cancel.run([given]) == 0
    assert capfd.readouterr().out == f"run {name} is not running: done\n"
    assert find_run_directory(given, Path("runs")).resolve() == folder / "runs" / "it"


@pytest.mark.parametrize("inside", [".", "logs", "logs/.."])
def test_the_current_folder_is_a_path_too(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, inside: str
) -> None:
    monkeypatch.chdir(folder / "runs" / "it" / inside)
    assert status.run(["."]) == 0
    assert capfd.readouterr().out.splitlines()[1].startswith("it ")
    assert find_run_directory(".", Path("runs")).resolve() == folder / "runs" / "it"


@pytest.mark.parametrize("given", MISSING)
def test_what_is_no_run_is_reported(given: str) -> None:
    for command in (status.run, logs.run, cancel.run):
        with pytest.raises(NoSuchRunError, match="there is no run"):
            command([given])
    # A report is also made of a run directory that lost its events.
    if given != "project":
        with pytest.raises(ReportError):
            find_run_directory(given, Path("runs"))


@pytest.mark.parametrize("given", ["runs/itt", "runs/itt/", "itt"])
def test_a_similar_name_is_suggested_for_a_path(given: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: find_run_named(Path("runs"), given),
        lambda: find_run_directory(given, Path("runs")),
    ]
    for call in calls:
        with pytest.raises(LauncherError, match=r"did you mean it\?"):
            call()


@pytest.mark.parametrize("given", ["grid", "grid/", "runs/grid", "FOLDER/runs/grid", "runs/grid/sweep.json"])
def test_a_sweep_is_found_by_its_path(folder: Path, given: str) -> None:
    sweep = folder / "runs" / "grid"
    sweep.mkdir()
    write_members(sweep, [{"index": 0, "name": "grid-0", "overrides": {}}])
    given = given.replace("FOLDER", str(folder))
    found = locate_run(Path("runs"), given)
    assert Path(os.path.abspath(found[0] / found[1])) == sweep  # noqa: PTH100 -- without resolving links
    if not given.endswith(".json"):
        assert find_sweep_folder(given, Path("runs")) == sweep
