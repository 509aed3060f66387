"""Choose the run, its checkpoint and its config for `launcher validate`, `test` and `predict`.

The command line imports this module, so torch is imported inside functions only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.checkpoint.manifest import choose_checkpoint, find_problem
from launcher.config.loading import read_sources
from launcher.config.schema import RunConfig
from launcher.core.errors import ResumeError, RunDirectoryError
from launcher.runs.directory import RunDirectory, open_run_directory
from launcher.runs.lookup import find_run_named
from launcher.runs.selection import LAST_CHECKPOINT, find_newest_matching_run
from launcher.runs.trust import check_run_folder

BEST, LAST = "best", "last"


def find_run_config(checkpoint: str, overrides: Sequence[str]) -> list[Path]:
    """The config file of the run that the command line names; empty if it names none, or the run has no config.

    The run is named by `--name` and `--runs-dir`, or by a checkpoint path in its run directory.

    Raises:
        ConfigError: an argument is not a setting.
        NoSuchRunError: there is no run of that name; lists the runs.
        RunDirectoryError: the run belongs to another user.
    """
    values = read_sources((), overrides)
    if name := values.get("name"):
        path = find_run_named(Path(values.get("runs_dir") or RunConfig().runs_dir), str(name))
    else:
        path = None if checkpoint in (BEST, LAST) else _run_of(Path(checkpoint).absolute())
    if path is None or not (path / "config.yaml").exists():
        return []
    # The config names classes to import.
    check_run_folder(path)
    return [path / "config.yaml"]


def find_evaluated_run(config: RunConfig, checkpoint: str) -> tuple[RunDirectory, tuple[str, ...]]:
    """The run directory, whose `resume_from` is the checkpoint to evaluate, and a notice for each damaged checkpoint.

    If the config has no name, this is the newest run with this config. A new directory is created only if the
    checkpoint is a path and the config has the name of a run that does not exist.

    Raises:
        RunDirectoryError: there is no such run.
        ResumeError: there is no such checkpoint, or it is damaged.
    """
    given = None if checkpoint in (BEST, LAST) else Path(checkpoint).absolute()
    path = _find_folder(config, given)
    # Files in it are loaded, and others are written to it.
    check_run_folder(path)
    if not (path / "config.yaml").exists():
        if given is None:
            raise RunDirectoryError(
                f"there is no run {path.name!r} at {path}; give the name of a trained run, or --checkpoint PATH to "
                "evaluate that checkpoint in a new run of this name"
            )
        _check_checkpoint(given)
        made = open_run_directory(dataclasses.replace(config, resume="none"))
        made.release()
        return RunDirectory(made.path, given, made.wandb_id, is_new=False), ()
    notices: tuple[str, ...] = ()
    if given is None:
        given, notices = choose_checkpoint(path / "checkpoints", LAST_CHECKPOINT, None)
        if given is None:
            raise ResumeError(f"run {path.name!r} has no checkpoint in {path / 'checkpoints'}; give the path of one")
        if checkpoint == BEST:
            given = _find_best(path, given, config)
    _check_checkpoint(given)
    id_file = path / "wandb" / "run_id"
    wandb_id = id_file.read_text(encoding="utf-8").strip() if id_file.exists() else ""
    return RunDirectory(path, given, wandb_id, is_new=False), notices


def _find_folder(config: RunConfig, given: Path | None) -> Path:
    path = _run_of(given) if given is not None and config.name is None else None
    if path is not None:
        return path
    runs = Path(config.runs_dir).absolute()
    name = config.name or find_newest_matching_run(config)
    if name is None:
        new = "" if given is None else f"; to evaluate {given.name} in a new run, give its name: --name NEW"
        raise RunDirectoryError(
            f"{runs} has no run with this config; give the run to evaluate: --name NAME, or --config "
            f"{runs}/NAME/config.yaml{new}"
        )
    return runs / name


def _run_of(checkpoint: Path) -> Path | None:
    """The run directory that contains a checkpoint, also one that the user's own callback or logger placed."""
    usual = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else None
    found = next((each for each in checkpoint.parents if (each / "events.jsonl").exists()), usual)
    return found if found is not None and (found / "config.yaml").exists() else None


def _check_checkpoint(given: Path) -> None:
    if not given.exists():
        raise ResumeError(f"checkpoint: {given} does not exist; give `best`, `last` or a path")
    problem = find_problem(given)
    if problem is not None:
        raise ResumeError(f"checkpoint: {given} is damaged: {problem}; give another one")


def _find_best(run: Path, last: Path, config: RunConfig) -> Path:
    """The best checkpoint according to the ModelCheckpoint states in the last one."""
    from launcher.checkpoint.reader import Trust
    from launcher.checkpoint.resume import read_checkpoint

    trust = Trust(run, everywhere=config.resume_trust)
    states: Mapping[str, Any] = read_checkpoint(last, trust, outline=True).get("callbacks") or {}
    # Recognized by their content, as the callbacks may be of any class.
    saved = [state for state in states.values() if isinstance(state, Mapping) and state.get("best_model_path")]
    # Prefer callbacks that monitor a metric to those that keep the newest checkpoint.
    saved.sort(key=lambda state: state.get("monitor") is None)
    for state in saved:
        best, folder = Path(state["best_model_path"]), run / "checkpoints"
        # The run may have been moved since; a folder of the user has not.
        places = (folder / best.name, best) if best.parent.name == folder.name else (best,)
        found = next((path for path in places if path.exists()), None)
        if found is not None:
            return found
    raise ResumeError(f"checkpoint: {last} names no best checkpoint that still exists; give `last` or a path")
