"""Continues the log files of a run: each attempt writes to the files of the one before, without repeating rows.

Lightning gives a `CSVLogger` or `TensorBoardLogger` without a version the next free number, so each attempt would have
its own folder, and so would a `ModelCheckpoint` that saves in the logger's folder.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO, cast

import lightning.pytorch as pl
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from typing_extensions import override

from launcher.core.atomic_write import write_file
from launcher.hardware.topology import Topology
from launcher.runs.directory import RunDirectory

FILE_NAME = "loggers.json"
KEY = "launcher_kept_logs"
_VERSIONED = (CSVLogger, TensorBoardLogger)
_STORE_KEY = "launcher/logger_versions"


@dataclass(frozen=True, slots=True)
class LogLocation:
    """The folder of a logger.

    Attributes:
        save_dir, name: the user's arguments.
        version: a number, or the name of a folder.
    """

    kind: str
    save_dir: str
    name: str
    version: int | str

    def fits(self, logger: Any) -> bool:
        """Whether the logger may continue here: its arguments are the same, and it has no other version."""
        same = (self.kind, self.save_dir, self.name) == _names(logger)
        return same and vars(logger).get("_version") in (None, self.version)


def _names(logger: Any) -> tuple[str, str, str]:
    return f"{type(logger).__module__}.{type(logger).__qualname__}", os.fspath(logger.save_dir), str(logger.name)


def choose_locations(loggers: Sequence[Any], before: Sequence[LogLocation]) -> list[LogLocation]:
    """Choose the folder of each CSV or TensorBoard logger: that of an earlier attempt, else the next free version."""
    unused, chosen = list(before), list[LogLocation]()
    highest: dict[str, int] = {}
    for logger in loggers:
        location = next((each for each in unused if each.fits(logger)), None)
        if location is not None:
            unused.remove(location)
        else:
            version = logger.version
            if isinstance(version, int):
                # The folder of an earlier logger in the list does not exist yet.
                version = max(version, highest.get(logger.root_dir, -1) + 1)
            location = LogLocation(*_names(logger), version)
        if isinstance(location.version, int):
            highest[logger.root_dir] = max(location.version, highest.get(logger.root_dir, -1))
        chosen.append(location)
    return chosen


class LogFileState(pl.Callback):
    """Sets the loggers' folders, and records in each checkpoint how many rows they had written.

    Args:
        loggers: of the run; those without versions are not changed.
        topology: rank zero chooses the folders and writes.
        timeout: seconds that the other ranks wait for rank zero.
        written: value of `KEY` in the checkpoint that the run resumes from; None for a new run.
    """

    def __init__(
        self,
        loggers: Sequence[Logger],
        run: RunDirectory,
        topology: Topology,
        store: Any,
        timeout: float,
        written: Mapping[str, Any] | None,
    ) -> None:
        self._loggers: list[Any] = [each for each in loggers if isinstance(each, _VERSIONED)]
        if not self._loggers:
            return
        is_zero = topology.rank == 0
        before = () if run.is_new or not is_zero else _read(run.path / FILE_NAME)
        if is_zero:
            locations = choose_locations(self._loggers, before)
            text = json.dumps([dataclasses.asdict(location) for location in locations])
            write_file(run.path / FILE_NAME, text)
            if topology.world_size > 1:
                store.set(_STORE_KEY, text)
        else:
            store.wait([_STORE_KEY], timedelta(seconds=timeout))
            locations = [LogLocation(**values) for values in json.loads(store.get(_STORE_KEY))]
        self._locations = locations
        for logger, location in zip(self._loggers, locations, strict=True):
            vars(logger)["_version"] = location.version
            if is_zero:
                _continue_files(logger, location, location in before, written)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # The row of an epoch is logged after the checkpoint of its end.
        self._flush()

    def _flush(self) -> None:
        """Write buffered rows, which would be lost with this process and are not logged again."""
        for logger in self._loggers:
            writer = vars(logger).get("_experiment")
            if isinstance(writer, _Writer):
                writer.save()
            elif isinstance(logger, TensorBoardLogger) and writer is not None:
                writer.flush()

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if not self._loggers:
            return
        self._flush()
        pairs = zip(self._loggers, self._locations, strict=True)
        writers = ((location, vars(logger).get("_experiment")) for logger, location in pairs)
        rows = {_key(location): writer.rows for location, writer in writers if isinstance(writer, _Writer)}
        checkpoint[KEY] = {"rows": rows, "step": _steps_logged(trainer)}


def _continue_files(logger: Any, location: LogLocation, is_continued: bool, written: Mapping[str, Any] | None) -> None:
    """Make a logger append to what was written before the checkpoint."""
    if vars(logger).get("_experiment") is not None:
        return
    # Without a checkpoint a run starts over. A checkpoint of another version may have no record of the logs.
    kept: Mapping[str, Any] = {"rows": {_key(location): 0}, "step": 0} if written is None else written
    if isinstance(logger, TensorBoardLogger):
        options = vars(logger)["_kwargs"]
        # A logger from a config has all options of its writer, also those that were not set.
        if is_continued and "step" in kept and options.get("purge_step") is None:
            options["purge_step"] = kept["step"]
        if is_continued:
            _wait_for_next_second(Path(logger.log_dir))
    elif type(logger).experiment is CSVLogger.experiment:
        logger._fs.makedirs(logger.root_dir, exist_ok=True)
        writer = _Writer(logger.log_dir, is_continued)
        if is_continued:
            writer.truncate(kept.get("rows", {}).get(_key(location)), kept.get("step", 0))
        logger._experiment = writer


def _wait_for_next_second(folder: Path) -> None:
    """TensorBoard reads files in the order of their names: second of their start, host, process number as text."""
    with contextlib.suppress(OSError, ValueError):
        newest = max(int(path.name.split(".")[3]) for path in folder.glob("events.out.tfevents.*"))
        time.sleep(min(max(newest + 1 - time.time(), 0), 1))  # clocks of two nodes may differ


class _Writer(ExperimentWriter):
    """Lightning's writer, which can also continue a file and counts its rows."""

    def __init__(self, log_dir: str, is_continued: bool) -> None:
        self._is_continued = is_continued
        self._ahead: list[tuple[int, set[str]]] = []
        self.rows = 0
        super().__init__(log_dir)

    @override
    def _check_log_dir_exists(self) -> None:
        if not self._is_continued:
            super()._check_log_dir_exists()

    @override
    def log_metrics(self, metrics_dict: dict[str, float], step: int | None = None) -> None:
        row = (-1 if step is None else step, {*metrics_dict, "step"})
        if row in self._ahead:
            self._ahead.remove(row)  # the file has it already
            return
        super().log_metrics(metrics_dict, step)
        self.rows += 1

    def truncate(self, rows: int | None, step: int) -> None:
        """Remove rows that will be logged again: those after the first `rows`, from `step` on; None keeps all.

        `rows` was the number of rows when the checkpoint was saved. Rows of earlier steps, as of an epoch, may come
        after it and are kept. If a repeated validation logs one again, it is not written twice.
        """
        if not self._fs.isfile(self.metrics_file_path):
            return
        with self._fs.open(self.metrics_file_path, "r", newline="") as file:
            found: list[dict[str, str]] = list(csv.DictReader(cast(TextIO, file)))
        if rows is not None:
            ahead = [row for row in found[rows:] if int(row["step"]) < step]
            self._ahead = [(int(row["step"]), {key for key, value in row.items() if value}) for row in ahead]
            found = found[:rows] + ahead
        self.rows = len(found)
        self.metrics_keys = sorted({key for row in found for key, value in row.items() if value})
        if not found:
            self._fs.rm_file(self.metrics_file_path)
            return
        temporary = f"{self.metrics_file_path}.tmp"
        with self._fs.open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=self.metrics_keys, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(found)
        self._fs.mv(temporary, self.metrics_file_path)


def _steps_logged(trainer: pl.Trainer) -> int:
    """The first step that is not logged yet: loggers count batches after which an optimizer stepped."""
    loop = trainer.fit_loop.epoch_loop
    progress = loop.batch_progress.current
    # Lightning counts a batch after its validation.
    is_uncounted = progress.ready > progress.completed or trainer.validating
    return loop._batches_that_stepped + int(is_uncounted and not loop._should_accumulate())


def _read(path: Path) -> list[LogLocation]:
    try:
        return [LogLocation(**values) for values in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        return []


def _key(location: LogLocation) -> str:
    return json.dumps(dataclasses.astuple(location))
