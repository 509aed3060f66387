"""Events as text. Pure."""

from __future__ import annotations

import signal
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from strategies.sharding import describe_strategy
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
    "checkpoint_interval": "saves after {steps} steps: {reason}",
    "batch_corrected": "a step trains {now} samples; the plan expected {before}",
}


# In a message, begins the traceback of another process, such as a spawned one or a worker of a loader.
_TRACEBACK = "Traceback (most recent call last):"


def summarize_error(kind: str, message: str) -> str:
    """An error in one line: its class, and the line of its message that names it, without a full stop."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    if not lines:
        return kind
    line = lines[-1] if _TRACEBACK in message else lines[0]
    return remove_end(line if line.startswith(f"{kind}: ") else f"{kind}: {line}")


def remove_end(text: str) -> str:
    """A text to which something is added, such as advice: without its full stop, but with an ellipsis."""
    text = text.rstrip()
    return text if text.endswith("...") else text.rstrip(".;,: ")


def describe_event(event: Mapping[str, Any], kind: str) -> str:
    """The text of an event; for an unknown kind, its fields."""
    if kind in ("failed", "rank_failed"):
        why = "hung, " if event.get("hung") else "out of memory, " if event.get("out_of_memory") else ""
        text = as_text(event.get("error")) or why + _exit(event.get("exit_code"))
    elif kind == "finished" and event.get("step") is None:
        text = "finished"
    elif kind in _TEXTS:
        text = _TEXTS[kind].format_map(defaultdict(lambda: None, event))
    elif kind == "notice":
        text = as_text(event.get("message"))
    elif kind in ("interrupted", "preempted"):
        saved = event.get("checkpoint")
        end = "saved a checkpoint" if saved else "without a checkpoint"
        number = event.get("signal")
        text = f"stopped by {'Ctrl-C' if number == signal.SIGINT else signal_name(number)}"
        if event.get("step") is not None:
            text += f" after step {event['step']}; {end}"
    elif kind == "strategy_changed":
        before = " and ".join(map(str, event.get("ran_out") or ()))
        is_checkpointed = bool(event.get("activation_checkpointing"))
        now = describe_strategy(str(event.get("strategy")), is_checkpointed)
        text = f"{before} ran out of memory in this run; it continues with {now}"
    elif kind == "unused_parameters":
        names = describe_parameters(event.get("names") or ())
        text = f"{names} received no gradient; from now on DDP searches for unused parameters"
    elif kind == "evaluated":
        found = event.get("metrics")
        parts = [part for part in (found if isinstance(found, list) else [found]) if isinstance(part, Mapping)]
        values = ", ".join(f"{name} {format_value(value)}" for part in parts for name, value in part.items())
        text = f"{event.get('command')} of {event.get('checkpoint')}: {values or 'no metric was logged'}"
    elif kind == "nodes_missing":
        nodes = event.get("nodes")
        text = f"{'node ' + ', '.join(map(str, nodes)) if isinstance(nodes, list) and nodes else 'a node'} did not join"
    elif kind == "run_started":
        count = event.get("restart_count")
        source = f"ranks created by {event['source']}" if event.get("source") not in (None, "nobody") else "one process"
        text = f"started: {source}" + (f", restart {count}" if count else "")
    else:
        fields = {k: v for k, v in event.items() if k not in ("time", "rank", "kind", "step") and v is not None}
        text = f"{kind}: " + ", ".join(f"{k} {format_value(v)}" for k, v in fields.items()) if fields else kind
    return text if len(text) <= _LONGEST_TEXT else text[:_LONGEST_TEXT] + " ..."


def format_value(value: Any) -> str:
    """A value as YAML shows it on one line: 'null', 'true', '0.1', '[1, 2]', '{a: 1}', '2026-11-25 01:44:31'."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {format_value(each)}' for key, each in value.items())}}}"
    if isinstance(value, list | tuple | set | frozenset):
        return f"[{', '.join(map(format_value, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    # 0.30000000000000004 is 0.3, and 1e-05 stays.
    return f"{value:.12g}" if isinstance(value, float) else str(value)


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


def as_text(value: Any) -> str:
    """A field of an event as text; empty for None."""
    return "" if value is None else str(value)
