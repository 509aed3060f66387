"""A process forked by `tests.support.warm_server` equals a new interpreter, except for its imports."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from tests.support.processes import run, run_warm

pytestmark = pytest.mark.slow

_PRINT = """
import json, os, signal, sys
import __main__
loaded = "torch" in sys.modules
from lightning.pytorch.utilities import rank_zero_only
print(json.dumps({
    "argv": sys.argv[1:], "cwd": os.getcwd(), "path": sys.path, "rank": rank_zero_only.rank,
    "env": {name: value for name, value in os.environ.items() if name != "_"}, "file": getattr(__main__, "__file__", None),
    "leader": os.getsid(0) == os.getpid(), "unbuffered": sys.stdout.write_through, "terminal": sys.stdin.isatty(),
    "signals": {n: str(signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)},
    "descriptors": sorted(os.listdir("/proc/self/fd"))[:3], "toy": "tests.support.toy" in sys.modules,
}))
print("loaded", loaded, file=sys.stderr)
sys.exit(7)
"""  # noqa: E501 -- a script


@pytest.mark.parametrize("how", ["text", "file", "module"])
def test_a_warm_process_has_the_same_arguments_environment_paths_and_signals(tmp_path: Path, how: str) -> None:
    (tmp_path / "print_it.py").write_text(_PRINT)
    start = {"text": ["-c", _PRINT], "file": ["print_it.py"], "module": ["-m", "print_it"]}[how]
    env = {"RANK": "3", "MINE": "ä", "PYTHONPATH": str(tmp_path / "more")}
    printed = []
    for each in (run, run_warm):
        output = each([sys.executable, *start, "--a", "b c"], tmp_path, env=env).check(7).output
        lines = output.splitlines()
        assert f"loaded {each is run_warm}" in lines
        printed.append(json.loads(next(line for line in lines if line.startswith("{"))))
    fresh, warm = printed
    assert warm == fresh
    assert (warm["rank"], warm["toy"]) == (3, False)


@pytest.mark.parametrize(
    ("text", "code", "expected"),
    [
        ("raise ValueError('mine')", 1, "ValueError: mine"),
        ("import sys; sys.exit('a message')", 1, "a message"),
        ("import os; os._exit(5)", 5, ""),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL, ""),
        ("import atexit; atexit.register(print, 'at exit')", 0, "at exit"),
    ],
)
def test_a_warm_process_ends_as_others(tmp_path: Path, text: str, code: int, expected: str) -> None:
    assert expected in run_warm([sys.executable, "-c", text], tmp_path).check(code).output


def test_a_signal_reaches_a_warm_process(tmp_path: Path) -> None:
    text = "import signal; print('ready', flush=True); signal.pause()"

    def interrupt(line: str, pid: int) -> None:
        # Once: its later output has lines too.
        if line == "ready\n":
            os.kill(pid, signal.SIGINT)

    ended = run_warm([sys.executable, "-c", text], tmp_path, on_line=interrupt)
    assert "KeyboardInterrupt" in ended.output
