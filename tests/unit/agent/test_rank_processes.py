"""How long the agent waits for the other ranks after a failure, with real processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from launcher.agent import rank_main
from launcher.agent.failure_evidence import FailureEvidence
from launcher.agent.failure_report import find_first_failure
from launcher.agent.rank_inspector import RankInspector
from launcher.agent.rank_main import RankCommand
from launcher.agent.rank_processes import AttemptProcesses, RankEnding, find_possible_causes, find_silent
from launcher.agent.start_request import StartRequest
from launcher.config.launch_options import LaunchOptions
from launcher.process.rank_status import RankError, RankStatusWriter, stacks_path

LOST = RankError.from_exception(RuntimeError("Connection closed by peer"), 1.0, 3)
OWN = RankError.from_exception(ValueError("own"), 1.0, 3)
KILLED, RUNNING = RankEnding(-9), RankEnding(None)


@pytest.mark.parametrize(
    ("endings", "causes", "silent"),
    [
        ({0: KILLED, 1: RUNNING, 2: RankEnding(None, LOST)}, [], [1]),
        ({0: KILLED, 1: RankEnding(None, OWN)}, [1], []),
        ({0: RankEnding(1, LOST), 1: RUNNING, 2: RankEnding(None, LOST)}, [1], [1]),
        ({0: RankEnding(1, LOST), 1: RankEnding(None, LOST)}, [], []),
        ({0: RankEnding(1, OWN), 1: RankEnding(0), 2: RUNNING}, [], [2]),
        ({0: RankEnding(3), 1: RankEnding(None, OWN)}, [1], []),
    ],
)
def test_the_agent_waits_for_ranks_that_may_have_failed_first(
    endings: dict[int, RankEnding], causes: list[int], silent: list[int]
) -> None:
    assert find_possible_causes(endings) == causes
    assert find_silent(endings) == silent


def _survive(folder: Path, stays: Any) -> None:
    """A rank that has lost its peer and does not end, as one that keeps its state; it writes stacks on request."""
    os.environ["RANK"] = "1"
    report = RankStatusWriter(folder, 1)
    vars(rank_main)["_prepare_stacks"](folder, report)
    report.record_error(RuntimeError("Connection closed by peer"))
    stays.wait()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_survivor_is_awaited_until_its_report_and_not_until_its_end(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    stays = context.Event()
    ranks = [context.Process(target=_die), context.Process(target=_survive, args=(tmp_path, stays))]
    for process in ranks:
        process.start()
    try:
        processes = AttemptProcesses([0, 1], ranks, RankInspector(tmp_path))
        request = StartRequest(RankCommand(len, ()), LaunchOptions(), 2, lambda: 2, list)
        ranks[0].join(60)
        outcomes = FailureEvidence(processes, request, None).collect()
        assert ranks[1].is_alive()
    finally:
        stays.set()
        for process in ranks:
            process.join(60)
    first = find_first_failure(outcomes)
    assert first is not None
    assert (first.rank, first.exit_code) == (0, -signal.SIGKILL)
    assert outcomes[1].is_consequence
    assert outcomes[1].exit_code is None
    assert stacks_path(tmp_path, 1).stat().st_size == 0, "its report explains it, so no stacks were requested"
