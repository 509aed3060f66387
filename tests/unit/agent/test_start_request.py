"""Ranks that are started without a config, several times in one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from launcher.agent.rank_main import RankCommand
from launcher.agent.start_request import StartRequest, share_cores
from launcher.config.launch_options import LaunchOptions

_PROGRAM = """\
import json, multiprocessing, os, signal, sys
from pathlib import Path

def work(arguments):
    folder, fails = arguments
    rank = int(os.environ["RANK"])
    if fails and rank == 1:
        raise ValueError("bad batch")
    if fails:
        signal.pause()
    loaded = "torch" in sys.modules
    Path(folder, f"{rank}.json").write_text(json.dumps([os.environ["WORLD_SIZE"], os.environ["COLOUR"], loaded]))
    return 0

if __name__ == "__main__":
    import program
    from launcher.agent.rank_main import RankCommand
    from launcher.agent.start import start_ranks
    from launcher.agent.start_request import StartRequest
    from launcher.config.launch_options import LaunchOptions

    context = multiprocessing.get_context("forkserver")
    context.Process(target=str).start()
    own = multiprocessing.forkserver._forkserver._forkserver_pid
    before, failures, codes = dict(os.environ), [], []
    for fails in ("", "yes"):
        request = StartRequest(
            RankCommand(program.work, (os.getcwd(), fails)), LaunchOptions(), estimated_ranks=3, count_ranks=lambda: 2,
            list_modules=lambda: ["torch", ":"], make_variables=lambda ranks: {"COLOUR": f"blue{ranks}"},
            report_failure=lambda first, outcomes, decision: failures.append((first, len(outcomes), decision)))
        codes.append(start_ranks(request))
    assert dict(os.environ) == before
    assert multiprocessing.forkserver._forkserver._forkserver_pid == own
    (first, count, decision), = failures
    print(json.dumps([codes, first.rank, first.error.kind, first.error.traceback[-1], count, decision.restart]))
"""


def test_ranks_start_several_times_in_one_process_without_a_config(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(_PROGRAM)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "program.py"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[0, 1], 1, "ValueError", "ValueError: bad batch", 2, False]
    for rank in range(2):
        # The guess of three ranks was wrong, so another fork server was started for two.
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == ["2", "blue2", True]


def test_one_rank_has_an_agent_if_it_may_be_restarted() -> None:
    def request(options: LaunchOptions, *, always: bool = False) -> StartRequest:
        command = RankCommand(len, ())
        return StartRequest(command, options, 1, lambda: 1, list, share_cores, always_has_agent=always)

    assert not request(LaunchOptions()).has_agent
    assert request(LaunchOptions(max_restarts=1)).has_agent
    assert request(LaunchOptions(max_nodes=2)).has_agent
    assert request(LaunchOptions(), always=True).has_agent
