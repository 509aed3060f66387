"""The hook of mkdocs: replaces `<!-- generate: NAME -->` by Markdown made from the code, and adds some pages."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from docs.generate import cli, code_tables, config_keys, diagrams  # noqa: E402 -- mkdocs loads this file by its path

GENERATORS: Mapping[str, Callable[[], str]] = {
    "alerts": code_tables.alerts,
    "cli": cli.reference,
    "config-keys": config_keys.reference,
    "data-flow": diagrams.data_flow,
    "events": code_tables.events,
    "exceptions": code_tables.exceptions,
    "exit-codes": code_tables.exit_codes,
    "layers": diagrams.layers,
    "metrics": code_tables.metrics,
    "packages": diagrams.packages,
}
# Pages whose text is a file outside `docs/`.
PAGES = {
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "explanation/measurements.md": "tests/benchmarks/RESULTS.md",
}
_MARKER = re.compile(r"^<!-- generate: ([\w-]+) -->$", re.MULTILINE)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages from files of the repository."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=(REPOSITORY / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the markers of a page."""
    return _MARKER.sub(lambda found: GENERATORS[found[1]](), markdown)
