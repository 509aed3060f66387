"""Finds a run and reads its directory, without changes to it."""

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
from launcher.jobs.peak_memory import PeakMemory
from launcher.jobs.status import RunProgress, RunStatus, read_run_status
from launcher.report.history import read_history
from launcher.report.metrics import Metric, collect_metrics
from launcher.report.records import History
from launcher.report.units import format_plural
from launcher.runs.job_output import find_job_output
from launcher.runs.lock import read_owner
from launcher.runs.lookup import locate_run
from launcher.runs.script_record import is_script_run, read_script_record
from launcher.runs.sweep_record import read_members

MEMORY_PARTS = ("parameters", "gradients", "optimizer_states", "activations", "temporaries", "buffers")
# What the report reads of a plan.
_PLAN: Mapping[str, Any] = {
    "precision": str, "precision_before": str, "precision_reasons": [str], "has_loss_scale": bool,
    "world_size": float, "num_nodes": float, "hosts": [str], "devices": dict, "device_kind": str,
    "strategy": {"name": str, "reasons": [str], "rejected": [{"name": str, "reason": str}]},
    "batch": {"global_batch_size": str}, "batch_reasons": [str], "notices": [str],
    "memory": {
        "limit_bytes": float, "method": str,
        "assessments": [{"name": str, "memory": dict.fromkeys(MEMORY_PARTS, float)}],
    },
}  # fmt: skip
_FILES = (FILE_NAME, "config.yaml", "plan.json")
_TAIL_BYTES = 64 * 1024
_TAIL_LINES = 25
_MOST_NAMES = 3
_LONGEST_NAME = 1024


@dataclass(frozen=True, slots=True)
class Run:
    """The contents of a run directory (an absolute path).

    Attributes:
        metrics: every metric that was logged, by name.
        status: as `launcher status` shows it, with the reason why the run ended.
        config: `config.yaml` with secrets hidden; empty if it cannot be read.
        problems: files that could not be read, and why.
        script: what `launcher run` started, if it did: see `launcher.runs.script_record`.
        log: last lines of `log_file`, the log of the rank that failed first; empty if the run did not fail.
    """

    path: Path
    history: History
    metrics: Mapping[str, Metric]
    status: RunStatus
    peak_memory: PeakMemory
    config: Mapping[str, Any]
    problems: tuple[str, ...] = ()
    script: Mapping[str, Any] | None = None
    log: tuple[str, ...] = ()
    log_file: Path | None = None

    @property
    def name(self) -> str:
        """The run's name."""
        return self.path.name

    @property
    def plan(self) -> dict[str, Any]:
        """The parts of the plan that the report shows; another version may have written it."""
        return conform(self.history.plan, _PLAN)


def conform(value: Any, shape: Any) -> Any:
    """The value in this shape: a type, a list with the shape of its items, or a mapping with the shape of each key.

    What is missing or has another type is empty, or None for a number.
    """
    if isinstance(shape, Mapping):
        given = conform(value, dict)
        return {key: conform(given.get(key), inner) for key, inner in shape.items()}
    if isinstance(shape, list):
        return [conform(item, shape[0]) for item in value] if isinstance(value, list | tuple) else []
    if shape is float:
        return float(value) if type(value) in (int, float) else None
    if shape is dict:
        return value if isinstance(value, Mapping) else {}
    return "" if value is None else shape(value)


def find_sweep_folder(name: str, runs_dir: Path) -> Path | None:
    """The folder of a sweep, given its name in `runs_dir` or its path; None if it is none."""
    if not name.strip() or "\0" in name or len(name) > _LONGEST_NAME:
        return None
    return next((path.absolute() for path in (Path(name), runs_dir / name) if read_members(path)), None)


