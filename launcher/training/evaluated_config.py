"""Which config `launcher validate`, `test` and `predict` take where the command line names a run and no config."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from launcher.config.loading import read_sources
from launcher.config.schema import RunConfig
from launcher.runs.lookup import find_run_named
from launcher.runs.trust import check_run_folder

BEST, LAST = "best", "last"


def config_of_run(checkpoint: str, overrides: Sequence[str]) -> list[Path]:
    """The run's own config file; nothing where no run is named, or it has none.

    Args:
        checkpoint: `best`, `last` or a path: one in a run's folder names the run.
        overrides: the words of the command line; `--name` and `--runs-dir` are looked at.

    Raises:
        ConfigError: a word is no setting.
        NoSuchRunError: there is no run of that name; says which there are.
        RunDirectoryError: the run is somebody else's.
    """
    values = read_sources((), overrides)
    if name := values.get("name"):
        path = find_run_named(Path(values.get("runs_dir") or RunConfig().runs_dir), str(name))
    else:
        path = None if checkpoint in (BEST, LAST) else run_of(Path(checkpoint).absolute())
    if path is None or not (path / "config.yaml").exists():
        return []
    # It names classes to import.
    check_run_folder(path)
    return [path / "config.yaml"]


def run_of(checkpoint: Path) -> Path | None:
    """The run that a checkpoint lies in."""
    path = checkpoint.parent.parent
    return path if checkpoint.parent.name == "checkpoints" and (path / "config.yaml").exists() else None
