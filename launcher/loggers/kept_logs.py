"""Log files that a run goes on with: each attempt writes where the one before did, without the rows that come again.

Lightning gives a `CSVLogger` or `TensorBoardLogger` without a version the next free number, so each attempt would have
a folder of its own, and with it a `ModelCheckpoint` that saves in the logger's folder.
"""

from __future__ import annotations

import csv
import json
import os
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
from launcher.runs.directory import RunDirectory

FILE_NAME = "loggers.json"
KEY = "launcher_kept_logs"
_VERSIONED = (CSVLogger, TensorBoardLogger)
_STORE_KEY = "launcher/logger_versions"


@dataclass(frozen=True, slots=True)
class LogPlace:
    """Where a logger writes.

    Attributes:
        kind: the logger's class.
        save_dir, name: as the user gave them.
        version: a number, or a folder's name.
    """

    kind: str
    save_dir: str
    name: str
    version: int | str

    def is_of(self, logger: Any) -> bool:
        """Whether the logger may go on here: it says nothing else."""
        same = (self.kind, self.save_dir, self.name) == _names(logger)
        return same and vars(logger).get("_version") in (None, self.version)


def _names(logger: Any) -> tuple[str, str, str]:
    return f"{type(logger).__module__}.{type(logger).__qualname__}", os.fspath(logger.save_dir), str(logger.name)


def choose_places(loggers: Sequence[Any], before: Sequence[LogPlace]) -> list[LogPlace]:
    """Where each logger writes: where an earlier attempt did, else in the next free version.

    Args:
        loggers: `CSVLogger`s and `TensorBoardLogger`s, in their order.
        before: the earlier attempt's.
    """
    left, chosen = list(before), list[LogPlace]()
    taken: dict[str, int] = {}
    for logger in loggers:
        place = next((each for each in left if each.is_of(logger)), None)
        if place is not None:
            left.remove(place)
        else:
            version = logger.version
            if isinstance(version, int):
                # The folder of one before it in the list is not made yet.
                version = max(version, taken.get(logger.root_dir, -1) + 1)
            place = LogPlace(*_names(logger), version)
        if isinstance(place.version, int):
            taken[logger.root_dir] = max(place.version, taken.get(logger.root_dir, -1))
        chosen.append(place)
    return chosen


class LogFileState(pl.Callback):
    """Gives the loggers their places, and keeps in each checkpoint how much they had written.

    Args:
        loggers: of the run; those that have no versions are left alone.
        run: keeps the places.
        rank: rank zero chooses the places and writes.
        world_size: number of ranks.
        store: takes the places to the other ranks.
        timeout: seconds that they wait for rank zero.
        written: what the checkpoint that the run goes on from has under `KEY`; None if the run begins.
    """

    def __init__(
        self,
        loggers: Sequence[Logger],
        run: RunDirectory,
        rank: int,
        world_size: int,
        store: Any,
        timeout: float,
        written: Mapping[str, Any] | None,
    ) -> None:
        self._loggers: list[Any] = [each for each in loggers if isinstance(each, _VERSIONED)]
        if not self._loggers:
            return
        before = () if run.is_new or rank != 0 else _read(run.path / FILE_NAME)
        if rank == 0:
            places = choose_places(self._loggers, before)
            text = json.dumps([_plain(place) for place in places])
            write_file(run.path / FILE_NAME, text)
            if world_size > 1:
                store.set(_STORE_KEY, text)
        else:
            store.wait([_STORE_KEY], timedelta(seconds=timeout))
            places = [LogPlace(**values) for values in json.loads(store.get(_STORE_KEY))]
        self._places = places
        for logger, place in zip(self._loggers, places, strict=True):
            vars(logger)["_version"] = place.version
            if rank == 0:
                _go_on(logger, place, place in before, written)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # The row of an epoch comes behind the checkpoint of its end.
        self._flush()

    def _flush(self) -> None:
        """What is kept in memory would be lost with this process, and is not logged again."""
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
        pairs = zip(self._loggers, self._places, strict=True)
        writers = ((place, vars(logger).get("_experiment")) for logger, place in pairs)
        rows = {_key(place): writer.rows for place, writer in writers if isinstance(writer, _Writer)}
        checkpoint[KEY] = {"rows": rows, "step": _steps_logged(trainer)}


def _go_on(logger: Any, place: LogPlace, is_continued: bool, written: Mapping[str, Any] | None) -> None:
    """Have a logger write behind what the checkpoint's attempt had written."""
    if vars(logger).get("_experiment") is not None:
        return
    # A run without a checkpoint begins anew; one of another version says nothing of its logs.
    kept: Mapping[str, Any] = {"rows": {_key(place): 0}, "step": 0} if written is None else written
    if isinstance(logger, TensorBoardLogger):
        if is_continued and "step" in kept:
            vars(logger)["_kwargs"].setdefault("purge_step", kept["step"])
    elif type(logger).experiment is CSVLogger.experiment:
        logger._fs.makedirs(logger.root_dir, exist_ok=True)
        writer = _Writer(logger.log_dir, is_continued)
        if is_continued:
            if _key(place) in kept.get("rows", {}):
                writer.cut(kept["rows"][_key(place)], kept["step"])
            else:
                writer.cut(None, 0)
        logger._experiment = writer


class _Writer(ExperimentWriter):
    """Lightning's, which can go on with a file and knows how many rows it has."""

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
            self._ahead.remove(row)  # it is in the file
            return
        super().log_metrics(metrics_dict, step)
        self.rows += 1

    def cut(self, rows: int | None, step: int) -> None:
        """Drop what is logged again: behind so many rows all from this step on. None keeps all.

        Of an earlier step there may be a row behind the checkpoint, as that of an epoch is logged after its end. If it
        is logged again nevertheless, as by a validation that is made up for, the file has it already.
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
    """The first step whose row is still to come: loggers count batches after which an optimizer stepped."""
    loop = trainer.fit_loop.epoch_loop
    progress = loop.batch_progress.current
    # Lightning counts a batch after its validation.
    is_uncounted = progress.ready > progress.completed or trainer.validating
    return loop._batches_that_stepped + int(is_uncounted and not loop._should_accumulate())


def _read(path: Path) -> list[LogPlace]:
    try:
        return [LogPlace(**values) for values in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        return []


def _plain(place: LogPlace) -> dict[str, Any]:
    return {"kind": place.kind, "save_dir": place.save_dir, "name": place.name, "version": place.version}


def _key(place: LogPlace) -> str:
    return json.dumps([place.kind, place.save_dir, place.name, place.version])
