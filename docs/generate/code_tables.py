"""Tables of events, metrics, alerts, exit codes and exceptions."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from docs.generate.markdown import code, table
from launcher.core.errors import Interrupted, LauncherError
from launcher.core.event_kinds import EVENT_KINDS
from launcher.monitoring.metric_names import ALERTS, METRICS
from slurm.task import REQUEUED

_MEANINGS = {
    0: "Done.",
    1: "Training failed: an error in the code of the model or the data, out of memory, or a queue that refused a job.",
    2: "Usage or configuration error. No training was done and no earlier run was changed.",
}


def events() -> str:
    """A section for each kind of event."""
    sections = [
        f"### `{kind}`\n\n{event.description}\n\n"
        + table(["field", "content"], ((code(name), text) for name, text in event.fields.items()))
        for kind, event in EVENT_KINDS.items()
    ]
    return "\n".join(sections)


def metrics() -> str:
    """All monitoring metrics."""
    return table(["metric", "meaning"], ((code(name), text) for name, text in METRICS.items()))


def alerts() -> str:
    """All kinds of alerts."""
    return table(["alert", "raised when"], ((code(name), text) for name, text in ALERTS.items()))


def exit_codes() -> str:
    """All exit codes with the exceptions that lead to them."""
    by_code: dict[int, list[str]] = {0: []}
    for kind in _tree(LauncherError):
        by_code.setdefault(kind.exit_code, []).append(code(kind.__name__))
    rows = [(code(str(number)), _MEANINGS[number], ", ".join(kinds)) for number, kinds in sorted(by_code.items())]
    rows += [
        (code(str(REQUEUED)), "On SLURM: the job saved a checkpoint and was queued again.", ""),
        (code("128 + N"), "Stopped by signal N, after a checkpoint. 130 is Ctrl-C.", code(Interrupted.__name__)),
    ]
    return table(["code", "meaning", "exceptions"], rows)


def exceptions() -> str:
    """Every exception with the first sentence of its docstring."""
    return table(["exception", "base", "meaning"],
                 ((code(kind.__name__), code(kind.__bases__[0].__name__), _summary(kind))
                  for kind in (*_tree(LauncherError), Interrupted)))  # fmt: skip


def _tree(kind: type[LauncherError]) -> Iterator[type[LauncherError]]:
    yield kind
    for each in kind.__subclasses__():
        # The classes made for one error of the user's are not in the module.
        if each.__module__ == kind.__module__:
            yield from _tree(each)


def _summary(kind: type) -> str:
    return (inspect.getdoc(kind) or "").partition("\n\n")[0]
