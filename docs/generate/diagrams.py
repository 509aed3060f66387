"""Diagrams as inline SVG, drawn for a narrow page: they are as readable on a phone as on a wide screen."""

from __future__ import annotations

import ast
import html
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from docs.generate.markdown import code, table

_REPOSITORY = Path(__file__).resolve().parents[2]
_WIDTH = 400
_TEXT = 'fill="var(--md-default-fg-color)" text-anchor="middle"'
_BOX = 'fill="var(--md-code-bg-color)" stroke="var(--md-primary-fg-color)" rx="5"'


class FlowStep(NamedTuple):
    """A record of the data flow.

    Attributes:
        record: name of the record.
        module: the file that makes it.
        text: what it holds.
    """

    record: str
    module: str
    text: str


FLOW = (
    FlowStep("command line, YAML", "launcher/cli/main.py", "what the user typed"),
    FlowStep("RunConfig", "launcher/config/loading.py", "what the user asked for, validated"),
    FlowStep("Topology", "launcher/hardware/topology.py", "rank, world size, node, host"),
    FlowStep("Hardware", "launcher/hardware/devices.py", "device, memory, native dtypes, versions"),
    FlowStep("Agreement", "launcher/agreement/handshake.py", "the facts of all ranks, compared"),
    FlowStep("Plan", "launcher/planning/plan.py", "strategy, precision, batch, memory, reasons"),
    FlowStep("RunContext", "launcher/training/context.py", "all of the above, for a running rank"),
    FlowStep("Strategy and Trainer", "launcher/training/trainer.py", "Lightning's objects, built from the plan"),
    FlowStep("events.jsonl", "launcher/core/events.py", "what happened, one JSON line per event"),
    FlowStep("report, status", "launcher/report/command.py", "read the events, nothing else"),
)


def data_flow() -> str:
    """The records from the command line to the report."""
    height, gap = 58, 22
    parts: list[str] = []
    for number, step in enumerate(FLOW):
        y = 2 + number * (height + gap)
        parts.append(f'<rect x="2" y="{y}" width="{_WIDTH - 4}" height="{height}" {_BOX}/>')
        parts.append(_text(y + 18, step.record, 'font-size="14" font-weight="bold"'))
        parts.append(_text(y + 34, step.text, 'font-size="12"'))
        parts.append(_text(y + 50, step.module, 'font-size="11" opacity="0.75"'))
        if number + 1 < len(FLOW):
            x, top = _WIDTH // 2, y + height
            parts.append(f'<path d="M{x} {top + 2}v{gap - 9}m-5 0h10l-5 6z" fill="var(--md-default-fg-color)" '
                         'stroke="var(--md-default-fg-color)"/>')  # fmt: skip
    caption = "Each step creates one immutable record from the records above it."
    return _figure(parts, len(FLOW) * (height + gap) - gap + 4, caption)


def read_layers() -> list[list[str]]:
    """The layers of `launcher`, top first, from the contract that import-linter checks."""
    contracts = tomllib.loads((_REPOSITORY / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (found,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    return [[name.strip() for name in layer.split("|")] for layer in found]


def layers() -> str:
    """The layers of `launcher`, with `strategies` and `slurm` below."""
    height, gap = 34, 8
    parts: list[str] = []
    rows = [*read_layers(), ["strategies", "slurm"]]
    for number, row in enumerate(rows):
        y = 2 + number * (height + gap) + (14 if number == len(rows) - 1 else 0)
        width = (_WIDTH - 4 - gap * (len(row) - 1)) / len(row)
        for place, name in enumerate(row):
            x = 2 + place * (width + gap)
            parts.append(f'<rect x="{x:g}" y="{y}" width="{width:g}" height="{height}" {_BOX}/>')
            parts.append(_text(y + 22, name, 'font-size="13"', x + width / 2))
    caption = "A package imports only from the layers below it. The two packages at the bottom import nothing of ours."
    return _figure(parts, len(rows) * (height + gap) + 12, caption)


def packages() -> str:
    """What belongs in each package, from its `__init__.py`."""
    names = [f"launcher/{name}" for row in read_layers() for name in row] + ["strategies", "slurm"]
    rows: list[Sequence[str]] = []
    for name in names:
        path = _REPOSITORY / name / "__init__.py"
        path = path if path.exists() else _REPOSITORY / f"{name}.py"
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        rows.append((code(name if path.name == "__init__.py" else f"{name}.py"), docstring.partition("\n\n")[0]))
    return table(["package", "contains"], rows)


def _text(y: float, text: str, style: str, x: float = _WIDTH / 2) -> str:
    return f'<text x="{x:g}" y="{y:g}" {style} {_TEXT}>{html.escape(text)}</text>'


def _figure(parts: Sequence[str], height: int, caption: str) -> str:
    text = html.escape(caption)
    drawn = f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{text}">{"".join(parts)}</svg>'
    return f'<figure class="diagram">{drawn}<figcaption>{text}</figcaption></figure>'
