"""What `launcher run` reports about a signal."""

from __future__ import annotations

import signal

import pytest

from launcher.agent.failure_report import RankOutcome
from launcher.agent.script_start import describe_script_stop, describe_stop_begin


@pytest.mark.parametrize(
    ("number", "codes", "text"),
    [
        (signal.SIGINT, (130, 1), "stopped by Ctrl-C"),
        (signal.SIGINT, (0, 0), "stopped by Ctrl-C; all ranks ended with exit code 0"),
        (signal.SIGTERM, (0, -15), "stopped by SIGTERM"),
        (signal.SIGINT, (-9, 130, -9), "stopped by Ctrl-C; killed ranks 0, 2"),
        (signal.SIGQUIT, (), "stopped by SIGQUIT"),
    ],
)
def test_the_text_states_how_the_ranks_ended(number: int, codes: tuple[int, ...], text: str) -> None:
    outcomes = [RankOutcome(rank, "n1", code, 0.0) for rank, code in enumerate(codes)]
    assert describe_script_stop(number, outcomes) == text


def test_the_first_signal_is_acknowledged_within_80_columns() -> None:
    line = describe_stop_begin(signal.SIGINT, 120.0)
    assert line == "Ctrl-C: waiting for the ranks to end, at most 120 s; Ctrl-C again kills them"
    assert len(line) < 80
    assert describe_stop_begin(signal.SIGHUP, 120.0) == "SIGHUP: waiting for the ranks to end, at most 120 s"
