"""`launcher.runs.directory`: one run has one folder, and earlier runs are not changed."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.config.schema import TrainerOptions
from launcher.core.atomic_write import write_file
from launcher.core.errors import ResumeError, RunDirectoryError
from launcher.runs.directory import RunDirectory, open_run_directory, write_plan
from launcher.runs.selection import find_last_checkpoint, find_newest_matching_run
from tests.support.run_directories import MODEL, config, ended, everything, make_run


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def test_folders_are_0700_and_files_0600_for_any_umask(runs: Path) -> None:
    before = os.umask(0)
    try:
        run = ended(open_run_directory(config(runs)))
        write_plan(run, {"a": 1})
    finally:
        os.umask(before)
    paths = [run.path, *run.path.rglob("*")]
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in paths}
    assert {modes[path.name] for path in paths if path.is_dir()} == {0o700}
    assert {modes[path.name] for path in paths if path.is_file()} == {0o600}
    assert set(modes) == {"first", "logs", "checkpoints", "wandb", "config.yaml", "plan.json", "run_id", ".lock-1"}


def test_a_new_run_stores_a_config_that_resumes_it(runs: Path) -> None:
    run = ended(open_run_directory(config(runs, seed=7)))
    text = (run.path / "config.yaml").read_text()
    assert text.splitlines()[0] == f"# how the run ended, and the command that continues it: launcher status {run.path}"
    assert yaml.safe_load(text) == config(runs, seed=7).to_dict()
    assert (run.is_new, run.resume_from, run.name) == (True, None, "first")
    assert run.log_file(3) == run.path / "logs" / "rank-3.log"


def test_a_run_without_a_name_gets_date_and_digest(runs: Path) -> None:
    wanted = config(runs, None)
    first, second = ended(open_run_directory(wanted)), ended(open_run_directory(wanted))
    assert wanted.digest()[:6] in first.name
    assert first.path != second.path
    assert yaml.safe_load((first.path / "config.yaml").read_text())["name"] == first.name


def test_an_existing_name_is_rejected_and_the_earlier_run_not_changed(runs: Path) -> None:
    path = make_run(runs)
    write_file(path / "events.jsonl", '{"kind":"x"}\n')
    before = everything(path)
    with pytest.raises(RunDirectoryError, match="'first' exists already") as caught:
        open_run_directory(config(runs, seed=8))
    assert "--resume auto" in str(caught.value)
    assert caught.value.exit_code == 2
    assert everything(path) == before


def test_resume_auto_resumes_the_named_run_and_its_wandb_run(runs: Path) -> None:
    first = ended(open_run_directory(config(runs)))
    (first.checkpoints / "last.ckpt").write_bytes(b"w")
    again = ended(open_run_directory(config(runs, resume="auto")))
    assert (again.path, again.wandb_id, again.is_new) == (first.path, first.wandb_id, False)
    assert again.resume_from == first.checkpoints / "last.ckpt"


def test_a_wandb_run_id_of_the_user_is_kept_for_later_attempts(runs: Path) -> None:
    first = ended(open_run_directory(config(runs), wandb_id="fixed"))
    again = ended(open_run_directory(config(runs, resume="auto")))
    other = ended(open_run_directory(config(runs, resume="auto"), wandb_id="another"))
    assert [run.wandb_id for run in (first, again, other)] == ["fixed", "fixed", "another"]
    assert ended(open_run_directory(config(runs, resume="auto"))).wandb_id == "another"


def test_resume_auto_with_a_new_name_starts_a_run(runs: Path) -> None:
    run = ended(open_run_directory(config(runs, resume="auto")))
    assert (run.is_new, run.resume_from) == (True, None)


def test_resume_auto_without_a_name_finds_the_newest_run_with_this_config(runs: Path) -> None:
    for age, name in ((300, "oldest"), (100, "newest"), (200, "middle")):
        path = make_run(runs, name)
        os.utime(path / "config.yaml", (1e9 - age, 1e9 - age))
    make_run(runs, "other", seed=9)
    make_run(runs, "without-checkpoint", checkpoint=None)
    (runs / "foreign").mkdir()
    (runs / "foreign" / "config.yaml").write_text("- [broken")
    changed = config(runs, None, resume="auto", trainer=TrainerOptions(max_epochs=99), devices=4)
    assert find_newest_matching_run(changed) == "newest"
    run = ended(open_run_directory(changed))
    assert (run.name, run.resume_from) == ("newest", runs / "newest" / "checkpoints" / "last.ckpt")


@pytest.mark.parametrize("change", [{"seed": 1}, {"model": {"class_path": "my_pkg.Other"}}, {"precision": "64"}])
def test_resume_auto_without_a_name_ignores_runs_of_other_configs(runs: Path, change: dict[str, Any]) -> None:
    path = make_run(runs)
    before = everything(path)
    run = ended(open_run_directory(config(runs, None, resume="auto", **change)))
    assert (run.is_new, run.path != path) == (True, True)
    assert everything(path) == before


def test_a_config_with_a_tuple_matches_its_stored_form(runs: Path) -> None:
    model = {"class_path": "a.B", "init_args": {"betas": (0.9, 0.95)}}
    make_run(runs, model=model)
    assert ended(open_run_directory(config(runs, None, resume="auto", model=model))).name == "first"


def test_the_earlier_config_is_kept_when_it_changes(runs: Path) -> None:
    path = make_run(runs)
    earlier = (path / "config.yaml").read_text()
    ended(open_run_directory(config(runs, resume="auto", trainer=TrainerOptions(max_epochs=9))))
    assert [file.read_text() for file in path.glob("config-until-*.yaml")] == [earlier]
    assert yaml.safe_load((path / "config.yaml").read_text())["trainer"]["max_epochs"] == 9


def test_a_restart_resumes_the_run_of_its_launch(runs: Path) -> None:
    path = make_run(runs)
    run = ended(open_run_directory(config(runs, None), restart_of="first"))
    assert (run.path, run.is_new, run.resume_from) == (path, False, path / "checkpoints" / "last.ckpt")


def test_a_checkpoint_of_another_run_starts_a_new_run_from_it(runs: Path) -> None:
    path = make_run(runs)
    checkpoint = path / "checkpoints" / "last.ckpt"
    before = everything(path)
    run = ended(open_run_directory(config(runs, "second", resume=str(checkpoint))))
    assert (run.path, run.is_new, run.resume_from) == (runs / "second", True, checkpoint)
    assert everything(path) == before


def test_a_missing_checkpoint_is_named_and_nothing_is_created(runs: Path) -> None:
    with pytest.raises(ResumeError, match=r"missing\.ckpt does not exist"):
        open_run_directory(config(runs, resume=str(runs / "missing.ckpt")))
    assert not runs.exists()


def test_an_explicit_checkpoint_of_the_run_takes_precedence_over_its_last(runs: Path) -> None:
    path = make_run(runs)
    earlier = path / "checkpoints" / "epoch=1.ckpt"
    earlier.write_bytes(b"weights")
    run = ended(open_run_directory(config(runs, resume=str(earlier))))
    assert (run.path, run.is_new, run.resume_from) == (path, False, earlier)


def test_the_last_checkpoint_is_last_ckpt_or_else_the_newest(tmp_path: Path) -> None:
    assert find_last_checkpoint(tmp_path) is None
    for age, name in ((2, "epoch=1.ckpt"), (1, "epoch=2.ckpt"), (3, "last.ckpt")):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    assert find_last_checkpoint(tmp_path) == tmp_path / "last.ckpt"
    (tmp_path / "last.ckpt").unlink()
    assert find_last_checkpoint(tmp_path) == tmp_path / "epoch=2.ckpt"


def test_a_run_that_trains_in_another_process_is_rejected(runs: Path) -> None:
    wanted = {"name": "first", "runs_dir": str(runs), "resume": "auto", "model": MODEL}
    program = (
        "import sys, json\nfrom launcher.config.schema import RunConfig\n"
        "from launcher.runs.directory import open_run_directory\n"
        "open_run_directory(RunConfig(**json.loads(sys.argv[1]))); print('open', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, json.dumps(wanted)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "open\n"
            before = everything(runs / "first")
            with pytest.raises(RunDirectoryError, match=f"'first' is training now .process {other.pid} on "):
                open_run_directory(config(runs, resume="auto"))
            assert everything(runs / "first") == before
        finally:
            other.kill()
    # Its lock ended with it, in any case.
    assert ended(open_run_directory(config(runs, resume="auto"))).is_new is False


def test_a_plan_is_kept_as_json(runs: Path) -> None:
    run = ended(open_run_directory(config(runs)))
    write_plan(run, {"precision": "32-true"})
    assert json.loads((run.path / "plan.json").read_text()) == {"precision": "32-true"}


@pytest.mark.parametrize("resume", [None, Path("/runs/a/checkpoints/last.ckpt")])
def test_other_ranks_receive_the_run_without_its_lock(resume: Path | None) -> None:
    run = RunDirectory(Path("/runs/a"), resume, "abc", True)
    assert RunDirectory.from_dict(json.loads(json.dumps(run.to_dict()))) == run


def test_a_restart_with_an_equal_config_does_not_write_it_again(runs: Path) -> None:
    run = ended(open_run_directory(config(runs)))
    file = run.path / "config.yaml"
    before = file.stat().st_ino
    ended(open_run_directory(config(runs), restart_of=run.name, has_config=True))
    assert file.stat().st_ino == before
    file.unlink()
    ended(open_run_directory(config(runs), restart_of=run.name, has_config=True))
    assert file.is_file(), "a removed one is written"
