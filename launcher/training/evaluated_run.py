"""Which run and which of its checkpoints `launcher validate`, `test` and `predict` evaluate."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.checkpoint.manifest import choose_checkpoint, problem_of
from launcher.checkpoint.reader import Trust
from launcher.checkpoint.resume import read_checkpoint
from launcher.config.schema import RunConfig
from launcher.core.errors import ResumeError, RunDirectoryError
from launcher.runs.directory import RunDirectory, open_run_directory
from launcher.runs.selection import LAST_CHECKPOINT, newest_matching_run
from launcher.runs.trust import check_run_folder
from launcher.training.evaluated_config import BEST, LAST, run_of


def find_evaluated_run(config: RunConfig, checkpoint: str) -> tuple[RunDirectory, tuple[str, ...]]:
    """The run's directory, with the checkpoint as what to go on from.

    It is made only for a checkpoint that is given by its path with the name of a run that is not there.

    Args:
        config: says the run's name and folder; without a name the newest run with this config is meant.
        checkpoint: `best`, `last` or a path.

    Returns:
        The directory, and what to tell of damaged checkpoints that were passed over.

    Raises:
        RunDirectoryError: there is no such run.
        ResumeError: there is no such checkpoint, or it is damaged.
    """
    given = None if checkpoint in (BEST, LAST) else Path(checkpoint).absolute()
    path = run_of(given) if given is not None and config.name is None else None
    runs = Path(config.runs_dir).absolute()
    if path is None:
        name = config.name or newest_matching_run(config)
        if name is None:
            own = "" if given is None else f"; to evaluate {given.name} in a new one, name that: --name NEW"
            raise RunDirectoryError(
                f"{runs} has no run with this config to evaluate; name one: --name NAME, or --config "
                f"{runs}/NAME/config.yaml{own}"
            )
        path = runs / name
    # What lies there is loaded, and written to.
    check_run_folder(path)
    if not (path / "config.yaml").exists():
        if given is None:
            raise RunDirectoryError(
                f"there is no run {path.name!r} at {path}; give the name of one that was trained, or --checkpoint PATH "
                "to evaluate that in a new run of this name"
            )
        _check_checkpoint(given)
        made = open_run_directory(dataclasses.replace(config, resume="none"))
        made.release()
        return RunDirectory(made.path, given, made.wandb_id, is_new=False), ()
    notices: tuple[str, ...] = ()
    if given is None:
        last, notices = choose_checkpoint(path / "checkpoints", LAST_CHECKPOINT, None)
        if last is None:
            raise ResumeError(f"run {path.name!r} has no checkpoint in {path / 'checkpoints'}; give one's path")
        given = (
            last
            if checkpoint == LAST
            else _best(path / "checkpoints", last, Trust(path, everywhere=config.resume_trust))
        )
    _check_checkpoint(given)
    id_file = path / "wandb" / "run_id"
    wandb_id = id_file.read_text(encoding="utf-8").strip() if id_file.exists() else ""
    return RunDirectory(path, given, wandb_id, is_new=False), notices


def _check_checkpoint(given: Path) -> None:
    if not given.exists():
        raise ResumeError(f"checkpoint: {given} does not exist; give `best`, `last` or the path of one")
    problem = problem_of(given)
    if problem is not None:
        raise ResumeError(f"checkpoint: {given} is damaged: {problem}; give another one")


def _best(folder: Path, last: Path, trust: Trust) -> Path:
    """The checkpoint that the run's ModelCheckpoint found best, as the last one knows it."""
    states: Mapping[str, Any] = read_checkpoint(last, trust, outline=True).get("callbacks") or {}
    # By what they keep: ours and the user's may be of any class.
    keepers = [state for state in states.values() if isinstance(state, Mapping) and state.get("best_model_path")]
    # One that watches a metric knows better than one that keeps what is newest.
    keepers.sort(key=lambda state: state.get("monitor") is None)
    for state in keepers:
        named = Path(state["best_model_path"])
        # The run may have been moved since; a folder of the user's own has not.
        places = (folder / named.name, named) if named.parent.name == folder.name else (named,)
        found = next((path for path in places if path.exists()), None)
        if found is not None:
            return found
    raise ResumeError(f"checkpoint: {last} names no best checkpoint that is still there; give `last` or a path")
