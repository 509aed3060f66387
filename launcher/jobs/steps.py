"""How many optimizer steps a run has done, by all of its events. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class StepReader:
    """Collects the optimizer steps done by the newest attempt that trained; None if no event names a step."""

    def __init__(self) -> None:
        self.step: int | None = None

    def add(self, event: Mapping[str, Any]) -> None:
        """Add one event, in the order of the file.

        The highest step of an attempt counts: samples of an interval are written late, and each rank that fails has a
        step of its own. Only the start of a training may go back, to the step of its checkpoint.
        """
        step = event.get("step")
        # Minus one before the training.
        if type(step) is not int or step < 0:
            return
        is_start = self.step is None or event.get("kind") == "training_started"
        self.step = step if is_start else max(self.step or 0, step)
