"""The directory of one run: `runs/<name>/`, mode 0700, created by rank zero and never used by two runs at once."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.config.schema import RunConfig
from launcher.core.atomic_write import write_file
from launcher.core.errors import RunDirectoryError
from launcher.runs.kept_state import KEPT_STATES, remove_kept_states
from launcher.runs.lock import DirectoryOwnedError, RunLock, acquire_lock, remove_lock
from launcher.runs.selection import RunPlace, find_run, make_directory_error
from launcher.runs.trust import check_run_folder

_FOLDERS = ("logs", "checkpoints", "wandb")


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """The directory of one run, open for an attempt.

    Attributes:
        resume_from: checkpoint that this attempt resumes from; None for a fresh start.
        wandb_id: id of the W&B run; the same for every attempt.
        is_new: whether this attempt created the directory.
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
        """The log file of a rank."""
        return self.path / "logs" / f"rank-{rank}.log"

    def release(self) -> None:
        """Release the lock; the end of the process does it too."""
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
    has_config: bool = False,
) -> RunDirectory:
    """Create the run's directory, or open an existing one to resume the run; `find_run` describes the first options.

    `previous_owner` is the token of the lock of the attempt before a restart. `wandb_id` is the id of the W&B run that
    the user has set; it is kept for later attempts. `has_config`: an earlier attempt has kept an equal config.

    Raises:
        RunDirectoryError: the name is taken, the run is training now, or the disk is full or read-only.
        ResumeError: there is no such checkpoint.
    """
    where = find_run(config, restart_of=restart_of, is_requeued=is_requeued)
    is_kept = has_config and (where.path / "config.yaml").is_file()
    try:
        run = _open(where, None if is_kept else config, previous_owner, wandb_id)
    except OSError as error:
        raise make_directory_error(where.path, error) from error
    if restart_of is None:
        # Of a launch before this one, which may have continued elsewhere since.
        remove_kept_states(run.path / KEPT_STATES)
    return run


def _open(
    where: RunPlace, config: RunConfig | None, previous_owner: str | None, fixed_wandb_id: str | None
) -> RunDirectory:
    path = where.path
    made = not path.exists()
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Again: another user may have created it since the first check.
    check_run_folder(path)
    lock: RunLock | None = None
    try:
        lock = _lock(path, previous_owner)
        for folder in _FOLDERS:
            (path / folder).mkdir(mode=0o700, exist_ok=True)
        if config is not None:
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
    try:
        return acquire_lock(path, os.environ, previous=previous_owner)
    except DirectoryOwnedError as error:
        if error.state == "unknown":
            raise RunDirectoryError(
                f"run {path.name!r} is locked by {error.owner}, and {os.uname().nodename} cannot determine whether "
                f"it still runs; choose another --name, or remove {error.path} if it has ended"
            ) from error
        holder = error.owner or "another process starts it"
        raise RunDirectoryError(
            f"run {path.name!r} is training now ({holder}); choose another --name, or stop that process first"
        ) from error


def _keep_config(path: Path, config: RunConfig) -> None:
    file = path / "config.yaml"
    kept = dataclasses.replace(config, name=path.name, resume="none", resume_trust=False)
    # The number of ranks is not known here, so the command that continues the run is not, either.
    header = f"# how the run ended, and the command that continues it: launcher status {shlex.quote(str(path))}\n"
    text = header + kept.to_yaml(os.environ)
    before = file.read_text(encoding="utf-8") if file.exists() else text
    if before.partition("\n")[2] != text.partition("\n")[2]:
        # Keep a copy of the old config first: a full disk must not leave the run without one.
        write_file(path / f"config-until-{time.strftime('%Y%m%d-%H%M%S')}.yaml", before)
    write_file(file, text)


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
            f"plan.json cannot be written in {run.path}: {error.strerror or error}; free space, or set another runs_dir"
        ) from error


def _remove_empty(path: Path) -> None:
    """Remove the files of a failed start, then the folders that are empty."""
    remove_lock(path)
    for file in (path / "config.yaml", path / "wandb" / "run_id"):
        file.unlink(missing_ok=True)
    for folder in (*(path / f for f in _FOLDERS), path):
        if folder.exists() and not any(folder.iterdir()):
            folder.rmdir()
