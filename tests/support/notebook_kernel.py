"""Runs a notebook in a real Jupyter kernel: `python -m tests.support.notebook_kernel FILE` writes outputs into it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def execute(file: Path) -> None:
    """Run all cells, including those after an error."""
    # This variable makes a kernel send output of forks to pytest.
    os.environ.pop("PYTEST_CURRENT_TEST", None)
    cells = json.loads(file.read_text())
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in cells])
    NotebookClient(notebook, timeout=200, kernel_name="python3", allow_errors=True).execute()
    file.write_text(json.dumps([[_text(output) for output in cell.outputs] for cell in notebook.cells]))


def _text(output: nbformat.NotebookNode) -> str:
    return output.get("text") or "\n".join(output.get("traceback", ())) or str(output.get("data", ""))


if __name__ == "__main__":
    execute(Path(sys.argv[1]))
