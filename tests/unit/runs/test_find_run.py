"""`find_run`: finds a run and its checkpoint to resume from, and changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.config.schema import TrainerOptions
from launcher.core.errors import ResumeError, RunDirectoryError
from launcher.core.events import EventLog
from launcher.runs.directory import open_run_directory
from launcher.runs.lock import acquire_lock
from launcher.runs.oom_record import FILE_NAME
from launcher.runs.selection import find_run
from tests.support.run_directories import config, ended, everything, make_run


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def last(path: Path) -> Path:
    return path / "checkpoints" / "last.ckpt"


def test_a_new_run_is_found_and_nothing_is_created(runs: Path) -> None:
    place = find_run(config(runs))
    assert (place.path, place.exists, place.resume_from) == (runs / "first", False, None)
    assert not runs.exists()


def test_a_run_without_a_name_gets_an_unused_folder(runs: Path) -> None:
    wanted = config(runs, None)
    first = ended(open_run_directory(wanted))
    place = find_run(wanted)
    assert (place.path.parent, place.exists) == (runs, False)
    assert place.path != first.path
    assert wanted.digest()[:6] in place.path.name


def test_the_runs_folder_may_be_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_run(config(Path("runs"))).path == tmp_path / "runs" / "first"


@pytest.mark.parametrize(
    "more",
    [{"resume": "auto"}, {"resume": "auto", "name": None}, {"restart_of": "first"}],
    ids=["by name", "by config", "restart"],
)
def test_an_existing_run_is_found_with_its_last_checkpoint_and_not_changed(runs: Path, more: dict[str, Any]) -> None:
    path = make_run(runs)
    before = everything(runs)
    options = dict(more)
    restart_of = options.pop("restart_of", None)
    place = find_run(config(runs, **{"name": "first", **options}), restart_of=restart_of)
    assert (place.path, place.exists, place.resume_from) == (path, True, last(path))
    assert everything(runs) == before


def test_the_found_run_is_the_opened_run(runs: Path) -> None:
    make_run(runs)
    for wanted in (config(runs, "second"), config(runs, resume="auto"), config(runs, None, resume="auto")):
        place = find_run(wanted)
        opened = ended(open_run_directory(wanted))
        assert (opened.path, opened.resume_from, opened.is_new) == (place.path, place.resume_from, not place.exists)


def test_a_run_without_a_checkpoint_has_nothing_to_resume_from(runs: Path) -> None:
    path = make_run(runs, checkpoint=None)
    place = find_run(config(runs, resume="auto"))
    assert (place.path, place.exists, place.resume_from) == (path, True, None)


def test_a_run_without_a_name_that_ran_out_of_memory_before_a_checkpoint_is_resumed(runs: Path) -> None:
    first = ended(open_run_directory(config(runs, None, resume="auto")))
    again = config(runs, None, resume="auto", on_oom="next")
    assert not find_run(again).exists
    (first.path / FILE_NAME).write_text("[]")
    found = find_run(again)
    assert (found.path, found.exists, found.resume_from) == (first.path, True, None)


@pytest.mark.parametrize("kind", ["first_step", "step", "validation", "checkpoint", "training_ended"])
@pytest.mark.parametrize("name", ["first", None])
def test_a_trained_run_without_a_checkpoint_is_not_silently_started_again(
    runs: Path, kind: str, name: str | None
) -> None:
    path = make_run(runs, checkpoint=None)
    EventLog(path / "events.jsonl", 0).write(kind, step=7)
    wanted = config(runs, name, resume="auto")
    with pytest.raises(ResumeError, match=r"run 'first' trained to step 7, but .*/checkpoints contains no checkpoint"):
        find_run(wanted)
    # One that is training now has none yet.
    lock = acquire_lock(path, {})
    with pytest.raises(RunDirectoryError, match="run 'first' is training now"):
        open_run_directory(wanted)
    lock.release()
    # No user requested these starts, so they may start again.
    notices = ("the run trained to step 7 before without saving a checkpoint: it starts again at step 0",)
    for more in ({"is_requeued": True}, {"restart_of": "first"}):
        place = find_run(wanted, **more)
        assert (place.path, place.resume_from, place.notices) == (path, None, notices)
    (path / FILE_NAME).write_text("[]")
    assert find_run(wanted).notices == notices
    last(path).write_bytes(b"weights")
    assert find_run(wanted).notices == ()


@pytest.mark.parametrize("step", [0, None, "7", True])
def test_a_run_without_a_step_may_start_again(runs: Path, step: Any) -> None:
    path = make_run(runs, checkpoint=None)
    log = EventLog(path / "events.jsonl", 0)
    log.write("training_ended", step=step)
    log.write("notice", message="7", step=7)
    assert find_run(config(runs, resume="auto")).notices == ()


def test_an_existing_name_is_rejected(runs: Path) -> None:
    make_run(runs)
    with pytest.raises(RunDirectoryError, match="run 'first' exists already"):
        find_run(config(runs))


@pytest.mark.parametrize("events", [(), ("run_started", "planned", "failed"), ("training_started", "failed")])
def test_a_run_that_ended_before_its_first_step_does_not_keep_its_name(runs: Path, events: tuple[str, ...]) -> None:
    path = make_run(runs, checkpoint=None)
    for kind in events:
        EventLog(path / "events.jsonl", 0).write(kind, step=0)
    before = everything(runs)
    place = find_run(config(runs, seed=8))
    assert (place.path, place.exists, place.resume_from) == (path, True, None)
    assert everything(runs) == before
    again = ended(open_run_directory(config(runs, seed=8)))
    assert again.path == path
    assert len(list(path.glob("config-until-*.yaml"))) == 1, "the config of the first attempt is kept"


@pytest.mark.parametrize("ending", ["failed", "rank_failed", "interrupted", "out_of_memory"])
@pytest.mark.parametrize("resume", ["none", "auto"])
def test_a_run_that_ended_before_its_first_checkpoint_can_be_run_again(runs: Path, ending: str, resume: str) -> None:
    path = make_run(runs, checkpoint=None)
    log = EventLog(path / "events.jsonl", 0)
    log.write("first_step", step=1)
    log.write(ending, step=5)
    place = find_run(config(runs, resume=resume))
    assert (place.path, place.exists, place.resume_from) == (path, True, None)
    if resume == "auto":
        last_step = 5 if ending in ("rank_failed", "interrupted") else 1
        (notice,) = place.notices
        assert f"trained to step {last_step} before" in notice
    # The file of this checkpoint was never complete.
    log.write("checkpoint", step=4)
    log.write("failed", checkpoint=None)
    assert find_run(config(runs, resume=resume)).path == path
    # Its checkpoints are elsewhere, or it has results.
    for kind in ("checkpoint", "finished"):
        (path / "events.jsonl").unlink()
        for each in ("first_step", kind, ending):
            log.write(each, step=1)
        with pytest.raises((RunDirectoryError, ResumeError), match="trained to step 1"):
            find_run(config(runs, resume=resume))


def test_a_trial_of_lightnings_does_not_keep_its_name(runs: Path) -> None:
    options = {"trainer": TrainerOptions(fast_dev_run=True)}
    path = make_run(runs, checkpoint=None, **options)
    EventLog(path / "events.jsonl", 0).write("first_step", step=1)
    assert find_run(config(runs)).path == path


@pytest.mark.parametrize(
    ("checkpoint", "advice"), [("last.ckpt", "resume it with --resume auto"), (None, "has no checkpoint to resume")]
)
def test_a_run_that_has_trained_keeps_its_name(runs: Path, checkpoint: str | None, advice: str) -> None:
    path = make_run(runs, checkpoint=checkpoint)
    EventLog(path / "events.jsonl", 0).write("first_step", step=1)
    with pytest.raises(RunDirectoryError, match="run 'first' exists already") as caught:
        find_run(config(runs))
    for part in (advice, "trained to step 1", "choose another --name", f"rm -r {path}"):
        assert part in str(caught.value)


def test_the_checkpoint_of_another_run_starts_a_new_run(runs: Path) -> None:
    path = make_run(runs)
    place = find_run(config(runs, "second", resume=str(last(path))))
    assert (place.path, place.exists, place.resume_from) == (runs / "second", False, last(path))


def test_an_explicit_checkpoint_takes_precedence_except_on_a_restart(runs: Path) -> None:
    path = make_run(runs)
    earlier = path / "checkpoints" / "epoch=1.ckpt"
    earlier.write_bytes(b"weights")
    wanted = config(runs, resume=str(earlier))
    assert find_run(wanted).resume_from == earlier
    # This launch has progressed since its start.
    assert find_run(wanted, restart_of="first").resume_from == last(path)


def test_a_restart_without_a_checkpoint_starts_from_the_launchs_checkpoint(runs: Path) -> None:
    other = make_run(runs, "other")
    make_run(runs, checkpoint=None)
    wanted = config(runs, None, resume=str(last(other)))
    assert find_run(wanted, restart_of="first").resume_from == last(other)


def test_a_missing_checkpoint_is_named(runs: Path) -> None:
    with pytest.raises(ResumeError, match=r"missing\.ckpt does not exist"):
        find_run(config(runs, resume=str(runs / "missing.ckpt")))
    with pytest.raises(ResumeError, match="cannot be read: File name too long"):
        find_run(config(runs, resume="x" * 5000))


def test_an_impossible_folder_is_reported_before_anything_is_created(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    before = list(tmp_path.iterdir())
    wanted = config(tmp_path / "file" / "runs")
    assert find_run(wanted).exists is False
    with pytest.raises(RunDirectoryError, match="cannot be created: Not a directory; set runs_dir"):
        open_run_directory(wanted)
    assert list(tmp_path.iterdir()) == before
