"""The progress of a training as a bar that fits the width of the terminal, with the texts of `ProgressLines`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import CustomProgress
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress import Task
from rich.progress_bar import ProgressBar as RichBar
from rich.table import Table
from rich.text import Text
from typing_extensions import override

from launcher.core.terminal import make_console
from launcher.training.callbacks.progress import MeasuredProgress, as_numbers, logging_interval
from launcher.training.callbacks.progress_text import BarTexts, fit_bar, order_metrics, wrap_metrics

# Reading a metric waits for the device: the bar does it this often, in seconds.
_READ_INTERVAL = 0.1
_REDRAWS_PER_SECOND = 10
# The metrics may fill this part of the screen.
_SHARE_OF_SCREEN, _MOST_LINES = 5, 6
_COLOUR = "#6206E0"  # of Lightning's bar


class TerminalProgress(MeasuredProgress, RichProgressBar):
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
