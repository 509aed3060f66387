"""The model's summary at the start of a training: one line, and one for each of its first modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.utilities.model_summary.model_summary import get_human_readable_count
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typing_extensions import override

from strategies.units import format_bytes

_MOST_MODULES = 12
# Lightning's titles; the last ones are left out first where the terminal is too narrow.
_COLUMNS = ("Name", "Type", "Params", "Params per Device", "In sizes", "Out sizes")


class ShortModelSummary(ModelSummary):
    """Prints the summary on rank zero, no line longer than the terminal."""

    def __init__(self, console: Console) -> None:
        super().__init__(max_depth=1)
        self._console = console

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # On every rank: an example batch may run the model with its collectives.
        summary = self._summary(trainer, pl_module)
        if trainer.is_global_zero:
            trained, total = summary.trainable_parameters, summary.total_parameters
            size = format_bytes(round(summary.model_size * 1e6))
            title = describe_parameters(type(pl_module).__name__, trained, total, size)
            modules: dict[str, list[str]] = dict(summary._get_summary_data())
            self._console.print(title, highlight=False, markup=False)
            print_modules(modules, self._console)


def describe_parameters(name: str, trained: int, total: int, size: str) -> str:
    """As in 'Model Net: 1.2 K parameters (4.7 KiB), 65 of them trained'."""
    parts = "all" if trained == total else f"{_count(trained)} of them" if trained else "none"
    return f"Model {name}: {_count(total)} parameters ({size}), {parts} trained"


def _count(number: int) -> str:
    return get_human_readable_count(number).strip()


def print_modules(columns: Mapping[str, Sequence[str]], console: Console) -> None:
    """Print the first modules; `columns` are Lightning's, with one entry for each module."""
    shown = [name for name in _COLUMNS if name in columns]
    while len(shown) > 3 and _width(columns, shown) > console.width:
        # One size without the other is of no use.
        shown = [name for name in shown[:-1] if not name.endswith("sizes")]
    table = Table(box=None, show_header=len(shown) > 3, padding=(0, 0, 0, 2),
                  header_style="bold", pad_edge=True)  # fmt: skip
    for name in shown:
        table.add_column(name.lower(), justify="right" if name.startswith("Params") else "left", overflow="fold",
                         no_wrap=name == "Params")  # fmt: skip
    modes = columns.get("Mode", ())
    for index, row in enumerate(zip(*(columns[name] for name in shown), strict=True)):
        if index == _MOST_MODULES:
            break
        is_evaluated = index < len(modes) and modes[index] == "eval"
        table.add_row(*(Text(str(cell).strip()) for cell in row), *(["in eval mode"] if is_evaluated else []))
    if table.row_count:
        console.print(table)
    hidden = len(columns.get("Name", ())) - _MOST_MODULES
    if hidden > 0:
        console.print(f"  and {hidden} more modules", highlight=False)


def _width(columns: Mapping[str, Sequence[str]], shown: Sequence[str]) -> int:
    widths = [max(map(len, map(str, (name, *columns[name])))) for name in shown]
    # Two spaces before each column, and the mode after the last one.
    return sum(widths) + 2 * len(shown) + (len("  in eval mode") if "eval" in columns.get("Mode", ()) else 0)
