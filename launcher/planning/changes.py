"""Changes of the plan during training, when the user's objects show more: rank zero updates `plan.json`."""

from __future__ import annotations

from collections.abc import Sequence

from launcher.core.output import RunOutput
from launcher.core.secrets import redact
from launcher.planning.plan import Plan
from launcher.runs.directory import RunDirectory, write_plan


class PlanChanges:
    """Keeps `plan.json` up to date while a run trains; only rank zero writes."""

    def __init__(self, plan: Plan, run: RunDirectory, output: RunOutput) -> None:
        self.plan = plan
        self._run, self._output = run, output

    def unused_parameters(self, names: Sequence[str]) -> None:
        """Record that some parameters got no gradient in the first step; DDP searches for them from then on."""
        plan = self.plan.with_unused_parameters(names)
        text = f"{plan.strategy.reasons[-1]}: DDP looks for such parameters in every step, which takes a little time"
        self._change(plan, "unused_parameters", text, names=tuple(names))

    def loader_batch(self, owner: str, size: int) -> None:
        """Record that a loader, created by `owner`, has another batch size than the plan: `size` samples per rank."""
        before = self.plan.batch.global_batch_size
        plan = self.plan.with_loader_batch(owner, size)
        now = plan.batch.global_batch_size
        text = f"the plan's batch was {before} samples a step, but {owner} made a loader of {size}: a step trains {now}"
        self._change(plan, "batch_corrected", text, before=before, now=now)

    def _change(self, plan: Plan, kind: str, text: str, **values: object) -> None:
        self.plan = plan
        if self._output.is_rank_zero:
            write_plan(self._run, redact(plan.to_dict()))
            self._output.events.write(kind, **values)
            self._output.notice(text)
