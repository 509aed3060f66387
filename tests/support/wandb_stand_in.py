"""A replacement of the wandb module that keeps its rows and alerts."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any


class RecordingWandb(ModuleType):
    """The part of wandb that the callback uses.

    Attributes:
        run: the current run, or None.
        rows: (step, row) of each `log` call that W&B would accept.
        alerts: (title, text) of each alert.
        before: called before each row; may wait or raise.
    """

    def __init__(self, *, with_run: bool = True) -> None:
        super().__init__("wandb")
        self.run: Any = SimpleNamespace(step=0, summary={}) if with_run else None
        self.rows: list[tuple[int, dict[str, Any]]] = []
        # Rows without a step.
        self.counted = 0
        self.alerts: list[tuple[str, str]] = []
        self.charts: list[tuple[str, str]] = []
        self.before: Callable[[], object] = lambda: None

    def log(self, row: dict[str, Any], step: int | None = None, *, commit: bool) -> None:
        assert commit
        self.before()
        if step is None:
            self.run.step += 1
            self.counted += 1
            step = self.run.step
        # W&B drops a row below its own step.
        if step >= self.run.step:
            self.run.step = step
            self.rows.append((step, dict(row)))

    def alert(self, title: str, text: str, level: str) -> None:
        assert level == "WARN"
        self.alerts.append((title, text))

    def define_metric(self, name: str, step_metric: str) -> None:
        self.charts.append((name, step_metric))
