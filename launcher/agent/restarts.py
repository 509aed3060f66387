"""Restarts of one run: decides after each failure, counts them, and records strategies that ran out of memory."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from launcher.agent.failure_report import RankOutcome
from launcher.agent.restart_policy import RestartDecision, RestartHistory, decide_restart
from launcher.process.heartbeat import NO_STEPS
from launcher.runs.kept_state import KEPT_STATES, find_kept_step
from launcher.runs.oom_record import FILE_NAME, add_attempt_oom_record
from strategies.sharding import describe_strategy


@dataclass(frozen=True, slots=True)
class ResumeSource:
    """What the next attempt continues from.

    Attributes:
        kept_step: optimizer steps of the state that survivors have saved; None without one.
        has_checkpoint: whether the run has a checkpoint.
        not_kept: why a rank could not save its state, by rank.
    """

    kept_step: int | None = None
    has_checkpoint: bool = False
    not_kept: Mapping[int, str] = field(default_factory=dict)

    def describe(self) -> str:
        """The end of a sentence about a restart."""
        if self.kept_step is not None:
            return f", from step {self.kept_step}: the ranks that did not fail have kept it"
        lost = [f"rank {rank} could not keep its last step: {reason}" for rank, reason in self.not_kept.items()]
        source = ", from the last checkpoint" if self.has_checkpoint else "; no checkpoint was saved yet"
        return source + (f" ({lost[0]})" if lost else "")


class RestartTracker:
    """Decides about restarts, at most `max_restarts` within `window` seconds, and remembers those that were made."""

    def __init__(self, max_restarts: int, window: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_restarts = max_restarts
        self._window = window
        self._clock = clock
        self._counted: list[tuple[float, RankOutcome]] = []
        self._used_strategies: set[str] = set()

    def decide(self, failure: RankOutcome, run: Path | None, source: ResumeSource | None = None) -> RestartDecision:
        """Whether to restart after the first failure of an attempt. `run` is None if there is no run directory yet."""
        strategy = find_next_strategy(failure, run)
        if strategy in self._used_strategies:
            # The record was not written or not read: the same strategy would run out of memory again.
            strategy = None
        history = RestartHistory(self._max_restarts, self._window, tuple(self._counted), self._clock())
        # Code that reports no steps saves its own checkpoints.
        text = "" if failure.step == NO_STEPS else (source or find_source(run)).describe()
        return decide_restart(failure, history, strategy, source=text)

    def record(self, failure: RankOutcome, decision: RestartDecision) -> None:
        """Remember the restart, if it is one that counts."""
        if decision.strategy is not None:
            self._used_strategies.add(decision.strategy)
        elif decision.restart and not failure.is_interrupted:
            self._counted.append((self._clock(), failure))


def find_source(
    run: Path | None, kept: Path | None = None, not_kept: Mapping[int, str] = MappingProxyType({})
) -> ResumeSource:
    """What the next attempt will continue from, as far as this node knows."""
    step = find_kept_step((kept, None if run is None else run / KEPT_STATES))
    has_checkpoint = run is not None and any((run / "checkpoints").glob("*.ckpt"))
    return ResumeSource(step, has_checkpoint, not_kept)


def find_next_strategy(failure: RankOutcome, run: Path | None) -> str | None:
    """The strategy to restart with after running out of memory (`on_oom: next`).

    Reads the plan in the run directory if the kernel killed the rank before it could report.

    Returns:
        None if memory was not the cause, no strategy needs less, or the config sets `on_oom: stop`.
    """
    if failure.error is not None and failure.error.next_strategy is not None:
        return failure.error.next_strategy
    if not failure.out_of_memory or run is None:
        return None
    try:
        config: Any = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        memory = json.loads((run / "plan.json").read_text(encoding="utf-8"))["memory"]
        # The kernel kills for the host's memory; a strategy that needs less on a GPU may need more on the host.
        if _uses_gpus(run):
            return None
        if not memory or config["on_oom"] != "next" or memory["next"] is None:
            return None
        return describe_strategy(memory["next"], memory.get("next_checkpointed", False))
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        # A damaged file does not name a strategy; the usual restart policy applies.
        return None


def record_out_of_memory(failure: RankOutcome, run: Path | None) -> str | None:
    """Record in the run directory that the strategy ran out of memory, so that the next attempt's plan skips it.

    Ignores failures with another cause. Returns a notice if the record could not be written.
    """
    # The run directory of another node's ranks may be on that node only.
    if run is None or not failure.ran_out_of_memory or not (run / "plan.json").exists():
        return None
    if failure.out_of_memory and _uses_gpus(run):
        return None  # the host's memory ran out, which does not depend on the strategy on the GPU
    if add_attempt_oom_record(run):
        return None
    return f"notice: cannot write {run / FILE_NAME}: the next start will not know that this strategy ran out of memory"


def _uses_gpus(run: Path) -> bool:
    try:
        return json.loads((run / "plan.json").read_text(encoding="utf-8"))["device_kind"] == "cuda"
    except (OSError, ValueError, KeyError, TypeError):
        return False
