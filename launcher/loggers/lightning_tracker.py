"""Uses any Lightning logger as a tracker: CSV, TensorBoard, MLflow, or a user's own class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from typing_extensions import override

from launcher.loggers.base import LogStep, Tracker, is_of_class
from launcher.loggers.row_queue import RowQueue

# Seconds that the end of a training waits for a server to accept the last rows.
_FLUSH_TIMEOUT = 5.0
# The longest text that every version of MLflow accepts as a tag.
_LONGEST_TAG = 5000
_KINDS = ("CSVLogger", "TensorBoardLogger", "MLFlowLogger")


class LightningTracker(Tracker):
    """Logs to a Lightning logger, at the steps at which Lightning itself logs to it.

    The monitor's metrics appear next to the user's, and a resumed run continues both. MLflow's calls wait for its
    server and run in a background thread. The others write local files and may not be used from two threads, so they
    are called directly. `notice` receives the first problem with the logger.
    """

    def __init__(self, logger: Any, notice: Callable[[str], None]) -> None:
        self._logger = logger
        self._notice = notice
        self._kind = next((name for name in _KINDS if is_of_class(logger, name)), None)
        # A user's own method may accept numbers only.
        is_lightnings = type(logger).log_metrics.__module__.startswith(("lightning.", "pytorch_lightning."))
        self._is_table = self._kind == "CSVLogger" and is_lightnings
        self._queue = RowQueue(tracker=type(logger).__name__) if self._kind == "MLFlowLogger" else None
        self._columns: set[str] = set()
        self._error: Exception | None = None
        self._has_reported = False

    @override
    def log_row(self, row: Mapping[str, Any], step: LogStep) -> None:
        values = self._loggable(row)
        if not self._is_table:
            # Lightning logs it at the same step already. In a table it belongs to each row.
            values.pop("epoch", None)
        self._columns.update(values)
        self._write(lambda: self._logger.log_metrics(values, step.batch))

    @override
    def alert(self, kind: str, title: str, text: str, step: LogStep) -> None:
        message = f"step {step.optimizer_steps}: {title}: {text}"
        self._write(lambda: self._write_text(f"alert/{kind}", message, step.batch, otherwise=1.0))

    @override
    def summarize(self, values: Mapping[str, Any], step: LogStep) -> None:
        # The rows' last values are there already.
        new = {name: value for name, value in values.items() if name not in self._columns}
        row = self._loggable(new)
        if row:
            self._write(lambda: self._logger.log_metrics(row, step.batch))
        for name, text in new.items():
            if isinstance(text, str) and name not in row:
                self._write(lambda name=name, text=text: self._write_text(name, text, step.batch))

    @override
    def finish(self) -> None:
        if self._queue is not None and self._queue.close(0 if self._has_reported else _FLUSH_TIMEOUT):
            self._report("all rows in time; training was not delayed")
        self._report_error()

    def _loggable(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The values that `log_metrics` accepts: numbers, and texts in a table."""
        kinds = (int, float, str) if self._is_table else (int, float)
        return {name: int(value) if isinstance(value, bool) else value for name, value in row.items()
                if isinstance(value, kinds)}  # fmt: skip

    def _write(self, write: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                write()
            except Exception as error:  # noqa: BLE001 -- a logger raises anything, and may not stop a training
                self._error = error

        if self._queue is None:
            guarded()
        else:
            self._queue.put(guarded)
        self._report_error()

    def _report_error(self) -> None:
        """Here, in the training's thread: the thread of the queue may not write events."""
        if self._error is not None:
            self._report(f"the loss scale: {type(self._error).__name__}: {self._error}; training continues")

    def _report(self, problem: str) -> None:
        if not self._has_reported:
            self._has_reported = True
            self._notice(f"{type(self._logger).__name__} did not accept {problem}")

    def _write_text(self, name: str, text: str, step: int, otherwise: float | None = None) -> None:
        """Write a text if the logger can; else log the number `otherwise`, or make the text a hyperparameter."""
        logger = self._logger
        if self._kind == "TensorBoardLogger":
            logger.experiment.add_text(name, text, step)
        elif self._kind == "MLFlowLogger":
            logger.experiment.set_tag(logger.run_id, name, text[:_LONGEST_TAG])
        elif self._is_table:
            logger.log_metrics({name: text}, step)
        elif otherwise is not None:
            logger.log_metrics({name: otherwise}, step)
        else:
            logger.log_hyperparams({name: text})
