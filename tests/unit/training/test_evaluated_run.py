"""Which run and which checkpoint is evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from launcher.cli import main as cli
from launcher.core.errors import LauncherError, ResumeError, RunDirectoryError
from launcher.runs.selection import find_newest_matching_run
from launcher.training.evaluated_run import find_evaluated_run
from tests.support.run_directories import config, make_run


def save(run: Path, name: str, **callbacks: Any) -> Path:
    path = run / "checkpoints" / name
    torch.save({"state_dict": {}, "callbacks": callbacks}, path)
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with a best, a newest and a last checkpoint; the recorded paths are those before the run was moved."""
    made = make_run(tmp_path, "first", checkpoint=None)
    save(made, "epoch=1.ckpt")
    save(made, "epoch=2.ckpt")
    newest = {"monitor": None, "best_model_path": "/gone/checkpoints/epoch=2.ckpt"}
    best = {"monitor": "val", "best_model_path": "/gone/checkpoints/epoch=1.ckpt"}
    # Lightning's state keys of callbacks contain their settings.
    save(made, "last.ckpt", **{"ModelCheckpoint{'a': 1}": newest, "RunCheckpoint{'b': 2}": best, "EarlyStopping": {}})
    return made


@pytest.mark.parametrize(("asked", "name"), [("best", "epoch=1.ckpt"), ("last", "last.ckpt")])
def test_best_and_last_are_found(run: Path, tmp_path: Path, asked: str, name: str) -> None:
    found, notices = find_evaluated_run(config(tmp_path), asked)
    assert (found.path, found.resume_from, notices) == (run, run / "checkpoints" / name, ())
    assert found.wandb_id == (run / "wandb" / "run_id").read_text().strip()
    assert found.lock is None


def test_path_names_its_run_and_any_file_is_evaluated_for_a_named_run(run: Path, tmp_path: Path) -> None:
    inside = run / "checkpoints" / "epoch=2.ckpt"
    found, _ = find_evaluated_run(config(tmp_path / "elsewhere", None), str(inside))
    assert (found.path, found.resume_from) == (run, inside)
    # Of a ModelCheckpoint of the user's, which follows the logger's folder.
    (run / "events.jsonl").touch()
    logged = run / "project" / "id" / "checkpoints" / "epoch=3.ckpt"
    logged.parent.mkdir(parents=True)
    torch.save({"state_dict": {}}, logged)
    found, _ = find_evaluated_run(config(tmp_path / "elsewhere", None), str(logged))
    assert (found.path, found.resume_from) == (run, logged)
    outside = tmp_path / "downloaded.ckpt"
    torch.save({"state_dict": {}}, outside)
    found, _ = find_evaluated_run(config(tmp_path), str(outside))
    assert (found.path, found.resume_from) == (run, outside)


def test_checkpoint_outside_of_runs_is_evaluated_in_a_new_run(tmp_path: Path) -> None:
    outside = tmp_path / "plain.ckpt"
    torch.save({"state_dict": {}}, outside)
    runs = tmp_path / "runs"
    with pytest.raises(RunDirectoryError, match=r"to evaluate plain.ckpt in a new run, give its name: --name NEW"):
        find_evaluated_run(config(runs, None), str(outside))
    with pytest.raises(ResumeError, match=r"gone\.ckpt does not exist"):
        find_evaluated_run(config(runs, "new"), str(tmp_path / "gone.ckpt"))
    assert not runs.exists()
    for _ in range(2):
        found, _notices = find_evaluated_run(config(runs, "new"), str(outside))
        assert (found.path, found.resume_from, found.lock) == (runs / "new", outside, None)
        assert found.wandb_id == (found.path / "wandb" / "run_id").read_text().strip()
    assert find_newest_matching_run(config(runs, None)) is None, "it has not trained"


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_config_of_a_named_run_is_used(
    run: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = "model: {class_path: tests.support.toy.Noisy}\n"
    (run / "config.yaml").write_text(f"name: first\nruns_dir: {run.parent}\nseed: 77\n{model}")
    named = ["--name", "first", "--runs-dir", str(run.parent)]
    inside = ["--checkpoint", str(run / "checkpoints" / "epoch=2.ckpt")]
    other = tmp_path / "other.yaml"
    other.write_text(f"seed: 5\n{model}")
    for given, seed in (
        (named, 77),
        (inside, 77),
        ([*named, "--seed", "3"], 3),
        ([*named, "--config", str(other)], 5),
    ):
        assert cli.run([command, *given, "--print-config"]) == 0
        assert yaml.safe_load(capsys.readouterr().out)["seed"] == seed
    assert cli.run([command, *named[2:], "--name", "frist", "--print-config"]) == 2
    assert "there is no run 'frist'" in capsys.readouterr().err


def test_newest_run_with_the_config_is_used_without_a_name(run: Path, tmp_path: Path) -> None:
    asked = config(tmp_path, None)
    assert find_newest_matching_run(asked) == "first"
    assert find_evaluated_run(asked, "last")[0].path == run


@pytest.mark.parametrize(
    ("name", "checkpoint", "kind", "expected"),
    [
        ("other", "best", RunDirectoryError, "there is no run 'other'"),
        (None, "best", RunDirectoryError, "has no run with this config; give the run to evaluate"),
        ("first", "gone.ckpt", ResumeError, "gone.ckpt does not exist"),
        ("empty", "best", ResumeError, "has no checkpoint"),
        ("untold", "best", ResumeError, "names no best checkpoint that still exists"),
        ("broken", "last", ResumeError, "no checkpoint in .* is valid"),
    ],
)
def test_missing_run_or_checkpoint_is_reported_and_nothing_is_created(
    run: Path, tmp_path: Path, name: str | None, checkpoint: str, kind: type[LauncherError], expected: str
) -> None:
    make_run(tmp_path, "empty", checkpoint=None, seed=1)
    save(make_run(tmp_path, "untold", checkpoint=None, seed=2), "last.ckpt")
    broken = save(make_run(tmp_path, "broken", checkpoint=None, seed=3), "last.ckpt")
    broken.with_name("last.ckpt.manifest").write_text('{"versions": [{"files": {"": [3, "0"]}}]}')
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(kind, match=expected):
        find_evaluated_run(config(tmp_path, name, seed=42 if name else 7), checkpoint)
    assert sorted(tmp_path.rglob("*")) == before
