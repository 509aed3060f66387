"""Events as text. Pure."""

from __future__ import annotations

import signal
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from strategies.unused_parameters import describe_parameters

# Longer texts are truncated.
_LONGEST_TEXT = 600
# Kinds whose text needs only the event's fields.
_TEXTS = {
    "finished": "finished after step {step}",
    "resumed": "resumed from {checkpoint}",
    "first_step": "first optimizer step done",
    "training_ended": "training ended",
    "precision_changed": "the checkpoint was trained in {checkpoint}, this run in {run}",
    "batch_corrected": "a step trains {now} samples; the plan expected {before}",
}


def describe_event(event: Mapping[str, Any], kind: str) -> str:
    """The text of an event; for an unknown kind, its fields."""
    if kind in ("failed", "rank_failed"):
        why = "hung, " if event.get("hung") else "out of memory, " if event.get("out_of_memory") else ""
        text = _text(event.get("error")) or why + _exit(event.get("exit_code"))
    elif kind in _TEXTS:
        text = _TEXTS[kind].format_map(defaultdict(lambda: None, event))
    elif kind == "notice":
        text = _text(event.get("message"))
    elif kind in ("interrupted", "preempted"):
        saved = event.get("checkpoint")
        end = "saved a checkpoint" if saved else "without a checkpoint"
        number = event.get("signal")
        name = "Ctrl-C" if number == signal.SIGINT else signal_name(number)
        text = f"stopped by {name} after step {event.get('step')}; {end}"
    elif kind == "strategy_changed":
        before = " and ".join(map(str, event.get("ran_out") or ()))
        text = f"{before} ran out of memory in this run; it continues with {event.get('strategy')}"
    elif kind == "unused_parameters":
        names = describe_parameters(event.get("names") or ())
        text = f"{names} received no gradient; from now on DDP searches for unused parameters"
    elif kind == "nodes_missing":
        nodes = event.get("nodes")
        text = f"{'node ' + ', '.join(map(str, nodes)) if isinstance(nodes, list) and nodes else 'a node'} did not join"
    elif kind == "run_started":
        count = event.get("restart_count")
        source = f"ranks created by {event['source']}" if event.get("source") not in (None, "nobody") else "one process"
        text = f"started: {source}" + (f", restart {count}" if count else "")
    else:
        fields = {k: v for k, v in event.items() if k not in ("time", "rank", "kind", "step") and v is not None}
        text = f"{kind}: " + ", ".join(f"{k} {v}" for k, v in fields.items()) if fields else kind
    return text if len(text) <= _LONGEST_TEXT else text[:_LONGEST_TEXT] + " ..."


def _exit(code: Any) -> str:
    """The ending of a process without an error message; a negative code is the number of a signal."""
    if type(code) is int and code < 0:
        return f"killed by {signal_name(-code)}"
    return "failed" if code is None else f"ended with exit code {code}"


def signal_name(number: Any) -> str:
    """A signal's name, such as SIGTERM; its number if it has no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def name_stop_reason(number: int) -> str:
    """The `reason` of an `interrupted` event."""
    names: dict[int, str] = {signal.SIGINT: "ctrl_c", signal.SIGTERM: "sigterm"}
    return names.get(number, "signal")


def _text(value: Any) -> str:
    return "" if value is None else str(value)
