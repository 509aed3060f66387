"""The directory of one run: `runs/<name>/`, mode 0700, made by rank zero and never by two runs at once."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launcher.checkpoint.manifest import candidates, choose_checkpoint
from launcher.config.schema import RunConfig
from launcher.core.atomic_write import write_file
from launcher.core.errors import ResumeError, RunDirectoryError
from launcher.core.secrets import redact
from launcher.runs.lock import DirectoryOwnedError, RunLock, acquire, remove_lock
from launcher.runs.missing_checkpoint import check_missing_checkpoint, last_trained_step
from launcher.runs.oom_record import FILE_NAME
from launcher.runs.sweep_record import MEMBERS
from launcher.runs.trust import check_run_folder, run_folder_problem

_FOLDERS = ("logs", "checkpoints", "wandb")
LAST_CHECKPOINT = "last.ckpt"
# What may change between two attempts of one run without making it another run.
_FREE_TO_CHANGE = ("name", "runs_dir", "resume", "resume_trust", "on_oom", "wandb", "slurm", "devices", "num_nodes",
                   "agreement_timeout", "process_group_timeout", "trainer.max_epochs", "trainer.max_steps",
                   "trainer.max_time", "trainer.logger")  # fmt: skip


@dataclass(frozen=True, slots=True)
class RunPlace:
    """Where a run is or would be.

    Attributes:
        path: absolute path of its directory.
        exists: whether it is a run's directory already.
        resume_from: checkpoint that the next attempt goes on from, None for a fresh start.
        notices: newer checkpoints that are damaged and were passed over.
    """

    path: Path
    exists: bool
    resume_from: Path | None
    notices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """One run's place on disk.

    Attributes:
        path: absolute path of the directory.
        resume_from: checkpoint that this attempt goes on from, None for a fresh start.
        wandb_id: id of the W&B run; the same for every attempt.
        is_new: whether this attempt made the directory.
        lock: keeps other runs out; None on ranks other than zero.
    """

    path: Path
    resume_from: Path | None
    wandb_id: str
    is_new: bool
    lock: RunLock | None = None

    @property
    def name(self) -> str:
        """The run's name."""
        return self.path.name

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    def log_file(self, rank: int) -> Path:
        """Where a rank's output goes."""
        return self.path / "logs" / f"rank-{rank}.log"

    def release(self) -> None:
        """Let other runs in; the end of the process does it too."""
        if self.lock is not None:
            self.lock.release()

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, without the lock."""
        resume = None if self.resume_from is None else str(self.resume_from)
        return {"path": str(self.path), "resume_from": resume, "wandb_id": self.wandb_id, "is_new": self.is_new}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunDirectory:
        """The inverse of `to_dict`."""
        resume = values["resume_from"]
        return cls(Path(values["path"]), None if resume is None else Path(resume), values["wandb_id"], values["is_new"])


def open_run_directory(
    config: RunConfig,
    *,
    restart_of: str | None = None,
    is_requeued: bool = False,
    previous_owner: str | None = None,
    wandb_id: str | None = None,
) -> RunDirectory:
    """Make the run's directory, or open it to go on with the run.

    Args:
        config: says the name and what to resume.
        restart_of: name of the run that an earlier attempt of this same launch made.
        previous_owner: token of that attempt's lock.
        is_requeued: see `find_run`.
        wandb_id: id of the W&B run that the user fixed; kept for later attempts.

    Raises:
        RunDirectoryError: the name is taken, the run is training right now, or the disk is full or read-only.
        ResumeError: there is no such checkpoint.
    """
    where = find_run(config, restart_of=restart_of, is_requeued=is_requeued)
    try:
        return _open(where, config, previous_owner, wandb_id)
    except OSError as error:
        raise _not_made(where.path, error) from error


def find_run(config: RunConfig, *, restart_of: str | None = None, is_requeued: bool = False) -> RunPlace:
    """Where the run's directory is or would be, and what it would resume from; makes nothing.

    Args:
        config: says the name and what to resume.
        restart_of: see `open_run_directory`.
        is_requeued: a scheduler started this job again, which may begin its run once more.

    Raises:
        RunDirectoryError: the name is taken, or the folder of the runs cannot be read.
        ResumeError: there is no such checkpoint, none that is whole, or none of a run that has trained.
    """
    runs = Path(config.runs_dir).absolute()
    name = restart_of or config.name or (config.resume == "auto" and newest_matching_run(config)) or None
    explicit = explicit_checkpoint(config)
    path = runs / (name or config.digest()[:6])
    try:
        path = runs / name if name else _fresh_path(runs, config)
        check_run_folder(path)
        exists = (path / "config.yaml").exists()
        if (path / MEMBERS).exists():
            raise RunDirectoryError(f"{path.name!r} is a sweep at {path}; choose another --name for a run")
        # A run that never saved has nothing to lose: a requeued job may begin it once more.
        own = explicit is not None and (explicit.is_relative_to(path) or last_checkpoint(path / "checkpoints") is None)
        if exists and not (own or restart_of is not None or config.resume == "auto"):
            raise RunDirectoryError(
                f"run {path.name!r} exists already at {path}; choose another --name, or go on with it: --resume auto "
                "(in a script: name=..., resume_from_checkpoint='auto')"
            )
        # A restart has come further than the checkpoint that the launch was begun with.
        folder = path / "checkpoints" if exists and (restart_of is not None or explicit is None) else None
        chosen, notices = choose_checkpoint(folder, LAST_CHECKPOINT, explicit)
        if exists and chosen is None:
            # One that ran out of memory is gone on with for what it says of that.
            may_begin_again = is_requeued or restart_of is not None or (path / FILE_NAME).exists()
            notices = (*notices, *check_missing_checkpoint(path, may_begin_again))
    except OSError as error:
        raise _not_made(path, error) from error
    return RunPlace(path, exists, chosen, notices)


def _not_made(path: Path, error: OSError) -> RunDirectoryError:
    return RunDirectoryError(
        f"run directory {path} cannot be made: {error.strerror or error}; set runs_dir to a folder with space "
        "where you may write"
    )


def last_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that a run resumes from if it is whole: `last.ckpt`, else the newest one."""
    return next(iter(candidates(folder, LAST_CHECKPOINT)), None)


