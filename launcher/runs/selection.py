"""Selects the run directory of an attempt and the checkpoint that it resumes from. Creates nothing."""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launcher.checkpoint.manifest import candidates, choose_checkpoint, read_step
from launcher.config.schema import RunConfig
from launcher.core.errors import ResumeError, RunDirectoryError
from launcher.core.events import FILE_NAME as EVENTS
from launcher.core.events import read_events
from launcher.core.secrets import redact
from launcher.runs.kept_state import KEPT_STATES, find_kept_state
from launcher.runs.lock import read_owner
from launcher.runs.oom_record import FILE_NAME as OOM_RECORD
from launcher.runs.submission_record import read_records
from launcher.runs.sweep_record import MEMBERS
from launcher.runs.trust import check_run_folder, find_run_folder_problem

LAST_CHECKPOINT = "last.ckpt"
# Settings that may change between two attempts of one run.
_FREE_TO_CHANGE = ("name", "runs_dir", "resume", "resume_trust", "on_oom", "wandb", "slurm", "devices", "num_nodes",
                   "agreement_timeout", "process_group_timeout", "keep_last_step", "trainer.max_epochs",
                   "trainer.max_steps", "trainer.max_time", "trainer.logger")  # fmt: skip
_EVENTS_OF_TRAINING = ("first_step", "step", "validation", "checkpoint", "training_ended", "rank_failed", "interrupted")

_EVENTS_OF_FAILURE = {"failed", "rank_failed", "interrupted", "out_of_memory"}


@dataclass(frozen=True, slots=True)
class RunPlace:
    """The directory of a run, which may not exist yet.

    Attributes:
        exists: whether it is a run's directory already.
        resume_from: checkpoint that the next attempt resumes from; None for a fresh start.
        notices: about newer checkpoints that are damaged and were skipped.
    """

    path: Path
    exists: bool
    resume_from: Path | None
    notices: tuple[str, ...] = ()


def find_run(
    config: RunConfig, *, restart_of: str | None = None, is_requeued: bool = False, kept_folder: Path | None = None
) -> RunPlace:
    """Find the run's directory and the checkpoint to resume from.

    `restart_of` is the name of the run that an earlier attempt of the same launch created. `is_requeued` means that the
    scheduler started this job again, which may start the run from step 0. `kept_folder` has the states that
    survivors of the last attempt saved.

    Raises:
        RunDirectoryError: the name is taken, or the folder of the runs cannot be read.
        ResumeError: the checkpoint is missing, none is valid, or a run that has trained has none.
    """
    runs = Path(config.runs_dir).absolute()
    name = restart_of or config.name or (config.resume == "auto" and find_newest_matching_run(config)) or None
    explicit = find_explicit_checkpoint(config)
    path = runs / (name or config.digest()[:6])
    try:
        path = runs / name if name else _fresh_path(runs, config)
        check_run_folder(path)
        exists = (path / "config.yaml").exists()
        if (path / MEMBERS).exists():
            raise RunDirectoryError(f"{path.name!r} is a sweep at {path}; choose another --name for a run")
        # A run without a checkpoint has nothing to lose: it may be started from its beginning.
        own = explicit is not None and (
            explicit.is_relative_to(path) or find_last_checkpoint(path / "checkpoints") is None
        )
        if exists and not (own or restart_of is not None or config.resume == "auto" or has_nothing_to_lose(path)):
            raise _name_taken(path)
        # On a restart the run's own checkpoints are newer than the checkpoint that the launch started from.
        folder = path / "checkpoints" if exists and (restart_of is not None or explicit is None) else None
        chosen, notices = choose_checkpoint(folder, LAST_CHECKPOINT, explicit)
        if restart_of is not None:
            kept, more = find_kept_state((kept_folder, path / KEPT_STATES))
            chosen, notices = (kept if _is_later(kept, chosen) else chosen), (*notices, *more)
        if exists and chosen is None:
            # A run that ran out of memory is resumed for its record of that.
            may_start_again = is_requeued or restart_of is not None or (path / OOM_RECORD).exists()
            notices = (*notices, *_check_missing_checkpoint(path, may_start_again))
    except OSError as error:
        raise make_directory_error(path, error) from error
    return RunPlace(path, exists, chosen, notices)


def _is_later(kept: Path | None, checkpoint: Path | None) -> bool:
    if kept is None or checkpoint is None:
        return kept is not None
    return (read_step(kept) or 0) >= (read_step(checkpoint) or 0)


def has_nothing_to_lose(run: Path) -> bool:
    """Whether a run may start again under its name: it ended before its first checkpoint, or was a trial.

    Its logs and events are kept.
    """
    if find_last_checkpoint(run / "checkpoints") is not None or read_records(run):
        return False
    return not _last_trained_step(run) or _is_trial(run) or _ended_unsaved(run)


