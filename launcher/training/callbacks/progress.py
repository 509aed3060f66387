"""The progress of a training on the terminal: a bar that fits its width, or lines for output that is not redrawn.

Both show the same: recent and mean speed, the time left, and the logged metrics, those with `prog_bar=True` first.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler, RichProgressBar, Timer
from lightning.pytorch.callbacks.progress.rich_progress import CustomProgress
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress import Task
from rich.progress_bar import ProgressBar as RichBar
from rich.table import Table
from rich.text import Text
from torch import Tensor
from typing_extensions import override

from launcher.core.terminal import make_console
from launcher.training.callbacks.progress_text import (
    BarTexts,
    SpeedMeter,
    TrainingLength,
    fit_bar,
    format_duration,
    format_mean,
    format_metrics,
    format_speed,
    order_metrics,
    wrap_metrics,
)

# Metrics on one line of a file.
_MOST_IN_LINE = 12
# Reading a metric waits for the device: the bar does it this often, in seconds.
_READ_INTERVAL = 0.1
_REDRAWS_PER_SECOND = 10
# The metrics may fill this part of the screen.
_SHARE_OF_SCREEN, _MOST_LINES = 5, 6
_COLOUR = "#6206E0"  # of Lightning's bar


class _MeasuredProgress(pl.Callback):
    """Measures the training's speed and time left by the clock `now`; a second base class is called too."""

    def __init__(self, now: Callable[[], float], **options: Any) -> None:
        super().__init__(**options)
        self._now = now
        self._meter = SpeedMeter(now)
        self._seen_step = 0
        self._epoch = self._batches_done = 0

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._meter = SpeedMeter(self._now)
        self._seen_step = trainer.global_step

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._meter.batch_begins()

    def batch_ended(self, trainer: pl.Trainer, batch_idx: int) -> int:
        """Measure the batch and return how many optimizer steps it made."""
        steps = trainer.global_step - self._seen_step
        self._seen_step = trainer.global_step
        self._meter.batch_ends(steps)
        # At the end of an epoch the Trainer has the number of the next one already.
        self._epoch, self._batches_done = trainer.current_epoch, batch_idx + 1
        return steps

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._meter.pause()
        super().on_validation_start(trainer, pl_module)

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._meter.pause()
        super().on_save_checkpoint(trainer, pl_module, checkpoint)

    def length(self, trainer: pl.Trainer) -> TrainingLength:
        """The limits of the training, after the last batch."""
        return read_length(trainer, self._epoch, self._batches_done)

    def speed_texts(self, length: TrainingLength) -> tuple[str, str, str]:
        """Recent speed, mean speed and time left; empty while unknown."""
        recent, mean, left = self._meter.recent(), self._meter.mean(), self._meter.seconds_left(length)
        return (
            "" if recent is None else format_speed(recent),
            "" if recent is None or mean is None else format_mean(recent, mean),
            "" if left is None else f"ETA {format_duration(left)}",
        )


def read_length(trainer: pl.Trainer, epoch: int, batches_done: int) -> TrainingLength:
    """The limits of a training, after `batches_done` batches of an epoch."""
    step, batches = trainer.global_step, trainer.num_training_batches
    total = None if trainer.max_steps < 0 else trainer.max_steps
    batches_left = None
    if trainer.max_epochs is not None and trainer.max_epochs >= 0 and math.isfinite(batches):
        batches_left = max((trainer.max_epochs - epoch) * int(batches) - batches_done, 0)
        # Several optimizers, or another number of batches in a step later, make another number of steps.
        if trainer.lightning_module.automatic_optimization and not _changes_accumulation(trainer):
            steps = trainer.max_epochs * math.ceil(batches / trainer.accumulate_grad_batches)
            total = steps if total is None else min(steps, total)
    timers = [each.time_remaining() for each in trainer.callbacks if isinstance(each, Timer)]  # pyright: ignore[reportAttributeAccessIssue] -- set by a connector
    return TrainingLength(
        total,
        None if trainer.max_steps < 0 else max(trainer.max_steps - step, 0),
        batches_left,
        min((left for left in timers if left is not None), default=None),
    )


def _changes_accumulation(trainer: pl.Trainer) -> bool:
    schedulers: list[Any] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue] -- set by a connector
    return any(isinstance(each, GradientAccumulationScheduler) for each in schedulers)


