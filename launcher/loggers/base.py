"""The base class of experiment trackers: each one receives the monitor's rows, alerts and the final summary."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class LogStep:
    """A position in a training, in both counts that trackers use.

    Attributes:
        optimizer_steps: optimizer steps done, as `trainer.global_step`.
        batch: the step at which Lightning logs the metrics of the same batch. It begins at 0 and counts batches after
            which an optimizer stepped, however many optimizers there are.
    """

    optimizer_steps: int
    batch: int


class Tracker(ABC):
    """One place that rank zero logs to.

    No method raises or waits for a network: a tracker that fails costs rows and one notice, never the run.
    """

    @abstractmethod
    def log_row(self, row: Mapping[str, Any], step: LogStep) -> None:
        """Write metrics by name: numbers, and a few texts, which a tracker of numbers leaves out."""

    @abstractmethod
    def alert(self, kind: str, title: str, text: str, step: LogStep) -> None:
        """Report a problem: `kind` identifies the broken rule, `text` states the measurement and what to do."""

    @abstractmethod
    def summarize(self, values: Mapping[str, Any], step: LogStep) -> None:
        """Write the result of the training, numbers and texts by name, at its last step."""

    @abstractmethod
    def finish(self) -> None:
        """Write what is still queued, for a limited time. Called once or several times at the end of a training."""


def is_of_class(logger: Any, name: str) -> bool:
    """Whether a logger's class or a base of it has this name, in `lightning` or in `pytorch_lightning`."""
    return any(base.__name__ == name for base in type(logger).__mro__)
