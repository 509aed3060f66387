"""The watch over the ranks in a run of the launcher's: W&B, events and the terminal hear of the same numbers."""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from launcher.config.schema import WatchOptions
from launcher.core.output import RunOutput
from launcher.loggers.wandb_writer import WandbWriter
from launcher.monitoring.amp_callback import AmpWandbCallback
from launcher.monitoring.gather import Gathered
from launcher.monitoring.health import Alert, Limits, slow_alert
from launcher.monitoring.mean_samples import MeanSamples

# More would make an event of a large run longer than it is useful.
_RANKS_IN_EVENT = 64


class RankMonitor(AmpWandbCallback):
    """`AmpWandbCallback` that also tells the run's events and the terminal.

    Args:
        options: when an alert is raised.
        precision: the plan's.
        output: events and terminal of the run.
        writer: of the run's W&B; None if nothing is logged there.
    """

    # A logger of the user's, or their own code, does.
    _at_next = True

    def __init__(
        self,
        options: WatchOptions,
        precision: str,
        output: RunOutput,
        writer: WandbWriter | None = None,
    ) -> None:
        limits = Limits(options.floor, options.floor_steps, options.slow_factor, options.slow_share, options.slow_steps)
        super().__init__(
            # A plugin of the user's own may scale the loss: look for it.
            precision=None if precision == "custom" else precision,
            every_n_steps=options.every_n_steps,
            limits=limits,
            on_alert=self._tell,
            on_notice=output.notice,
            writer=writer,
        )
        self._to_wandb = writer is not None
        self._events = output.events
        self._console = output.console
        self._means = MeanSamples()
        # The first samples hold the warm-up, which is nobody's own: the means begin behind them.
        self._seen_step: int | None = None

    @override
    def observe(self, gathered: Gathered) -> None:
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
    def finish(self, trainer: Any) -> None:
        super().finish(trainer)
        means = self._means.means()
        if not means or self._means.steps < self.limits.slow_steps:
            return
        slow = slow_alert(means, self.limits)
        if slow is None:
            return
        self._events.write("straggler", ranks=list(slow.ranks), steps=self._means.steps, text=slow.text,
                           own_seconds={s.rank: round(s.own_seconds, 6) for s in means[:_RANKS_IN_EVENT]})  # fmt: skip
        text = f"straggler over {self._means.steps} steps: {slow.text}"
        self._console.print(text, style="yellow", highlight=False, markup=False)

    @override
    def _wandb(self) -> Any:
        return super()._wandb() if self._to_wandb else None

    def _tell(self, alert: Alert, step: int) -> None:
        self._events.write("alert", alert=alert.kind, step=step, ranks=list(alert.ranks), title=alert.title,
                           text=alert.text)  # fmt: skip
        self._console.print(
            f"alert at step {step}: {alert.title}: {alert.text}", style="red", highlight=False, markup=False
        )
