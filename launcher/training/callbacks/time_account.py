"""Measures what rank zero spends the time of a training on."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl

from launcher.runs.spent_time import MEASURED

_OTHER = "other"


class TimeAccount:
    """Adds up the seconds of each kind since the training started; see `launcher.runs.goodput.KINDS`.

    Lightning has no hooks around the wait for a batch, the step and the save of a checkpoint, so the methods that do
    them are wrapped while a training lasts. A switch between kinds costs less than a microsecond.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._seconds: dict[str, float] = {}
        self._kind = self._after_step = self._outer_kind = _OTHER
        self._mark = 0.0
        self._wrapped: list[tuple[Any, str, Any, Any]] = []

    def read(self) -> dict[str, float]:
        """Seconds of each kind since the start of the training."""
        self._switch(self._kind)
        return {kind: round(self._seconds.get(kind, 0.0), 6) for kind in MEASURED}

    def start(self, trainer: pl.Trainer) -> None:
        """Begin at zero, with the start of a training."""
        self.stop()
        self._seconds, self._kind, self._mark = {}, _OTHER, self._now()
        # The host waits in a hook or a logger for the steps that an accelerator has not finished.
        self._after_step = _OTHER if trainer.strategy.root_device.type == "cpu" else "step"
        loop = trainer.fit_loop.epoch_loop
        self._wrap(trainer, "save_checkpoint", "checkpoint")
        self._wrap(loop.val_loop, "run", "validation")
        self._wrap(loop, "advance", _OTHER)
        # Lightning calls these around the wait for a batch.
        self._replace(loop, "_on_before_fetch", self._around_fetch(self._fetch_begins))
        self._replace(loop, "_on_after_fetch", self._around_fetch(self._fetch_ends))
        self._wrap(loop.automatic_optimization, "run", "step")
        self._wrap(loop.manual_optimization, "run", "step")

    def stop(self) -> None:
        """Remove the wrappers."""
        for owner, name, wrapper, before in reversed(self._wrapped):
            # Another one may have wrapped it again.
            if vars(owner).get(name) is wrapper:
                del vars(owner)[name]
                if before is not None:
                    vars(owner)[name] = before
        self._wrapped.clear()

    def batch_begins(self) -> None:
        """The batch has been read and is on the device."""
        if self._wrapped:
            self._switch(_OTHER)

    def _fetch_begins(self) -> None:
        self._outer_kind = self._kind
        self._switch("data")

    def _fetch_ends(self) -> None:
        # Otherwise the batch is copied to the device next, until `batch_begins`.
        if self._outer_kind == "step":
            self._switch("step")

    def _around_fetch(self, action: Callable[[], None]) -> Callable[[Any], Any]:
        def make(inner: Any) -> Any:
            def both() -> None:
                inner()
                action()

            return both

        return make

    def _wrap(self, owner: Any, name: str, kind: str) -> None:
        def make(inner: Any) -> Any:
            def timed(*arguments: Any, **options: Any) -> Any:
                outer = self._kind
                self._switch(kind)
                try:
                    return inner(*arguments, **options)
                finally:
                    self._switch(self._after_step if kind == "step" else outer)

            return timed

        self._replace(owner, name, make)

    def _replace(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        inner, before = getattr(owner, name), vars(owner).get(name)
        vars(owner)[name] = wrapper = functools.wraps(inner)(make(inner))
        self._wrapped.append((owner, name, wrapper, before))

    def _switch(self, kind: str) -> None:
        now = self._now()
        self._seconds[self._kind] = self._seconds.get(self._kind, 0.0) + now - self._mark
        self._mark, self._kind = now, kind
