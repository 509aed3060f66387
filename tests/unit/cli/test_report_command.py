"""`launcher report`: its arguments, its output file, and its errors."""

from __future__ import annotations

import json
import sys
import webbrowser
from pathlib import Path

import pytest

from launcher.cli.main import run
from launcher.runs.lock import acquire_lock
from tests.support.made_run import MadeRun
from tests.support.run_directories import everything


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MadeRun:
    monkeypatch.chdir(tmp_path)
    run = MadeRun(tmp_path / "runs" / "first")
    run.start()
    run.step(10)
    run.step(20)
    run.write_event("finished", step=20, metrics={})
    return run


@pytest.mark.parametrize("word", ["first", "runs/first", "runs/first/", "runs/first/events.jsonl"])
def test_a_run_is_found_by_name_and_by_path_and_only_its_report_is_added(
    made: MadeRun, capsys: pytest.CaptureFixture[str], word: str
) -> None:
    before = everything(made.path)
    assert run(["report", word]) == 0
    report = made.path / "report.html"
    assert report.stat().st_mode & 0o777 == 0o600
    assert report.read_text().startswith("<!doctype html>")
    assert capsys.readouterr().out == f"first: 20 steps, finished\n{report}\n"
    after = everything(made.path)
    after.pop("report.html")
    assert after == before


def test_only_an_earlier_report_is_replaced(made: MadeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert run(["report", "first", "--output", "mine.html"]) == 0
    (tmp_path / "notes.html").write_text("mine")
    assert run(["report", "first", "--output", "notes.html"]) == 2
    assert (tmp_path / "notes.html").read_text() == "mine"
    assert "notes.html exists and is not a report; give another file" in capsys.readouterr().err
    assert run(["report", "first", "--output", "runs"]) == 2
    assert "runs is a folder; give a file, such as runs/report.html" in capsys.readouterr().err
    assert run(["report", "first", "--output", "none/here.html"]) == 2
    assert "cannot be written: No such file or directory; give another file with --output" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["frist"], "did you mean first? the runs in runs, newest first: first"),
        (["zzz"], "no run 'zzz' found, as a directory or in runs; the runs in runs"),
        (["runs"], "runs contains runs and is not a run; the runs in runs, newest first: first"),
        (["empty"], "is not a run directory: it contains none of events.jsonl, config.yaml, plan.json"),
        ([], "given no run; expected one, or several to compare; the runs in runs"),
        ([""], "expected a run's name or directory"),
        (["a\0b"], "expected a run's name or directory"),
        (["zzz", "--runs-dir", "none"], "none contains no run yet (--runs-dir sets the folder)"),
        (["x" * 300], "cannot be read: File name too long"),
    ],
)
def test_an_unknown_run_is_a_usage_error_that_lists_the_runs(
    made: MadeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], text: str
) -> None:
    (tmp_path / "empty").mkdir()
    assert run(["report", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert text in captured.err
    assert captured.out == ""
    assert not (made.path / "report.html").exists()


def test_the_report_of_a_running_run_states_that_it_runs(made: MadeRun, capsys: pytest.CaptureFixture[str]) -> None:
    made.start(at_step=20)
    made.append('{"time":1,"rank":0,"kind":"st')
    lock = acquire_lock(made.path, {})
    assert run(["report", "first"]) == 0
    output = capsys.readouterr().out
    assert "first: 21 steps, running, 2 attempts\n" in output
    assert "  notice: 1 line of events.jsonl could not be read" in output
    assert "still running" in (made.path / "report.html").read_text()
    lock.release()
    assert run(["report", "first"]) == 0
    assert "first: 21 steps, unknown, 2 attempts\n" in capsys.readouterr().out
    # Nothing holds the lock afterwards.
    acquire_lock(made.path, {}).release()


def test_two_runs_are_compared_in_a_file_named_after_both(made: MadeRun, capsys: pytest.CaptureFixture[str]) -> None:
    MadeRun(made.path.parent / "second").start()
    assert run(["report", "first", "second"]) == 0
    assert (made.path / "report-with-second.html").stat().st_mode & 0o777 == 0o600
    assert not (made.path / "report.html").exists()
    assert capsys.readouterr().out.startswith("first: 20 steps, finished\nsecond: 1 step, unknown\n")


@pytest.mark.parametrize("shown", [True, False])
def test_open_opens_the_page_or_reports_that_there_is_no_browser(
    made: MadeRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shown: bool
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda url: asked.append(url) or shown)
    assert run(["report", "first", "--open"]) == 0
    assert asked == [(made.path / "report.html").as_uri()]
    assert ("no browser found" in capsys.readouterr().err) != shown


def test_without_matplotlib_the_error_has_the_install_command(
    made: MadeRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run(["report", "first"]) == 2
    assert capsys.readouterr().err == 'error: launcher report needs matplotlib: pip install "training-launcher[plot]"\n'
    assert not (made.path / "report.html").exists()


def test_json_prints_the_values_and_writes_nothing(made: MadeRun, capsys: pytest.CaptureFixture[str]) -> None:
    second = MadeRun(made.path.parent / "second")
    second.start()
    second.write_event("step", 1, step=2, seconds_per_step=0.1, metrics={"loss": "nan"}, learning_rate=[0.1])
    second.write_event("alert", alert="not_finite", title="loss", text="look at it", ranks=[1], step=2)
    second.write_event("failed", error="boom", host="n1")
    before = everything(made.path.parent)
    assert run(["report", "first", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert (first["name"], first["outcome"], first["steps"]) == ("first", "finished", 20)
    assert first["figures"]["time a step"] == 0.1
    assert first["figures"]["precision"] == "bf16-mixed"
    assert [(a["number"], a["start_step"], a["end_step"]) for a in first["attempts"]] == [(1, 0, 20)]
    assert run(["report", "first", "second", "--json"]) == 0
    _, other = json.loads(capsys.readouterr().out)
    assert other["attempts"][0]["detail"] == "rank 0 (n1): boom"
    assert other["alerts"][0]["ranks"] == [1]
    assert other["figures"]["loss"] is None, "JSON has no NaN"
    assert everything(made.path.parent) == before
    assert run(["report", "first", "--json", "--open"]) == 2
    assert "remove one of them" in capsys.readouterr().err


def test_json_needs_no_matplotlib(made: MadeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run(["report", "first", "--json"]) == 0
