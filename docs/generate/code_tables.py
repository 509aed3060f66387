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
    """All exit codes."""
    numbers = sorted({0, *(kind.exit_code for kind in _tree(LauncherError))})
    rows = [(code(str(number)), _MEANINGS[number]) for number in numbers]
    rows += [
        (code(str(REQUEUED)), "On SLURM: the job saved a checkpoint and was queued again."),
        (
            code("128 + N"),
            "Ended by signal N: 130 is Ctrl-C, 143 SIGTERM, both after a checkpoint; 137 is SIGKILL.",
        ),
    ]
    return table(["code", "meaning"], rows)


def exceptions() -> str:
    """Every exception with the first paragraph of its docstring, its base and its exit code."""
    rows = [_exception_row(kind, str(kind.exit_code)) for kind in _tree(LauncherError)]
    return table(["exception", "meaning, base and exit code"], [*rows, _exception_row(Interrupted, "128 + N")])


def _exception_row(kind: type[BaseException], exit_code: str) -> tuple[str, str]:
    meaning = (inspect.getdoc(kind) or "").partition("\n\n")[0]
    return code(kind.__name__), f"{meaning}<br>Base: {code(kind.__bases__[0].__name__)}; exit code {exit_code}."


def _tree(kind: type[LauncherError]) -> Iterator[type[LauncherError]]:
    yield kind
    for each in kind.__subclasses__():
        # The classes made for one error of the user's are not in the module.
        if each.__module__ == kind.__module__:
            yield from _tree(each)