def newest_matching_run(config: RunConfig) -> str | None:
    """Name of the newest run with this config that has trained, or has a record of what ran out of memory."""
    runs = Path(config.runs_dir)
    # Through YAML, as the other side went: a tuple given in code comes back as a list.
    wanted = _identity(yaml.safe_load(config.to_yaml()))
    found: list[tuple[float, str]] = []
    for file in runs.glob("*/config.yaml"):
        try:
            if run_folder_problem(file.parent) is not None:
                continue  # in a shared folder, somebody else's
            same = _identity(yaml.safe_load(file.read_text(encoding="utf-8"))) == wanted
        except (OSError, yaml.YAMLError, AttributeError, TypeError):
            continue  # not ours, or being written: no run to go on with
        path = file.parent
        if same and (last_checkpoint(path / "checkpoints") or (path / FILE_NAME).exists() or last_trained_step(path)):
            found.append((file.stat().st_mtime, file.parent.name))
    return max(found)[1] if found else None


def _identity(values: dict[str, Any]) -> dict[str, Any]:
    # A run with another password is the same run.
    values = redact(values)
    kept = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    for path in _FREE_TO_CHANGE:
        group, _, key = path.rpartition(".")
        (kept.get(group) or {} if group else kept).pop(key, None)
    return kept


def explicit_checkpoint(config: RunConfig) -> Path | None:
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
        raise ResumeError(
            f"resume: {path} cannot be looked at: {error.strerror or error}; give another checkpoint"
        ) from error
    if not found:
        raise ResumeError(f"resume: {path} does not exist; give a checkpoint, `auto` or `none`")
    return path


