"""The page of a sweep: sorted by the monitored metric, with members that failed or did not start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.cli.main import run
from launcher.config.schema import CheckpointOptions
from launcher.report.command import render
from launcher.report.sweep_source import read_sweep
from tests.support.made_run import START, MadeRun
from tests.unit.report.test_report_page import Outline

VALUES = [0.5, 0.9, None, 0.7]


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Members 0, 1 and 3 have values, 2 failed before one, and 4 is not queued."""
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "runs"
    names = [
        {"index": i, "name": f"s-{i}", "overrides": {"model.lr": 0.1 * i, "hub.token": "s3cret"}} for i in range(5)
    ]
    for member, value in zip(names, VALUES, strict=False):
        made = MadeRun(runs / member["name"], checkpoint=CheckpointOptions(monitor="val_acc", mode="max"))
        made.start()
        made.step(10)
        if value is None:
            made.write_event("failed", host="n1", error="ValueError: no")
            continue
        made.ranks(10)
        for step in (10, 20):
            made.write_event("validation", 1, step=step, metrics={"val_acc": value - step / 100})
        if member["index"] == 1:
            made.write_event("validation", 1, step=30, metrics={"val_acc": "nan"})
        made.write_event("finished", step=20, metrics={}, reason="max_steps")
    (runs / "s").mkdir()
    (runs / "s/sweep.json").write_text(json.dumps(names))
    return runs / "s"


def test_the_members_are_sorted_and_the_best_is_marked(sweep: Path) -> None:
    outline = Outline(render(read_sweep(sweep), START))
    page = outline.text
    assert "5 members: 3 done, 1 failed, 1 not queued; the best val_acc is 0.8, of s-1" in page
    order = [page.index(row) for row in ("1 best lr=0.1", "3 lr=0.3", "0 lr=0.0", "2 lr=0.2", "4 lr=0.4")]
    assert order == sorted(order)
    assert "0.8 NaN 30" in page, "the last value is shown as it is"
    assert "failed rank 0 on n1: ValueError: no" in page
    assert "not queued" in page
    assert "best, last : values of val_acc; the highest is the best" in page
    assert [attrs for tag, attrs in outline.tags if tag == "tr"].count({"class": "marked"}) == 1
    assert "s3cret" not in page
    assert {"members", "curves", "metrics", "config"} <= set(outline.ids())


@pytest.mark.parametrize("word", ["s", "runs/s", "runs/s/"])
def test_a_sweep_is_found_by_name_and_by_folder(sweep: Path, capsys: pytest.CaptureFixture[str], word: str) -> None:
    assert run(["report", word]) == 0
    summary = "s: 5 members: 3 done, 1 failed, 1 not queued; the best val_acc is 0.8, of s-1"
    assert capsys.readouterr().out == f"{summary}\n{sweep / 'report.html'}\n"
    assert (sweep / "report.html").stat().st_mode & 0o777 == 0o600


def test_a_sweep_as_json_has_its_members_with_their_runs(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["report", "s", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["monitor"], found["mode"], found["best"]) == ("val_acc", "max", "s-1")
    assert [member["name"] for member in found["members"]] == ["s-1", "s-3", "s-0", "s-2", "s-4"]
    best, *_, failed, waiting = found["members"]
    assert (best["best"], best["last"], best["run"]["metrics"]["val_acc"]["highest"]) == (0.8, None, 0.8)
    assert (failed["state"], failed["detail"]) == ("failed", "rank 0 on n1: ValueError: no")
    assert (waiting["state"], waiting["run"]) == ("not queued", None)
    assert not (sweep / "report.html").exists()


def test_a_sweep_with_other_runs_is_a_usage_error(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["report", "s", "s-0"]) == 2
    assert "given the sweep 's' with other names; a sweep has a page of its own, so give it alone" in (
        capsys.readouterr().err
    )


def test_a_sweep_of_which_no_member_has_started_is_shown(sweep: Path) -> None:
    (sweep.parent / "t").mkdir()
    members = [{"index": 0, "name": "t-0", "overrides": {"seed": 1}}]
    (sweep.parent / "t/sweep.json").write_text(json.dumps(members))
    page = Outline(render(read_sweep(sweep.parent / "t"), START)).text
    assert "1 member: 1 not queued" in page
    assert "best val_loss" in page
