"""What to go on with after running out of memory, for `on_oom: next`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from launcher.agent.failure import RankEnd
from launcher.runs.oom_record import FILE_NAME, add_attempt_oom_record


def next_strategy(failure: RankEnd, run: Path | None) -> str | None:
    """The strategy to restart with; None if memory was not short, nothing needs less, or the config says to stop.

    Args:
        failure: the first failure of the attempt.
        run: the run's directory, for what a rank that the kernel killed could not say.
    """
    if failure.error is not None and failure.error.next_strategy is not None:
        return failure.error.next_strategy
    if not failure.out_of_memory or run is None:
        return None
    try:
        config: Any = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        memory = json.loads((run / "plan.json").read_text(encoding="utf-8"))["memory"]
        # The kernel kills for the host's memory: what needs less on a GPU may need more there.
        if _on_gpus(run):
            return None
        return memory["next"] if memory and config["on_oom"] == "next" else None
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        # What cannot be read says nothing of where to go on.
        return None


def remember_failure(failure: RankEnd, run: Path | None) -> str | None:
    """Keep in the run's directory that its strategy ran out of memory: the next attempt's plan passes it over.

    Args:
        failure: the first failure of the attempt; one that is not of memory is not kept.
        run: the run's directory, None if no rank came so far.

    Returns:
        What to tell if it could not be kept.
    """
    # The directory of another node's ranks may lie on that node alone.
    if run is None or not failure.ran_out_of_memory or not (run / "plan.json").exists():
        return None
    if failure.out_of_memory and _on_gpus(run):
        return None  # killed for the host's memory, of which the strategy on the GPU says nothing
    if add_attempt_oom_record(run):
        return None
    return f"notice: {run / FILE_NAME} cannot be written: the next start will not know that memory ran out"


def _on_gpus(run: Path) -> bool:
    try:
        return json.loads((run / "plan.json").read_text(encoding="utf-8"))["device_kind"] == "cuda"
    except (OSError, ValueError, KeyError, TypeError):
        return False
