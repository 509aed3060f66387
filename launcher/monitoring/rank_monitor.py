"""The monitor of a launcher run: trackers, events and the terminal receive the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from typing_extensions import override

from launcher.config.schema import WatchOptions
from launcher.core.output import RunOutput
from launcher.core.wrapping import escape_controls
from launcher.loggers.base import LogStep, Tracker
from launcher.monitoring.amp_callback import TrackedMonitor
from launcher.monitoring.gather import Gathered
from launcher.monitoring.health import (
    LOSS_ADVICE,
    LOSS_NOT_FINITE,
    LOSS_TITLE,
    Alert,
    Limits,
    find_broken_losses,
    find_slow_rank,
)
from launcher.monitoring.samples import RankSample
from launcher.monitoring.trainer_facts import is_rank_zero, logger_step, steps_done
from launcher.planning.flops import ModelWork

# More would make an event of a large run longer than it is useful.
_RANKS_IN_EVENT = 64
# Seconds that a checkpoint may wait for the other ranks' samples. They arrive immediately unless a rank has failed.
_SAVE_TIMEOUT = 0.2
_NO_WORK = ModelWork()


class RankMonitor(TrackedMonitor):
    """Also writes the numbers of each rank to the run's events, and reports alerts on the terminal.

    `result` makes the summary of a training that ended well; None leaves it out. `work` is that of the plan.
    """

    def __init__(
        self,
        options: WatchOptions,
        precision: str,
        output: RunOutput,
        trackers: Sequence[Tracker] = (),
        result: Callable[[Any], Mapping[str, Any]] | None = None,
        work: ModelWork = _NO_WORK,
    ) -> None:
        limits = Limits(options.floor, options.floor_steps, options.slow_factor, options.slow_share, options.slow_steps)
        super().__init__(
            trackers,
            # A user's plugin may scale the loss: read the trainer's precision.
            None if precision == "custom" else precision,
            every_n_steps=options.every_n_steps,
            limits=limits,
            on_alert=self._report_alert,
        )
        self._result = result
        self._work = work
        self._events = output.events
        self._console = output.console
        self._means = MeanSamples()
        # The means leave out the first samples, which include the warm-up.
        self._seen_step: int | None = None
        self._is_logged_loss_broken = False
        self._loss_alert_step = 0

    @property
    def problem(self) -> str | None:
        """On rank zero: what was wrong with the training to its end; None if nothing was."""
        if self._is_logged_loss_broken or LOSS_NOT_FINITE in self._raised:
            return f"the training loss is not finite (alert at step {self._loss_alert_step})"
        return None

    def check_logged(self, metrics: Mapping[str, float], step: int) -> None:
        """Raise an alert for a logged training loss that is not finite: manual optimization returns no loss."""
        broken = find_broken_losses(metrics)
        if broken and not self._is_logged_loss_broken and LOSS_NOT_FINITE not in self._raised:
            # The sample of this step, which may show it too, arrives later.
            self._raised |= {LOSS_NOT_FINITE}
            values = ", ".join(f"{escape_controls(name)} is {metrics[name]}" for name in broken[:3])
            self.alert(Alert(LOSS_NOT_FINITE, LOSS_TITLE, f"{values}: {LOSS_ADVICE}", (0,)), step)
        self._is_logged_loss_broken = bool(broken)

    @override
    def observe(self, gathered: Gathered) -> None:
        super().observe(gathered)
        if self._seen_step is not None:
            self._means.add(gathered.samples, gathered.step - self._seen_step)
        self._seen_step = gathered.step
        samples = gathered.samples[:_RANKS_IN_EVENT]
        self._events.write(
            "ranks",
            step=gathered.step,
            ranks=[s.rank for s in samples],
            loss_scale=[s.scale for s in samples],
            skipped_steps=[s.skipped_steps for s in samples],
            step_seconds=[round(s.step_seconds, 6) for s in samples],
            data_seconds=[round(s.data_seconds, 6) for s in samples],
            own_seconds=[round(s.own_seconds, 6) for s in samples],
            peak_memory=[s.peak_memory for s in samples],
        )

    @override
    def write(self, trainer: Any, row: Mapping[str, Any], step: int) -> None:
        samples = row.get("perf/samples_per_second")
        speed = None if samples is None else self._work.find_speed(samples)
        if speed is not None:
            row = {**row, "perf/flops_per_second": speed}
            # Read here, as a module may set it at any time. The peak of TF32 is not known.
            has_tf32 = self._precision_of(trainer) == "32-true" and torch.get_float32_matmul_precision() != "highest"
            if self._work.peak_flops is not None and not has_tf32:
                row["perf/mfu"] = speed / self._work.peak_flops
        super().write(trainer, row, step)

    @override
    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        """Write the rows up to here, which a resumed run does not measure again."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        try:
            self._report_arrived(trainer, _SAVE_TIMEOUT)
        except RuntimeError:
            # torch's error for a rank that has failed: save without its last sample.
            self._exchange.drop()

    @override
    def finish(self, trainer: Any) -> None:
        super().finish(trainer)
        means = self._means.means()
        if not means or self._means.steps < self.limits.slow_steps:
            return
        slow = find_slow_rank(means, self.limits)
        if slow is None:
            return
        self._events.write("straggler", ranks=list(slow.ranks), steps=self._means.steps, text=slow.text,
                           own_seconds={s.rank: round(s.own_seconds, 6) for s in means[:_RANKS_IN_EVENT]})  # fmt: skip
        text = f"straggler over {self._means.steps} steps: {slow.text}"
        self._console.print(text, style="yellow", highlight=False, markup=False)

    @override
    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Write the result of a training that ended well, when all checkpoints are saved."""
        if stage == "fit" and self._result is not None and is_rank_zero(trainer) and self._is_active(trainer):
            self._last_step = LogStep(steps_done(trainer), logger_step(trainer, is_epoch_end=True))
            self._summarize(self._result(trainer))

    def _report_alert(self, alert: Alert, step: int) -> None:
        if alert.kind == LOSS_NOT_FINITE:
            self._loss_alert_step = step
        self._events.write("alert", alert=alert.kind, step=step, ranks=list(alert.ranks), title=alert.title,
                           text=alert.text)  # fmt: skip
        self._console.print(
            f"alert at step {step}: {alert.title}: {alert.text}", style="red", highlight=False, markup=False
        )


class MeanSamples:
    """Each rank's mean times over a whole run: a rank that is slow for a moment does not count."""

    def __init__(self) -> None:
        self._sums: dict[int, tuple[float, float, float]] = {}
        self.steps = 0

    def add(self, samples: Sequence[RankSample], steps: int) -> None:
        """Add one interval's samples, means of `steps` optimizer steps; 0 adds nothing."""
        self.steps += steps
        for s in samples:
            step, data, own = self._sums.get(s.rank, (0.0, 0.0, 0.0))
            self._sums[s.rank] = (
                step + s.step_seconds * steps,
                data + s.data_seconds * steps,
                own + s.own_seconds * steps,
            )

    def means(self) -> list[RankSample]:
        """One sample per rank, in order of rank; none before the first step."""
        if self.steps == 0:
            return []
        return [
            RankSample(rank, step_seconds=step / self.steps, data_seconds=data / self.steps,
                       own_seconds=own / self.steps)
            for rank, (step, data, own) in sorted(self._sums.items())
        ]  # fmt: skip
