"""Stand-ins for SLURM's programs: real files on PATH that record their calls."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

_PROGRAM = """\
#!{python}
import json, os, pathlib, sys
folder = pathlib.Path({folder!r})
name = pathlib.Path(sys.argv[0]).name
with (folder / "calls.jsonl").open("a") as calls:
    calls.write(json.dumps([name, *sys.argv[1:]]) + "\\n")
if name == "sbatch":
    umask = os.umask(0)
    (folder / "umask").write_text(oct(umask))
    (folder / "script").write_bytes(pathlib.Path(sys.argv[1]).read_bytes())
answer = json.loads((folder / "answers.json").read_text())[name]
sys.stdout.write(answer[1])
sys.stderr.write(answer[2])
sys.exit(answer[0])
"""


class StandIns:
    """A folder of programs.

    Args:
        folder: created here.
        answers: program to (exit code, stdout, stderr).
    """

    def __init__(self, folder: Path, answers: Mapping[str, tuple[int, str, str]]) -> None:
        self.folder = folder
        folder.mkdir()
        (folder / "answers.json").write_text(json.dumps(answers))
        for name in answers:
            program = folder / name
            program.write_text(_PROGRAM.format(python=sys.executable, folder=str(folder)))
            program.chmod(0o755)

    @property
    def env(self) -> dict[str, str]:
        """PATH with these programs first."""
        return {"PATH": f"{self.folder}:{os.environ['PATH']}"}

    def answer(self, **answers: tuple[int, str, str]) -> None:
        """Change the answers of programs."""
        known = json.loads((self.folder / "answers.json").read_text())
        (self.folder / "answers.json").write_text(json.dumps({**known, **answers}))

    def calls(self, name: str) -> list[list[str]]:
        """The arguments of each call of a program."""
        try:
            lines = (self.folder / "calls.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        return [arguments[1:] for arguments in map(json.loads, lines) if arguments[0] == name]


TAKEN = (0, "Submitted batch job 42\n", "")
