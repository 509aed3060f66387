"""Finds a run and reads what lies in its directory. Nothing is changed there."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launcher.core.errors import ReportError
from launcher.core.events import FILE_NAME, read_events
from launcher.core.secrets import redact
from launcher.report.history import read_history
from launcher.report.records import History
from launcher.runs.job_output import find_job_output
from launcher.runs.lock import read_owner

_FILES = (FILE_NAME, "config.yaml", "plan.json")
_TAIL_BYTES = 64 * 1024
_TAIL_LINES = 25
_NAMES_TOLD = 8


@dataclass(frozen=True, slots=True)
class Run:
    """What a run's directory holds.

    Attributes:
        path: absolute path of the directory.
        history: what the events say.
        config: `config.yaml`, values of secret names hidden; empty if it cannot be read.
        problems: what could not be read, in words.
        log: the last lines of the log of the rank that failed; empty if none did.
        log_file: where they are from; None without them.
    """

    path: Path
    history: History
    config: Mapping[str, Any]
    problems: tuple[str, ...] = ()
    log: tuple[str, ...] = ()
    log_file: Path | None = None

    @property
    def name(self) -> str:
        """The run's name."""
        return self.path.name


def find_run_directory(word: str, runs_dir: Path) -> Path:
    """The run's directory.

    Args:
        word: its path, or its name below `runs_dir`.
        runs_dir: folder of the runs.

    Raises:
        ReportError: there is no such run, or the folder is none of a run; names those that there are.
    """
    if not word.strip() or "\0" in word:
        raise ReportError(f"given {word!r}; expected a run's name or directory; {_known(runs_dir)}")
    try:
        for path in (Path(word), runs_dir / word):
            if path.is_file() and path.name in _FILES:
                path = path.parent  # one of a run's files stands for the run
            if _is_run(path):
                return path.absolute()
        found = next((p for p in (Path(word), runs_dir / word) if p.exists()), None)
    except OSError as error:
        raise ReportError(
            f"{word} cannot be read: {error.strerror or error}; give a run's name or directory"
        ) from error
    if found is None:
        near = difflib.get_close_matches(word, run_names(runs_dir), n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ReportError(
            f"there is no run {word!r}, neither as a directory nor in {runs_dir}; {hint}{_known(runs_dir)}"
        )
    said = find_job_output(found)
    if said is not None:
        raise ReportError(f"run {found.name!r} has not begun to train: {said.reason}; "
                          f"what its job said is in {said.file}")  # fmt: skip
    if found.is_dir() and run_names(found):
        raise ReportError(f"{found} holds runs and is none itself; {_known(found)}")
    raise ReportError(f"{found} is no run's directory: it has none of {', '.join(_FILES)}; {_known(runs_dir)}")


def run_names(runs_dir: Path) -> list[str]:
    """Names of the runs in a folder, the newest first."""
    try:
        found = [(path.stat().st_mtime, path.name) for path in runs_dir.iterdir() if _is_run(path)]
    except OSError:
        return []
    return [name for _, name in sorted(found, reverse=True)]


def read_run(path: Path) -> Run:
    """Read a run's directory, whatever state its run left it in.

    Args:
        path: absolute path of the directory.

    Raises:
        ReportError: the events cannot be read.
    """
    problems: list[str] = []
    history = _history(path, problems)
    config = _read(path / "config.yaml", problems)
    if not history.plan:
        history = dataclasses.replace(history, plan=_read(path / "plan.json", problems))
    if history.attempts and history.outcome == "unknown" and read_owner(path)[1] != "ended":
        last = dataclasses.replace(history.attempts[-1], outcome="running")
        history = dataclasses.replace(history, attempts=(*history.attempts[:-1], last))
    said = find_job_output(path)
    if said is not None:
        problems.append(f"the newest job has not begun to train: {said.reason} ({said.file})")
    log, log_file = _failure_log(path, history)
    return Run(path, history, redact(config), tuple(problems), log, log_file)


def _is_run(path: Path) -> bool:
    return path.is_dir() and any((path / name).is_file() for name in _FILES)


def _known(runs_dir: Path) -> str:
    names = run_names(runs_dir)
    if not names:
        return f"there is no run in {runs_dir} yet (--runs-dir says where to look)"
    more = f" and {len(names) - _NAMES_TOLD} more" if len(names) > _NAMES_TOLD else ""
    return f"the runs in {runs_dir}, newest first: {', '.join(names[:_NAMES_TOLD])}{more}"


def _history(path: Path, problems: list[str]) -> History:
    file = path / FILE_NAME
    foreign: list[None] = []
    try:
        history = read_history(read_events(file, lambda: foreign.append(None)))
    except FileNotFoundError:
        problems.append(f"{FILE_NAME} is missing: the run ended before it could tell anything")
        return History()
    except OSError as error:
        raise ReportError(
            f"{file} cannot be read: {error.strerror or error}; ask who owns the run to make it readable"
        ) from error
    total = history.foreign_lines + len(foreign)
    if total:
        plural = "s" if total > 1 else ""
        problems.append(
            f"{total} line{plural} of {FILE_NAME} could not be read (cut off, or not the launcher's); "
            "the rest is shown here"
        )
    return dataclasses.replace(history, foreign_lines=total)


def _read(file: Path, problems: list[str]) -> dict[str, Any]:
    """A mapping from a YAML or JSON file; what is wrong with it goes to `problems`."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
        values = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except FileNotFoundError:
        problems.append(f"{file.name} is missing")
        return {}
    except OSError as error:
        problems.append(f"{file.name} cannot be read: {error.strerror or error}")
        return {}
    except (ValueError, yaml.YAMLError, RecursionError):
        problems.append(f"{file.name} is damaged")
        return {}
    if not isinstance(values, dict):
        problems.append(f"{file.name} is damaged: it holds no settings")
        return {}
    return values


def _failure_log(path: Path, history: History) -> tuple[tuple[str, ...], Path | None]:
    """The end of the log of the rank that failed first, or of rank zero where nobody said why the run ended."""
    if history.outcome not in ("failed", "unknown") or not history.attempts:
        return (), None
    rank = history.attempts[-1].failed_rank or 0
    file = path / "logs" / f"rank-{rank}.log"
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - _TAIL_BYTES))
            tail = stream.read().decode(errors="replace")
    except OSError:
        return (), None
    # A progress bar draws one line over and over.
    lines = [re.sub(r".*\r(?!$)", "", line).rstrip() for line in tail.split("\n")]
    return tuple(line for line in lines if line)[-_TAIL_LINES:], file