def find_run_directory(name: str, runs_dir: Path) -> Path:
    """The directory of a run.

    Args:
        name: the run's name in `runs_dir`, or the path of its directory or one in it.
        runs_dir: folder of the runs.

    Raises:
        ReportError: there is no such run; lists the existing runs.
    """
    if not name.strip() or "\0" in name:
        raise ReportError(f"given {name!r}; expected a run's name or directory; {list_runs(runs_dir)}")
    try:
        for path in (Path(name), runs_dir / name):
            if path.is_file() and path.name in _FILES:
                path = path.parent
            if is_run(path):
                return path.absolute()
        found = next((p for p in (Path(name), runs_dir / name) if p.exists()), None)
        folder, own = locate_run(runs_dir, name)
        if is_run(folder / own):
            return (folder / own).absolute()
    except OSError as error:
        reason = error.strerror or error
        raise ReportError(f"{name} cannot be read: {reason}; give a run's name or directory") from error
    if found is None:
        near = difflib.get_close_matches(Path(name).name, _run_names(runs_dir), n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ReportError(f"no run {name!r} found, as a directory or in {runs_dir}; {hint}{list_runs(runs_dir)}")
    silent = find_job_output(found)
    if silent is not None:
        raise ReportError(f"run {found.name!r} has not started to train: {silent.reason}; "
                          f"the output of its job is {silent.file}")  # fmt: skip
    if found.is_dir() and _run_names(found):
        raise ReportError(f"{found} contains runs and is not a run; {list_runs(found)}")
    raise ReportError(f"{found} is not a run directory: it contains none of {', '.join(_FILES)}; {list_runs(runs_dir)}")


def _run_names(runs_dir: Path) -> list[str]:
    """Names of the runs in a folder, the newest first."""
    try:
        found = [(path.stat().st_mtime, path.name) for path in runs_dir.iterdir() if is_run(path)]
    except OSError:
        return []
    return [name for _, name in sorted(found, reverse=True)]


def read_run(path: Path) -> Run:
    """Read a run directory (an absolute path), complete or not.

    Raises:
        ReportError: the events cannot be read.
    """
    problems: list[str] = []
    progress = RunProgress()
    history = _read_history(path, progress, problems)
    # A plain script has neither a config nor a plan.
    script = read_script_record(path) if is_script_run(path) else None
    config = {} if script is not None else _read_mapping(path / "config.yaml", problems)
    if not history.plan and script is None:
        history = dataclasses.replace(history, plan=_read_mapping(path / "plan.json", problems))
    status = read_run_status(path, progress=progress)
    if history.attempts and history.outcome == "unknown" and read_owner(path)[1] != "ended":
        last = dataclasses.replace(history.attempts[-1], outcome="running")
        history = dataclasses.replace(history, attempts=(*history.attempts[:-1], last))
    silent = find_job_output(path)
    if silent is not None:
        problems.append(f"the newest job has not started to train: {silent.reason} ({silent.file})")
    log_file = _failure_log(path, history)
    log = _read_tail(log_file) if log_file is not None else ()
    metrics, peaks = collect_metrics(history), progress.memory.find_peak()
    return Run(path, history, metrics, status, peaks, redact(config), tuple(problems), script, log, log_file)


def is_run(path: Path) -> bool:
    """Whether the folder has a file of a run."""
    return path.is_dir() and any((path / name).is_file() for name in _FILES)


def list_runs(runs_dir: Path) -> str:
    """The runs in a folder as text, for an error message."""
    names = _run_names(runs_dir)
    if not names:
        return f"{runs_dir} contains no run yet (--runs-dir sets the folder)"
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return f"the runs in {runs_dir}, newest first: {', '.join(names[:_MOST_NAMES])}{more}"


def _read_history(path: Path, progress: RunProgress, problems: list[str]) -> History:
    file, damaged = path / FILE_NAME, []
    try:
        history = read_history(progress.watch(read_events(file, lambda: damaged.append(None))))
    except FileNotFoundError:
        problems.append(f"{FILE_NAME} is missing: the run ended before its first event")
        return History()
    except OSError as error:
        reason = error.strerror or error
        raise ReportError(f"{file} cannot be read: {reason}; ask the owner of the run for permission") from error
    total = history.unreadable_lines + len(damaged)
    if total:
        problems.append(f"{format_plural(total, 'line')} of {FILE_NAME} could not be read: cut off, or not written by "
                        "the launcher; the report shows the rest")  # fmt: skip
    return dataclasses.replace(history, unreadable_lines=total)


def _read_mapping(file: Path, problems: list[str]) -> dict[str, Any]:
    """The values of a YAML or JSON file; errors are added to `problems`."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
        values = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
        if isinstance(values, dict):
            return values
        problems.append(f"{file.name} is damaged: it contains no settings")
    except FileNotFoundError:
        problems.append(f"{file.name} is missing")
    except OSError as error:
        problems.append(f"{file.name} cannot be read: {error.strerror or error}")
    except (ValueError, yaml.YAMLError, RecursionError):
        problems.append(f"{file.name} is damaged")
    return {}


def _failure_log(path: Path, history: History) -> Path | None:
    """The log of the rank that failed first, or of rank 0 if the end was not recorded; None if there is none."""
    if history.outcome not in ("failed", "unknown") or not history.attempts:
        return None
    file = path / "logs" / f"rank-{history.attempts[-1].failed_rank or 0}.log"
    return file if file.is_file() and os.access(file, os.R_OK) else None


def _read_tail(file: Path) -> tuple[str, ...]:
    with file.open("rb") as stream:
        stream.seek(max(0, os.fstat(stream.fileno()).st_size - _TAIL_BYTES))
        tail = stream.read().decode(errors="replace")
    # A progress bar overwrites its line: only the last state counts.
    lines = [re.sub(r".*\r(?!$)", "", line).rstrip() for line in tail.split("\n")]
    return tuple(line for line in lines if line)[-_TAIL_LINES:]
