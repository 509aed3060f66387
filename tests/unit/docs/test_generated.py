"""The tables that the documentation is generated from agree with the code."""

from __future__ import annotations

import ast
import re
import typing
from collections.abc import Iterator
from pathlib import Path

from docs.generate import cli, code_tables, config_keys, diagrams
from launcher.core.event_kinds import EVENT_KINDS
from launcher.monitoring.health import AlertKind
from launcher.monitoring.metric_names import ALERTS, METRICS
from tests.support.documentation import REPOSITORY

# How events are written: method, and the place of the kind among the arguments.
_WRITERS = {"write": 0, "_change": 1, "write_event": 1, "_write_event": 2}


def _calls() -> Iterator[ast.Call]:
    for path in (REPOSITORY / "launcher").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield node


def written_events() -> dict[str, set[str]]:
    """Every kind that a call in the code writes, with its fields."""
    found: dict[str, set[str]] = {}
    for call in _calls():
        place = _WRITERS.get(call.func.attr) if isinstance(call.func, ast.Attribute) else None
        if place is None or len(call.args) <= place or not call.keywords:
            continue
        kind = call.args[place]
        if isinstance(kind, ast.Constant) and isinstance(kind.value, str):
            found.setdefault(kind.value, set()).update(word.arg for word in call.keywords if word.arg)
    return found


def test_every_event_that_the_code_writes_is_documented_with_its_fields() -> None:
    assert {kind: set(event.fields) for kind, event in EVENT_KINDS.items()} == written_events()


def test_every_metric_that_the_monitoring_logs_is_documented() -> None:
    texts: set[str] = set()
    for package in ("monitoring", "loggers"):
        for path in (REPOSITORY / "launcher" / package).glob("*.py"):
            if path.name != "metric_names.py":
                texts |= set(re.findall(r'"((?:amp|perf)/[a-z_]+)"', path.read_text(encoding="utf-8")))
    assert set(METRICS) == texts


def test_every_alert_is_documented() -> None:
    assert set(ALERTS) == set(typing.get_args(AlertKind))


def test_every_config_key_has_a_meaning() -> None:
    missing = [path for path, _, _, text in config_keys.rows() if len(text) <= 15]
    assert missing == [], "describe them in the docstring of their record in launcher/config/schema.py"


def test_every_subcommand_has_a_section_with_its_options() -> None:
    text = cli.reference()
    assert {"fit", "plan", "submit", "report", "init", "doctor"} <= set(cli.commands())
    for command in cli.commands():
        assert f"## `{command}`\n" in text
    plain = re.sub(r"<[^>]+>", "", text)
    for option in ("--nproc-per-node", "--dry-run", "--sweep", "--checkpoint", "--preset", "--plot"):
        assert option in plain


def test_exit_codes_list_75_and_the_usage_errors() -> None:
    text = re.sub(r"<[^>]+>", "", code_tables.exit_codes() + code_tables.exceptions())
    assert all(f"\n| {code} | " in text for code in ("0", "1", "2", "75", "128 + N"))
    assert re.search(r"^\| ConfigError \|.*Base: UsageError; exit code 2\.", text, re.MULTILINE)


def test_the_diagram_of_the_layers_shows_every_package() -> None:
    drawn = diagrams.layers()
    for path in sorted((REPOSITORY / "launcher").iterdir()):
        if (path / "__init__.py").exists():
            assert f">{path.name}</text>" in drawn
            assert f"launcher/{path.name}" in re.sub("<wbr>", "", diagrams.packages())


def test_the_modules_of_the_data_flow_exist() -> None:
    assert [step.module for step in diagrams.FLOW if not Path(REPOSITORY / step.module).exists()] == []