def as_numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Metrics with one element as Python numbers; reads them from the device."""
    return {k: float(v) for k, v in metrics.items() if not isinstance(v, Tensor) or v.numel() == 1}


def logging_interval(trainer: pl.Trainer) -> int:
    """Steps between two reports. Lightning sets this attribute late and does not declare it."""
    return max(getattr(trainer, "log_every_n_steps", 0), 1)


class ProgressLines(_MeasuredProgress):
    """Prints one line at each logging interval and after each validation, for output that is not redrawn."""

    def __init__(self, console: Console, now: Callable[[], float] = time.perf_counter) -> None:
        super().__init__(now)
        self._console = console
        self._validated: frozenset[str] = frozenset()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        steps, step = self.batch_ended(trainer, batch_idx), trainer.global_step
        if not steps or step % logging_interval(trainer):
            return
        length = self.length(trainer)
        of = "" if length.steps is None else f"/{length.steps}"
        speed, mean, left = self.speed_texts(length)
        # Those of the last validation have their own line.
        logged = {name: value for name, value in trainer.logged_metrics.items() if name not in self._validated}
        metrics = _shown_metrics(trainer.progress_bar_metrics, logged)
        self._print(f"step {step}{of}", " ".join(filter(None, (speed, mean))), left, metrics)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            # Of this validation, unlike the metrics of the Trainer.
            results = trainer._results
            found = {} if results is None else results.metrics(on_step=False)
            metrics = _shown_metrics(found.get("pbar", {}), found.get("callback", {}))
            self._validated = frozenset(found.get("callback", {}))
            self._print(f"validation at step {trainer.global_step}", metrics)

    def _print(self, *parts: str) -> None:
        self._console.print("  ".join(filter(None, parts)), highlight=False, markup=False, soft_wrap=True)


def _shown_metrics(in_bar: Mapping[str, Any], others: Mapping[str, Any]) -> str:
    return format_metrics(*order_metrics(as_numbers(in_bar), as_numbers(others), _MOST_IN_LINE))


class TerminalProgress(_MeasuredProgress, RichProgressBar):
    """Lightning's progress bar without lines that are longer than the terminal: the metrics are below the bar."""

    def __init__(self, console: Console, now: Callable[[], float] = time.perf_counter) -> None:
        super().__init__(now, refresh_rate=_REDRAWS_PER_SECOND)
        self._screen: Console | None = console
        self._logged: dict[str, float] = {}
        self._read_at = -math.inf
        self.speed: tuple[str, str, str] = ("", "", "")
        self.metrics: dict[str, float] = {}

    @override
    def _init_progress(self, trainer: pl.Trainer) -> None:
        if self.is_enabled and (self.progress is None or self._progress_stopped):
            self._reset_progress_bar_ids()
            if trainer.state.fn is not TrainerFn.FITTING:
                self._logged, self.metrics, self.speed = {}, {}, ("", "", "")
            self._console = self._screen or make_console()
            self.progress = _Screen(self, self._console)
            self.progress.start()
            self._progress_stopped = False

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        steps = self.batch_ended(trainer, batch_idx)
        if steps and trainer.global_step % logging_interval(trainer) == 0:
            self._logged = as_numbers(trainer.logged_metrics)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._read_all(trainer)
        super().on_validation_end(trainer, pl_module)

        if trainer.state.fn is TrainerFn.VALIDATING:
            self._stop_progress()

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_test_end(trainer, pl_module)
        # Lightning prints the table of the results next, which a live bar would overwrite.
        self._stop_progress()

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._read_all(trainer)
        super().on_train_epoch_end(trainer, pl_module)

    def _read_all(self, trainer: pl.Trainer) -> None:
        self._read_at = -math.inf
        if not trainer.sanity_checking:
            self._logged = as_numbers(trainer.logged_metrics)

    @override
    def _update_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        now = self._now()
        if self.is_enabled and not trainer.sanity_checking and now - self._read_at >= _READ_INTERVAL:
            self._read_at = now
            self.speed = self.speed_texts(self.length(trainer))
            self.metrics, _ = order_metrics(as_numbers(trainer.progress_bar_metrics), self._logged)

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_screen": None}


class _Screen(CustomProgress):
    """One line for each bar; the speed and the metrics belong to that of the training."""

    def __init__(self, bar: TerminalProgress, console: Console) -> None:
        # Before the base class, which draws the first screen.
        self._bar, self._size, self._is_ended = bar, console, False
        super().__init__(console=console, refresh_per_second=_REDRAWS_PER_SECOND)

    @override
    def start(self) -> None:
        super().start()
        # A rank that is killed cannot show the cursor again.
        self.console.show_cursor(True)

    @override
    def stop(self) -> None:
        self._is_ended = True
        super().stop()

    @override
    def get_renderables(self) -> Iterator[RenderableType]:
        for task in self.tasks:
            if task.visible:
                is_training = task.id == self._bar.train_progress_bar_id
                yield _BarLine(task, *(self._bar.speed if is_training else ()))
        lines = min(max(self._size.height // _SHARE_OF_SCREEN, 1), _MOST_LINES)
        yield from (Text(line, no_wrap=True, overflow="crop") for line in
                    wrap_metrics(self._bar.metrics, self._size.width, lines))  # fmt: skip
        if not self._is_ended:
            # The cursor is on a line of its own: there the agent writes if this process is killed.
            yield Text()


class _BarLine:
    """A bar between its name and its numbers."""

    def __init__(self, task: Task, speed: str = "", mean: str = "", time_left: str = "") -> None:
        total = None if task.total is None or not math.isfinite(task.total) else int(task.total)
        # The same length at each batch, so that the bar keeps its width.
        count = f"{int(task.completed)}" if total is None else f"{int(task.completed):>{len(str(total))}}/{total}"
        self._texts = BarTexts(task.description.strip(), count, speed, mean, time_left)
        self._task, self._total = task, total

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        before, width, after = fit_bar(self._texts, options.max_width)
        if not width:
            yield Text(before, no_wrap=True, overflow="crop")
            return
        bar = RichBar(self._total, self._task.completed, width, pulse=self._total is None, complete_style=_COLOUR,
                      finished_style=_COLOUR, pulse_style=_COLOUR, animation_time=self._task.get_time())  # fmt: skip
        grid = Table.grid(padding=(0, 1, 0, 0), pad_edge=False)
        for _ in range(3):
            grid.add_column(no_wrap=True)
        grid.add_row(Text(before), bar, Text(after))
        yield grid
