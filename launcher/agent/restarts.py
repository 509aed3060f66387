"""Restarts of one run: decides after each failure, counts them, and records strategies that ran out of memory."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from launcher.agent.failure_report import RankOutcome
from launcher.agent.restart_policy import RestartDecision, RestartHistory, decide_restart
from launcher.process.heartbeat import NO_STEPS
from launcher.runs.oom_record import FILE_NAME, add_attempt_oom_record
from strategies.sharding import describe_strategy


class RestartTracker:
    """Decides about restarts, at most `max_restarts` within `window` seconds, and remembers those that were made."""

    def __init__(self, max_restarts: int, window: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_restarts = max_restarts
        self._window = window
        self._clock = clock
        self._counted: list[tuple[float, RankOutcome]] = []
        self._used_strategies: set[str] = set()

    def decide(self, failure: RankOutcome, run: Path | None) -> RestartDecision:
        """Whether to restart after the first failure of an attempt. `run` is None if there is no run directory yet."""
        strategy = find_next_strategy(failure, run)
        if strategy in self._used_strategies:
            # The record was not written or not read: the same strategy would run out of memory again.
            strategy = None
        history = RestartHistory(self._max_restarts, self._window, tuple(self._counted), self._clock())
        has_checkpoint = None if failure.step == NO_STEPS else _has_checkpoint(run)
        return decide_restart(failure, history, strategy, has_checkpoint=has_checkpoint)

    def record(self, failure: RankOutcome, decision: RestartDecision) -> None:
        """Remember the restart, if it is one that counts."""
        if decision.strategy is not None:
            self._used_strategies.add(decision.strategy)
        elif decision.restart and not failure.is_interrupted:
            self._counted.append((self._clock(), failure))


def _has_checkpoint(run: Path | None) -> bool:
    return run is not None and any((run / "checkpoints").glob("*.ckpt"))


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
