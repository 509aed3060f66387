"""Which run and which checkpoint is evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from launcher.cli import main as cli
from launcher.core.errors import LauncherError, ResumeError, RunDirectoryError
from launcher.runs.selection import newest_matching_run
from launcher.training.evaluated_run import find_evaluated_run
from tests.support.run_directories import config, make_run


def save(run: Path, name: str, **callbacks: Any) -> Path:
    path = run / "checkpoints" / name
    torch.save({"state_dict": {}, "callbacks": callbacks}, path)
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Has a best, a newest and a last checkpoint, whose record is of the place where the run was before."""
    made = make_run(tmp_path, "first", checkpoint=None)
    save(made, "epoch=1.ckpt")
    save(made, "epoch=2.ckpt")
    newest = {"monitor": None, "best_model_path": "/gone/checkpoints/epoch=2.ckpt"}
    best = {"monitor": "val", "best_model_path": "/gone/checkpoints/epoch=1.ckpt"}
    # Lightning's names of callbacks have their settings in them.
    save(made, "last.ckpt", **{"ModelCheckpoint{'a': 1}": newest, "RunCheckpoint{'b': 2}": best, "EarlyStopping": {}})
    return made


@pytest.mark.parametrize(("asked", "name"), [("best", "epoch=1.ckpt"), ("last", "last.ckpt")])
def test_best_and_last_are_found(run: Path, tmp_path: Path, asked: str, name: str) -> None:
    found, notices = find_evaluated_run(config(tmp_path), asked)
    assert (found.path, found.resume_from, notices) == (run, run / "checkpoints" / name, ())
    assert found.wandb_id == (run / "wandb" / "run_id").read_text().strip()
    assert found.lock is None


def test_a_path_names_its_run_and_any_file_can_be_evaluated_for_a_run_that_is_named(run: Path, tmp_path: Path) -> None:
    inside = run / "checkpoints" / "epoch=2.ckpt"
    found, _ = find_evaluated_run(config(tmp_path / "elsewhere", None), str(inside))
    assert (found.path, found.resume_from) == (run, inside)
    outside = tmp_path / "downloaded.ckpt"
    torch.save({"state_dict": {}}, outside)
    found, _ = find_evaluated_run(config(tmp_path), str(outside))
    assert (found.path, found.resume_from) == (run, outside)


def test_a_checkpoint_from_elsewhere_is_evaluated_in_a_run_of_a_new_name(tmp_path: Path) -> None:
    outside = tmp_path / "plain.ckpt"
    torch.save({"state_dict": {}}, outside)
    runs = tmp_path / "runs"
    with pytest.raises(RunDirectoryError, match=r"to evaluate plain.ckpt in a new one, name that: --name NEW"):
        find_evaluated_run(config(runs, None), str(outside))
    with pytest.raises(ResumeError, match=r"gone\.ckpt does not exist"):
        find_evaluated_run(config(runs, "new"), str(tmp_path / "gone.ckpt"))
    assert not runs.exists()
    for _ in range(2):
        found, _notices = find_evaluated_run(config(runs, "new"), str(outside))
        assert (found.path, found.resume_from, found.lock) == (runs / "new", outside, None)
        assert found.wandb_id == (found.path / "wandb" / "run_id").read_text().strip()
    assert newest_matching_run(config(runs, None)) is None, "it has not trained"


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_a_run_that_is_named_brings_its_config(
    run: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "config.yaml").write_text(f"name: first\nruns_dir: {run.parent}\nseed: 77\n")
    named = ["--name", "first", "--runs-dir", str(run.parent)]
    inside = ["--checkpoint", str(run / "checkpoints" / "epoch=2.ckpt")]
    other = tmp_path / "other.yaml"
    other.write_text("seed: 5\n")
    for words, seed in ((named, 77), (inside, 77), ([*named, "--seed", "3"], 3), ([*named, "--config", str(other)], 5)):
        assert cli.run([command, *words, "--print-config"]) == 0
        assert yaml.safe_load(capsys.readouterr().out)["seed"] == seed
    assert cli.run([command, *named[2:], "--name", "frist", "--print-config"]) == 2
    assert "there is no run 'frist'" in capsys.readouterr().err


def test_without_a_name_it_is_the_newest_run_with_the_config(run: Path, tmp_path: Path) -> None:
    asked = config(tmp_path, None)
    assert newest_matching_run(asked) == "first"
    assert find_evaluated_run(asked, "last")[0].path == run


@pytest.mark.parametrize(
    ("name", "checkpoint", "kind", "says"),
    [
        ("other", "best", RunDirectoryError, "there is no run 'other'"),
        (None, "best", RunDirectoryError, "has no run with this config to evaluate"),
        ("first", "gone.ckpt", ResumeError, "gone.ckpt does not exist"),
        ("empty", "best", ResumeError, "has no checkpoint"),
        ("untold", "best", ResumeError, "names no best checkpoint that is still there"),
        ("broken", "last", ResumeError, "no checkpoint in .* is whole"),
    ],
)
def test_what_is_not_there_is_told_and_nothing_is_made(
    run: Path, tmp_path: Path, name: str | None, checkpoint: str, kind: type[LauncherError], says: str
) -> None:
    make_run(tmp_path, "empty", checkpoint=None, seed=1)
    save(make_run(tmp_path, "untold", checkpoint=None, seed=2), "last.ckpt")
    broken = save(make_run(tmp_path, "broken", checkpoint=None, seed=3), "last.ckpt")
    broken.with_name("last.ckpt.manifest").write_text('{"versions": [{"files": {"": [3, "0"]}}]}')
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(kind, match=says):
        find_evaluated_run(config(tmp_path, name, seed=42 if name else 7), checkpoint)
    assert sorted(tmp_path.rglob("*")) == before