def _ended_unsaved(run: Path) -> bool:
    """Whether the run failed or was stopped before its first checkpoint.

    The results of a run that finished without one, and of one whose checkpoints were moved, are kept.
    """
    if not (run / EVENTS).exists():
        return False
    events = list(read_events(run / EVENTS))
    kinds = {event["kind"] for event in events}
    # The event of a checkpoint precedes the file, which a full disk may reject; a failure names the newest file.
    newest = [event["checkpoint"] for event in events if event["kind"] == "failed" and "checkpoint" in event]
    has_saved = "checkpoint" in kinds and not (newest and newest[-1] is None)
    return bool(kinds & _EVENTS_OF_FAILURE) and not has_saved and "finished" not in kinds


def _is_trial(run: Path) -> bool:
    """Whether the run used `fast_dev_run`, which saves nothing."""
    try:
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        return bool(config["trainer"]["fast_dev_run"])
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return False


def _name_taken(path: Path) -> RunDirectoryError:
    steps = _last_trained_step(path)
    if find_last_checkpoint(path / "checkpoints") is None and not read_records(path):
        return RunDirectoryError(
            f"run {path.name!r} exists already at {path}: it trained to step {steps} and has no checkpoint to resume "
            f"from; choose another --name, or delete it with: rm -r {shlex.quote(str(path))}"
        )
    return RunDirectoryError(
        f"run {path.name!r} exists already at {path}"
        + (f" and has trained to step {steps}" if steps else "")
        + f"; resume it with --resume auto, choose another --name, or delete it with: rm -r {shlex.quote(str(path))}"
    )


def make_directory_error(path: Path, error: OSError) -> RunDirectoryError:
    """The error for a run directory that cannot be read or created."""
    return RunDirectoryError(
        f"run directory {path} cannot be created: {error.strerror or error}; set runs_dir to a writable folder with "
        "free space"
    )


def find_last_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that a run resumes from if it is valid: `last.ckpt`, else the newest one."""
    return next(iter(candidates(folder, LAST_CHECKPOINT)), None)


def find_newest_matching_run(config: RunConfig) -> str | None:
    """Name of the newest run with this config that has trained, or has a record of running out of memory."""
    runs = Path(config.runs_dir)
    # Through YAML, like the other side: a tuple given in code becomes a list.
    wanted = _identity(yaml.safe_load(config.to_yaml()))
    found: list[tuple[float, str]] = []
    for file in runs.glob("*/config.yaml"):
        path = file.parent
        try:
            if find_run_folder_problem(path) is not None:
                continue  # in a shared folder, another user's
            same = _identity(yaml.safe_load(file.read_text(encoding="utf-8"))) == wanted
        except (OSError, yaml.YAMLError, AttributeError, TypeError):
            continue  # not a run, or not written completely yet
        if same and (
            find_last_checkpoint(path / "checkpoints") or (path / OOM_RECORD).exists() or _last_trained_step(path)
        ):
            found.append((file.stat().st_mtime, path.name))
    return max(found)[1] if found else None


def _identity(values: dict[str, Any]) -> dict[str, Any]:
    # A run with another password is the same run.
    values = redact(values)
    kept = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    for path in _FREE_TO_CHANGE:
        group, _, key = path.rpartition(".")
        (kept.get(group) or {} if group else kept).pop(key, None)
    return kept


def find_explicit_checkpoint(config: RunConfig) -> Path | None:
    """The checkpoint that `resume` names, None for `auto` and `none`.

    Raises:
        ResumeError: there is no such file.
    """
    if config.resume in ("none", "auto"):
        return None
    path = Path(config.resume).absolute()
    try:
        found = path.exists()
    except OSError as error:
        reason = error.strerror or error
        raise ResumeError(f"resume: {path} cannot be read: {reason}; give another checkpoint") from error
    if not found:
        raise ResumeError(f"resume: {path} does not exist; give a checkpoint, `auto` or `none`")
    return path


def _fresh_path(runs: Path, config: RunConfig) -> Path:
    base = f"{time.strftime('%Y%m%d-%H%M%S')}-{config.digest()[:6]}"
    paths = (runs / (base if n == 1 else f"{base}-{n}") for n in range(1, 1000))
    return next(path for path in paths if not path.exists())


def _check_missing_checkpoint(run: Path, may_start_again: bool) -> tuple[str, ...]:
    """Notices about a run to resume without a checkpoint; a ResumeError if it may not start again at step 0."""
    steps = _last_trained_step(run)
    if not steps or _is_trial(run):
        return ()
    if may_start_again or _ended_unsaved(run):
        return (f"the run trained to step {steps} before without saving a checkpoint: it starts again at step 0",)
    if read_owner(run)[1] == "running":
        return ()  # whoever opens it reports that
    raise ResumeError(
        f"resume: run {run.name!r} trained to step {steps}, but {run / 'checkpoints'} contains no checkpoint; give a "
        "checkpoint from elsewhere (--resume PATH), or start again under another --name with --resume none"
    )


def _last_trained_step(run: Path) -> int:
    """The last optimizer step of all attempts of a run; 0 if no event reports one."""
    events = run / EVENTS
    if not events.exists():
        return 0
    steps = (event.get("step") for event in read_events(events) if event["kind"] in _EVENTS_OF_TRAINING)
    return max((step for step in steps if type(step) is int), default=0)
