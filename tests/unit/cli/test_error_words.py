"""Every error message states what to do next. The messages are found in the syntax trees of the source."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.core import errors

REPOSITORY = Path(__file__).resolve().parents[3]
# Classes raised with our own messages; those of a training's errors and signals come from elsewhere.
RAISED = {
    name
    for name, kind in vars(errors).items()
    if inspect.isclass(kind) and issubclass(kind, errors.LauncherError)
} - {"TrainingError", "OutOfMemoryError", "Interrupted"}  # fmt: skip
# Messages whose advice is inserted from a table or a function.
INSERTED = {"cannot differ: {}", "not supported here; {}", "{} holds runs and is none itself; {}",
            "{} takes no {}; {}", "{} takes no {}; {}{}", "given {}; {}", "no plan meets the config:\n{}",
            "launcher report needs matplotlib: {}"}  # fmt: skip
# Advice: an order, the valid values, or a guess at the intended value.
NEXT = re.compile(
    r"\b(add|ask|begin|call|cancel|check|choose|correct|did you mean|allocate|destroy|end|expected|free|give|install|"
    r"keep|leave|load|look|make|move|name|needs? (?:a|as|to)|open|pip install|put|raise|remove|return|run|save|say|see|"
    r"set|start|submit|take|try|unset|update|use|valid|wait|write|must|says where|asks nothing|"
    r"(?:presets|the runs|commands) (?:are|in)|writes one|given as)\b|--[a-z]|so .* expects|use `strategy: NAME`"
)


def messages() -> Iterator[tuple[str, str]]:
    """Place and literal text of each message; `{}` stands for what is put in."""
    for file in sorted((REPOSITORY / "launcher").rglob("*.py")):
        if file.relative_to(REPOSITORY).as_posix() == "launcher/wizard/notes.py":
            continue  # warnings, not errors
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or not node.args:
                continue
            place = f"{file.relative_to(REPOSITORY)}:{node.lineno}"
            if node.func.id in RAISED:
                text = literal(node.args[0])
            elif node.func.id == "Problem" and len(node.args) == 2:
                text = literal(node.args[1])
            else:
                continue
            # Texts made elsewhere are checked there.
            if re.sub(r"\{\}|[\W\d_]", "", text) and text not in INSERTED:
                yield place, text


def literal(node: ast.AST) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value) if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(literal(part) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        inner = literal(node.value)
        return inner or "{}"
    if isinstance(node, ast.BinOp):
        return literal(node.left) + literal(node.right)
    if isinstance(node, ast.IfExp):
        return literal(node.body) + literal(node.orelse)
    return "{}" if isinstance(node, ast.Name | ast.Attribute | ast.Subscript | ast.Call) else ""


def test_messages_are_found() -> None:
    found = list(messages())
    assert len(found) > 80
    assert len({place.partition(":")[0] for place, _ in found}) > 25


@pytest.mark.parametrize(("place", "text"), [pytest.param(*m, id=m[0]) for m in messages()])
def test_every_error_states_what_to_do_next(place: str, text: str) -> None:
    assert NEXT.search(text), f"{place}: {text!r} gives no advice: state what is valid, or what to do"
