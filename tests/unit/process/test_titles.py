"""The titles of the launcher's processes, as /proc shows them."""

from __future__ import annotations

import json
import subprocess
import sys

_PROGRAM = """
import json, os, sys
from pathlib import Path
from launcher.process.titles import claim_process, name_forks, prepare_titles, set_rank_title, set_title
from launcher.process.titles import set_worker_title

def title():
    return [Path("/proc/self", name).read_text().rstrip("\\0\\n") for name in ("cmdline", "comm")]

if sys.argv[1] == "own":
    claim_process()
prepare_titles()
# The launcher sets variables for its ranks, which moves the environment in memory.
os.environ.update({f"VARIABLE_{n}": "x" * 100 for n in range(300)}, PATH="/changed")
found = []
set_rank_title(3, 8)
found.append(title())
set_rank_title(3, 8, "a run with a long name" * 3)
found.append(title())
name_forks(3)
if os.fork() == 0:
    found.append(title())
    set_worker_title(1, 3)
    found.append(title())
    print(json.dumps(found))
    os._exit(0)
os.wait()
"""


def found_titles(owner: str) -> list[list[str]]:
    command = [sys.executable, "-c", _PROGRAM, owner]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    return json.loads(output)


def test_a_process_of_the_launcher_has_the_title_of_its_role_and_run() -> None:
    run = "a run with a long name" * 3
    # The short name, which `top` shows, has no space: see `set_title`.
    assert found_titles("own") == [
        ["launcher: rank 3 of 8", "rank-3-of-8"],
        [f"launcher: rank 3 of 8 (run {run})", "rank-3-of-8"],
        [f"launcher: process of rank 3 (run {run})", "process-of-rank"],
        [f"launcher: loader worker 1 of rank 3 (run {run})", "loader-worker-1"],
    ]


def test_the_process_of_a_script_keeps_its_title() -> None:
    found = found_titles("script")
    assert found[0] == found[1] == found[2]
    assert "claim_process" in found[0][0], "the command line"
