"""Prints the plan on the terminal; no text is cut at any width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from launcher.core.wrapping import join_items, wrap_text
from launcher.planning.flops import format_flops
from launcher.planning.plan import Plan
from strategies.step_time import STEP_FLOOR
from strategies.units import GIB, format_bytes

# Fields of `strategies.memory.MemoryEstimate`, and their columns.
_PARTS = {
    "parameters": "params",
    "gradients": "grads",
    "optimizer_states": "optimizer",
    "activations": "activations",
    "temporaries": "temporaries",
    "buffers": "buffers",
}
# Below this width the reasons of the plan are under the values, not beside them.
_WIDE = 100
_MARK, _INDENT = ">", 4
# Width of the names of the rows, with a space.
_LABEL = 10
_NO_DATA = "-"
_ANY_WIDTH = 10_000


def print_plan(plan: Plan, console: Console) -> None:
    """Print the choice, its reasons, and the rejected candidates."""
    rows: list[tuple[str, str, Sequence[str]]] = [
        ("ranks", _ranks(plan), ["assumed to be identical, not checked"] if plan.assumed else []),
        ("strategy", plan.strategy.name, plan.strategy.reasons),
        ("precision", plan.precision, plan.precision_reasons),
        ("batch", str(plan.batch.global_batch_size or "the loader's own"), plan.batch_reasons),
    ]
    if plan.flops_per_sample is not None and plan.batch.global_batch_size:
        per_step = format_flops(plan.flops_per_sample * plan.batch.global_batch_size)
        rows.append(("work", f"{per_step} a step", ["traced: matrix products, convolutions and attention"]))
    if plan.activation_checkpointing:
        rows.append(("memory", "activation checkpointing", plan.checkpointing_reasons))
    if plan.save_reasons:
        rows.append(("saves", "auto", plan.save_reasons))
    # With memory, the second table lists all of them.
    rejected = plan.strategy.rejected if plan.memory is None else ()
    rows += [("not taken", each.name, [each.reason]) for each in rejected]
    table = _new_table("Plan")
    table.show_header = False
    is_wide = console.width >= _WIDE
    for style in ("bold", "", "dim")[: 3 if is_wide else 2]:
        table.add_column(style=style, overflow="fold")
    for label, value, reasons in rows:
        if is_wide:
            table.add_row(label, value, Text("\n".join(reasons)))
        else:
            room = max(console.width - _LABEL, 1)
            text = Text("\n".join(wrap_text(value, room)))
            for reason in reasons:
                text.append("\n" + "\n".join(wrap_text(reason, room)), style="dim")
            table.add_row(label, text)
    console.print(table)
    for notice in plan.notices:
        _print_text(console, f"notice: {notice}", "yellow")


def _ranks(plan: Plan) -> str:
    devices = ", ".join(f"{count} x {name}" for name, count in plan.devices.items())
    nodes = f" on {plan.num_nodes} nodes" if plan.num_nodes > 1 else ""
    return f"{devices}{nodes}"


def print_memory(plan: Plan, console: Console) -> None:
    """Print every strategy's memory by part, traffic, time, and reason.

    Columns in which every strategy has the same are left out, and listed above the table. If the table is still wider
    than the console, the values of each strategy are listed under its name.
    """
    memory = plan.memory
    if memory is None:
        console.print("memory: not known", highlight=False)
        return
    figures = _read_figures(memory)
    title = (
        f"Memory of one rank at the step's peak in {figures.unit}, {memory['method']}; "
        f"limit {format_bytes(memory['limit_bytes'])} of {format_bytes(memory['memory_bytes'])}"
    )
    console.print()
    _print_text(console, title, "italic")
    if figures.common:
        _print_text(console, f"every strategy: {', '.join(figures.common)}", "dim")
    entries = memory["assessments"]
    table = _make_table(figures, entries, plan.strategy.name)
    # Measured without the limit of the console.
    needed = Measurement.get(console, console.options.update(width=_ANY_WIDTH), table).maximum
    if needed <= console.width:
        console.print(table)
        reasons: dict[str, list[str]] = {}
        for entry in entries:
            if entry["name"] != plan.strategy.name:
                reasons.setdefault(entry["reason"], []).append(entry["name"])
        for reason, names in reasons.items():
            _print_text(console, f"{', '.join(names)}: {reason}", "dim")
    else:
        _print_stacked(figures, entries, plan.strategy.name, console)
    if source := memory["machine"]["source"]:
        console.print(f"numbers of the device: {source}", style="dim", highlight=False, markup=False, soft_wrap=True)
    for note in memory["notes"]:
        _print_text(console, f"note: {note}", "dim")


@dataclass(frozen=True, slots=True)
class _Figures:
    """The values of the table as text.

    Attributes:
        unit: of all bytes.
        columns: heading to the text of each strategy; the first is its total, the last its time for a sample.
        common: what all strategies have in common, with its heading.
    """

    unit: str
    columns: Mapping[str, Sequence[str]]
    common: Sequence[str]


def _read_figures(memory: Mapping[str, Any]) -> _Figures:
    entries = memory["assessments"]
    largest = max(entry["memory"]["total"] for entry in entries)
    unit, scale = ("GiB", GIB) if largest >= GIB else ("MiB", 1 << 20)
    parts = {label: [entry["memory"].get(part, 0) for entry in entries] for part, label in _PARTS.items()}
    sizes = {
        "total": [entry["memory"]["total"] for entry in entries],
        **parts,
        "host": [entry["memory"]["host"] for entry in entries],
        "nvme": [entry["memory"]["nvme"] for entry in entries],
        "sent": [entry["step"]["bytes_per_rank"] for entry in entries],
    }
    # Rings over all ranks cross nodes; with `hsdp` only a part does.
    across = [entry["step"]["bytes_across_nodes"] for entry in entries]
    if across != sizes["sent"]:
        sizes["across"] = across
    columns = {name: [_format_size(size, scale) for size in values] for name, values in sizes.items() if any(values)}
    batches = [f"{entry['micro_batch_size']} x {entry['accumulate']}" for entry in entries]
    common: list[str] = []
    if len(set(batches)) == 1:
        first = entries[0]
        common.append(f"{first['micro_batch_size']} samples x {first['accumulate']} accumulated on each rank")
    else:
        columns["batch"] = batches
    columns["ms/sample"] = [_format_time(entry) for entry in entries]
    return _Figures(unit, columns, common)


def _format_size(size: float, scale: int) -> str:
    """At most three digits after the first that is not 0, of which none is below a hundredth; '-' for nothing."""
    value = size / scale
    if not size:
        return _NO_DATA
    return "<0.01" if value < 0.005 else f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def _format_time(entry: Mapping[str, Any]) -> str:
    """Milliseconds for each sample; at least its share of the shortest step that Lightning can run."""
    seconds = entry["step"]["seconds"]
    # Plans of older versions have no samples.
    samples = entry.get("samples", entry["micro_batch_size"] * entry["accumulate"])
    shown = max(seconds, STEP_FLOOR) / samples * 1e3
    return f"{'<' if seconds < STEP_FLOOR else ''}{f'{shown:.0f}' if shown >= 100 else f'{shown:.3g}'}"


def _new_table(title: str | None = None) -> Table:
    return Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))


def _make_table(figures: _Figures, entries: Sequence[Mapping[str, Any]], chosen: str) -> Table:
    table = _new_table()
    table.add_column("", no_wrap=True)
    table.add_column("strategy", no_wrap=True)
    for name in figures.columns:
        table.add_column(name, justify="right", no_wrap=True)
    for number, entry in enumerate(entries):
        values = [column[number] for column in figures.columns.values()]
        table.add_row(*_name(entry, chosen), *values, style=_style(entry, chosen))
    return table


def _name(entry: Mapping[str, Any], chosen: str) -> tuple[str, str]:
    """The mark and the name."""
    return (_MARK if entry["name"] == chosen else "", entry["name"])


def _style(entry: Mapping[str, Any], chosen: str) -> str:
    if entry["name"] == chosen:
        return "bold"
    return "" if entry["fits"] and entry["eligible"] else "dim"


def _print_stacked(figures: _Figures, entries: Sequence[Mapping[str, Any]], chosen: str, console: Console) -> None:
    """Each strategy with its total and time in a line, or in the next one, and the rest under it."""
    rows: list[tuple[str, str, str]] = []
    for number, entry in enumerate(entries):
        mark, name = _name(entry, chosen)
        values = {column: texts[number] for column, texts in figures.columns.items()}
        total, time = f"{values.pop('total'):>5} {figures.unit}", f"{values.pop('ms/sample')} ms/sample"
        rest = join_items(f"{column} {text}" for column, text in values.items() if text != _NO_DATA)
        rows.append((f"{mark or ' '} {name:<30} {total}  {time}", join_items([total.strip(), time]), rest))
    is_narrow = any(len(line) > console.width for line, _, _ in rows)
    for entry, (line, figures_below, rest) in zip(entries, rows, strict=True):
        head = line[: len("> ") + len(entry["name"])] if is_narrow else line
        console.print(Text(head, style=_style(entry, chosen), overflow="fold"))
        reason = "" if entry["name"] == chosen else entry["reason"]
        for text in (figures_below if is_narrow else "", rest, reason):
            _print_text(console, text, "dim", _INDENT)


def _print_text(console: Console, text: str, style: str, indent: int = 0) -> None:
    for line in wrap_text(text, max(console.width - indent, 1)):
        console.print(Text(" " * indent + line, style=style, overflow="fold"))
