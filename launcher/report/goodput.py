"""The section of the page about the goodput ledger: what the time was spent on, and what each failure cost."""

from __future__ import annotations

from launcher.report import drawing, units
from launcher.report.drawing import BAD, GRID, MUTED, SERIES, Key, Plot, new_plot
from launcher.report.page import Section, Table
from launcher.report.source import Run
from launcher.runs.goodput import KINDS, FailureCost, Ledger

_MOST_FAILURES = 100
_OF_FAILURES = ("detection", "restart", "redone")
_TERMS = {
    "detection": KINDS["detection"],
    "restart": KINDS["restart"],
    "redone": "optimizer steps that the next attempts did again",
}


def goodput_section(run: Run) -> Section | None:
    """The ledger; without one, why there is none. None for a plain script, whose steps are not known."""
    if run.script is not None or not run.history.attempts:
        return None
    ledger = run.status.goodput
    if ledger is None or ledger.ratio is None:
        return Section("goodput", "Use of time", {}, "no_goodput")
    shown = [kind for kind in KINDS if ledger.microseconds[kind]]
    rows = [(_name(kind), units.format_duration(ledger.seconds(kind)), _share(ledger, kind), KINDS[kind])
            for kind in shown]  # fmt: skip
    view = {
        "plot": draw_goodput(ledger),
        "ledger": ledger,
        "ratio": f"{ledger.ratio:.1%}",
        "productive": ledger.seconds("productive"),
        "stopped": ledger.seconds("stopped"),
        "table": Table("Every second of the run", ("", "time", "share", "what it is"), rows, (1, 2), (0,)),
        "failures": _failure_table(ledger) if ledger.failures else None,
    }
    return Section("goodput", "Use of time", view)


def draw_goodput(ledger: Ledger) -> Plot:
    """Draw a bar for each kind of time that the run has."""
    shown = [kind for kind in KINDS if ledger.microseconds[kind]]
    unit, seconds = units.choose_time_unit(max(ledger.seconds(kind) for kind in shown))
    with new_plot("goodput-plot", "What the time was spent on", 0.8 + 0.3 * len(shown)) as plot:
        (axes,) = plot.axes
        colors = [_color(kind) for kind in shown]
        lengths = [ledger.seconds(kind) / seconds for kind in shown]
        axes.barh(range(len(shown)), lengths, height=0.6, color=colors)
        drawing.label_rows(axes, [_name(kind) for kind in shown])
        axes.set_xlabel(unit)
        axes.set_xlim(left=0)
        keys = (Key("productive", SERIES[0], "bar"), Key("cost of failures", BAD, "bar"), Key("other", MUTED, "bar"),
                Key("not part of the ratio", GRID, "bar"))  # fmt: skip
        plot.keys.extend(key for key in keys if key.color in colors)
    return plot


def _failure_table(ledger: Ledger) -> Table:
    last = ledger.failures[-_MOST_FAILURES:]
    rows = [_failure_row(failure) for failure in last]
    all_of = f"; the last {len(last)} of {len(ledger.failures)}" if len(last) < len(ledger.failures) else ""
    head = ("attempt", "time", "failure", "detection", "restart", "redone", "steps redone", "cost")
    return Table(f"Cost of each failure{all_of}", head, rows, (3, 4, 5, 6, 7), (0, 1), terms=_TERMS)


def _failure_row(failure: FailureCost) -> tuple[str, ...]:
    times = (getattr(failure, kind) / 1e6 for kind in _OF_FAILURES)
    return (
        str(failure.attempt),
        units.format_time(failure.time),
        f"rank {failure.rank}: {failure.reason.replace('_', ' ')}",
        *map(units.format_duration, times),
        units.format_count(failure.redone_steps),
        units.format_duration(failure.seconds),
    )


def _name(kind: str) -> str:
    return {"data": "data wait", "redone": "steps redone"}.get(kind, kind.replace("_", " "))


def _share(ledger: Ledger, kind: str) -> str:
    return "\u2013" if kind == "stopped" else f"{ledger.seconds(kind) / ledger.active:.1%}"


def _color(kind: str) -> str:
    if kind == "productive":
        return SERIES[0]
    return BAD if kind in _OF_FAILURES else GRID if kind == "stopped" else MUTED
