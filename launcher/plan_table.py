"""The plan on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launcher.plan import Plan


def print_plan(plan: Plan, console: Console) -> None:
    """Print what was chosen, why, and what was not taken."""
    table = Table(title="Plan", title_justify="left", show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(no_wrap=False)
    table.add_column(style="dim", ratio=1)
    table.add_row("ranks", _ranks(plan), "assumed alike: no rank was asked" if plan.assumed else "")
    table.add_row("strategy", plan.strategy.name, _lines(plan.strategy.reasons))
    table.add_row("precision", plan.precision, _lines(plan.precision_reasons))
    table.add_row("batch", str(plan.batch.global_batch_size or "the loader's own"), _lines(plan.batch_reasons))
    for rejected in plan.strategy.rejected:
        table.add_row("not taken", rejected.name, Text(rejected.reason))
    console.print(table)
    for notice in plan.notices:
        console.print(f"notice: {notice}", style="yellow", highlight=False, markup=False)


def _ranks(plan: Plan) -> str:
    devices = ", ".join(f"{count} x {name}" for name, count in plan.devices.items())
    nodes = f" on {plan.num_nodes} nodes" if plan.num_nodes > 1 else ""
    return f"{devices}{nodes}"


def _lines(reasons: tuple[str, ...]) -> Text:
    return Text("\n".join(reasons))
