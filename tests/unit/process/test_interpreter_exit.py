"""A process that ends by `exit_process` leaves what Python would leave: files, output and exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

# Each leaves something that only the end of the interpreter writes.
PROGRAMS = {
    "text": "f = open('out', 'w'); f.write('row')",
    "csv": "import csv; f = open('out', 'w', newline=''); csv.writer(f).writerow([1, 2.5])",
    "in a class": "class Logs:\n    file = open('out', 'w')\nLogs.file.write('row')",
    "in a function": "import functools\n@functools.cache\ndef log(): return open('out', 'w')\nlog().write('row')",
    "binary": "f = open('out', 'wb'); f.write(b'row')",
    "read and written": "open('out', 'w').close(); f = open('out', 'r+b'); f.write(b'row')",
    "gzip": "import gzip; f = gzip.GzipFile('out', 'w', mtime=0); f.write(b'row' * 9)",
    "text in gzip": "import gzip, io; f = io.TextIOWrapper(gzip.GzipFile('out', 'w', mtime=0)); f.write('row' * 9)",
    "text in bz2": "import bz2; f = bz2.open('out', 'wt'); f.write('row' * 9)",
    "zip": "import zipfile; f = zipfile.ZipFile('out', 'w'); f.writestr(zipfile.ZipInfo('a'), 'row')",
    "own class": "import io\nclass Own(io.TextIOBase):\n    def close(self):\n"
                 "        if not self.closed: print('closed')\n        super().close()\nf = Own()",
    "finaliser": "class Own:\n    def __del__(self): print('deleted')\nkept = Own()",
    "cycle": "class Own:\n    def __init__(self): self.me = self\n    def __del__(self): print('deleted')\nOwn()",
    "generator": "def rows():\n    try: yield 1\n    finally: print('closed')\nkept = rows(); next(kept)",
    "object with a property __class__": "class Old:\n    @property\n    def __class__(self):\n"
                                        "        print('read')\n        return Old\nold = Old(); print('end')",
    "exit function": "import atexit; atexit.register(print, 'at exit')",
    "exit function that fails": "import atexit; atexit.register(lambda: 1 / 0); f = open('out', 'w'); f.write('row')",
    "thread": "import threading, time\nf = open('out', 'w')\n"
              "threading.Thread(target=lambda: (time.sleep(.05), f.write('row'))).start()",
    "temporary folder": "import tempfile, pathlib; t = tempfile.TemporaryDirectory(dir='.'); "
                        "pathlib.Path('out').write_text('row')",
    "a full disk": "f = open('/dev/full', 'w'); f.write('row'); g = open('out', 'w'); g.write('row')",
    "closed already": "with open('out', 'w') as f: f.write('row')",
}  # fmt: skip
# Forks a process for each program, which ends as Python ends, or as a rank.
_DRIVER = """\
import json, os, sys, types
from launcher.process.interpreter_exit import exit_process, list_open_files
how, programs = sys.argv[1], json.loads(sys.argv[2])
main, files = sys.modules["__main__"], list_open_files()
for name, program in programs.items():
    os.mkdir(name)
    if os.fork():
        os.wait()
        continue
    os.chdir(name)
    os.dup2(os.open("stdout", os.O_WRONLY | os.O_CREAT), 1)
    sys.modules["__main__"] = types.ModuleType("__main__")
    exec(program, vars(sys.modules["__main__"]))
    if how == "rank":
        exit_process(0, main=main, before=files)
    break
"""


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, bytes]]]:
    """The files of each program, by how it ended."""
    folder = tmp_path_factory.mktemp("left")
    for how in ("python", "rank"):
        (folder / how).mkdir()
        _run(folder / how, _DRIVER, how, json.dumps(PROGRAMS))
    return {how: {name: _read(folder / how / name) for name in PROGRAMS} for how in ("python", "rank")}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_leaves_what_python_leaves(left: dict[str, dict[str, dict[str, bytes]]], name: str) -> None:
    assert left["rank"][name] == left["python"][name]
    assert any(left["python"][name].values()), "the program leaves nothing, so it shows nothing"


def test_what_the_parent_process_has_not_written_is_left_to_it(tmp_path: Path) -> None:
    program = (
        "import os\nfrom launcher.process.interpreter_exit import exit_process, list_open_files\n"
        "f = open('out', 'w'); f.write('row')\n"
        "if os.fork() == 0: exit_process(0, before=list_open_files())\n"
        "os.wait()"
    )
    _run(tmp_path, program)
    assert _read(tmp_path) == {"out": b"row"}


def _run(folder: Path, program: str, *arguments: str) -> None:
    environment = {"PYTHONPATH": str(Path(__file__).parents[3])}
    subprocess.run([sys.executable, "-c", program, *arguments], cwd=folder, env=environment, timeout=60, check=True)


def _read(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
