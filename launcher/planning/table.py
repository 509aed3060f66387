"""Prints the plan on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launcher.planning.plan import Plan
from strategies.units import GIB, format_bytes

# Fields of `strategies.memory.MemoryEstimate`, and their columns.
_PARTS = {
    "parameters": "params",
    "gradients": "grads",
    "optimizer_states": "optimizer",
    "activations": "activations",
    "buffers": "buffers",
}


def print_plan(plan: Plan, console: Console) -> None:
    """Print the choice, its reasons, and the rejected candidates."""
    table = Table(title="Plan", title_justify="left", show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(no_wrap=False)
    table.add_column(style="dim", ratio=1)
    table.add_row("ranks", _ranks(plan), "assumed to be identical, not checked" if plan.assumed else "")
    table.add_row("strategy", plan.strategy.name, Text("\n".join(plan.strategy.reasons)))
    table.add_row("precision", plan.precision, Text("\n".join(plan.precision_reasons)))
    table.add_row("batch", str(plan.batch.global_batch_size or "the loader's own"), Text("\n".join(plan.batch_reasons)))
    # With memory, the second table lists all of them.
    for rejected in plan.strategy.rejected if plan.memory is None else ():
        table.add_row("not taken", rejected.name, Text(rejected.reason))
    console.print(table)
    for notice in plan.notices:
        console.print(f"notice: {notice}", style="yellow", highlight=False, markup=False)


def _ranks(plan: Plan) -> str:
    devices = ", ".join(f"{count} x {name}" for name, count in plan.devices.items())
    nodes = f" on {plan.num_nodes} nodes" if plan.num_nodes > 1 else ""
    return f"{devices}{nodes}"


def print_memory(plan: Plan, console: Console) -> None:
    """Print every strategy's memory by part, traffic, time, and reason."""
    memory = plan.memory
    if memory is None:
        console.print("memory: not known", highlight=False)
        return
    entries = memory["assessments"]
    largest = max(entry["memory"]["total"] for entry in entries)
    unit, scale = ("GiB", GIB) if largest >= GIB else ("MiB", 1 << 20)
    title = (
        f"Memory of one rank at the step's peak in {unit}, {memory['method']}; "
        f"limit {format_bytes(memory['limit_bytes'])} of {format_bytes(memory['memory_bytes'])}"
    )
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("strategy", no_wrap=True)
    for part in (*_PARTS.values(), "total", "host", "batch", "sent", "s/step"):
        table.add_column(part, justify="right", no_wrap=True)

    def size(count: int) -> str:
        return f"{count / scale:.3g}" if count < 1000 * scale else f"{count / scale:.0f}"

    for entry in entries:
        parts, step = entry["memory"], entry["step"]
        able = entry["fits"] and entry["eligible"]
        table.add_row(
            entry["name"],
            *(size(parts[part]) for part in _PARTS),
            size(parts["total"]),
            size(parts["host"]) if parts["host"] else "",
            f"{entry['micro_batch_size']} x {entry['accumulate']}",
            size(step["bytes_per_rank"]) if step["bytes_per_rank"] else "",
            f"{step['seconds']:.3g}",
            style="bold" if entry["name"] == memory["pick"] else None if able else "dim",
        )
    console.print()
    console.print(table)
    for entry in entries:
        if entry["name"] != memory["pick"]:
            console.print(f"{entry['name']}: {entry['reason']}", style="dim", highlight=False, markup=False)
    if source := memory["machine"]["source"]:
        console.print(f"numbers of the device: {source}", style="dim", highlight=False, markup=False, soft_wrap=True)
    for note in memory["notes"]:
        console.print(f"note: {note}", style="dim", highlight=False, markup=False)