def _fresh_path(runs: Path, config: RunConfig) -> Path:
    base = f"{time.strftime('%Y%m%d-%H%M%S')}-{config.digest()[:6]}"
    candidates = (runs / (base if n == 1 else f"{base}-{n}") for n in range(1, 1000))
    return next(path for path in candidates if not path.exists())


def _open(where: RunPlace, config: RunConfig, previous_owner: str | None, fixed_wandb_id: str | None) -> RunDirectory:
    path = where.path
    made = not path.exists()
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Once more: it may have been made between the look and now.
    check_run_folder(path)
    lock: RunLock | None = None
    try:
        lock = _lock(path, previous_owner)
        for folder in _FOLDERS:
            (path / folder).mkdir(mode=0o700, exist_ok=True)
        _keep_config(path, config)
        wandb_id = _wandb_id(path, fixed_wandb_id)
    except OSError:
        if lock is not None:
            lock.release()
        if made:
            _remove_empty(path)
        raise
    return RunDirectory(path, where.resume_from, wandb_id, is_new=not where.exists, lock=lock)


def _lock(path: Path, previous_owner: str | None) -> RunLock:
    """Keep other runs out of `path` until this process ends, however it ends."""
    try:
        return acquire(path, os.environ, previous=previous_owner)
    except DirectoryOwnedError as error:
        if error.state == "unknown":
            raise RunDirectoryError(
                f"run {path.name!r} is held by {error.owner}, and {os.uname().nodename} cannot find out whether that "
                f"still trains; choose another --name, or remove {error.path} if it has ended"
            ) from error
        holder = error.owner or "another process begins it"
        raise RunDirectoryError(
            f"run {path.name!r} is training right now ({holder}); choose another --name, or stop that one first"
        ) from error


def _keep_config(path: Path, config: RunConfig) -> None:
    file = path / "config.yaml"
    text = f"# python -m launcher fit --config {file} --resume auto\n" + _named(config, path.name).to_yaml(os.environ)
    before = file.read_text(encoding="utf-8") if file.exists() else text
    if before != text:
        # A copy first: a full disk must not leave the run without a config.
        write_file(path / f"config-until-{time.strftime('%Y%m%d-%H%M%S')}.yaml", before)
    write_file(file, text)


def _named(config: RunConfig, name: str) -> RunConfig:
    return RunConfig(**{**{k: getattr(config, k) for k in RunConfig.__dataclass_fields__},
                        "name": name, "resume": "none", "resume_trust": False})  # fmt: skip


def _wandb_id(path: Path, fixed: str | None) -> str:
    file = path / "wandb" / "run_id"
    kept = file.read_text(encoding="utf-8").strip() if file.exists() else None
    if kept is not None and (not fixed or fixed == kept):
        return kept
    made = fixed or secrets.token_hex(4)
    write_file(file, made + "\n")
    return made


def write_plan(run: RunDirectory, plan: Mapping[str, Any]) -> None:
    """Keep the plan of this attempt in `plan.json`.

    Raises:
        RunDirectoryError: the disk is full or read-only.
    """
    try:
        write_file(run.path / "plan.json", json.dumps(plan, indent=1) + "\n")
    except OSError as error:
        raise RunDirectoryError(
            f"plan.json cannot be written in {run.path}: {error.strerror or error}; make space, or set another runs_dir"
        ) from error


def _remove_empty(path: Path) -> None:
    """Take back what a failed start left: its own few files, then the folders if nothing else is in them."""
    remove_lock(path)
    for file in (path / "config.yaml", path / "wandb" / "run_id"):
        file.unlink(missing_ok=True)
    for folder in (*(path / f for f in _FOLDERS), path):
        if folder.exists() and not any(folder.iterdir()):
            folder.rmdir()
