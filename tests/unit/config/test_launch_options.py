from __future__ import annotations

import argparse

import pytest

from launcher.config.launch_options import LaunchOptions, add_launch_arguments, read_launch_options, reject_agent_flags
from launcher.core.errors import LaunchError


def _read(*argv: str) -> LaunchOptions:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_launch_arguments(parser)
    return read_launch_options(vars(parser.parse_args(argv)))


def test_without_flags_there_is_one_node_and_no_restart() -> None:
    assert _read() == LaunchOptions()
    assert not _read().several_nodes


@pytest.mark.parametrize("spelling", ["--nproc-per-node", "--nproc_per_node"])
def test_torchruns_two_spellings(spelling: str) -> None:
    assert _read(spelling, "4").nproc_per_node == 4
    assert _read(f"{spelling}=gpu").nproc_per_node == "gpu"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2", (2, 2)), ("1:4", (1, 4)), ("3:3", (3, 3))],
)
def test_nodes_fixed_and_elastic(text: str, expected: tuple[int, int]) -> None:
    options = _read("--nnodes", text, "--rdzv-endpoint", "n0:1")
    assert (options.min_nodes, options.max_nodes) == expected
    assert options.several_nodes


@pytest.mark.parametrize(
    ("text", "expected"),
    [("n0:1234", ("n0", 1234)), ("n0", ("n0", 29400)), ("[::1]:5", ("::1", 5)), ("[::1]", ("::1", 29400)),
     ("10.0.0.1:0", ("10.0.0.1", 0))],
)  # fmt: skip
def test_endpoints(text: str, expected: tuple[str, int]) -> None:
    options = _read("--rdzv-endpoint", text)
    assert (options.endpoint_host, options.endpoint_port) == expected


def test_ranks_for_the_terminal() -> None:
    assert _read().terminal_ranks == {0}
    assert _read("--terminal-ranks", "0,3").terminal_ranks == {0, 3}
    assert _read("--terminal-ranks", "all").terminal_ranks is None
    assert _read("--terminal-ranks", "none").terminal_ranks == frozenset()


def test_times_and_restarts() -> None:
    argv = ("--max-restarts", "3", "--restart-window", "60", "--hang-timeout", "0.5")
    options = _read(*argv, "--rdzv-conf", "join_timeout=9,last_call_timeout=2")
    assert (options.max_restarts, options.restart_window, options.hang_timeout) == (3, 60.0, 0.5)
    assert (options.join_timeout, options.last_call) == (9.0, 2.0)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (("--nproc-per-node", "0"), "--nproc-per-node: given '0'; expected a number of at least 1, gpu, cpu or auto"),
        (("--nnodes", "4:1"), "--nnodes: given '4:1'; expected N or MIN:MAX"),
        (("--nnodes", "2"), "--rdzv-endpoint: not given, but required for 2 nodes"),
        (("--node-rank", "1"), "--node-rank: given 1; expected 0 to 0 with --nnodes 1"),
        (("--rdzv-endpoint", "n0:x"), "--rdzv-endpoint: given 'n0:x'"),
        (("--rdzv-endpoint", "n0:99999"), "--rdzv-endpoint: given 'n0:99999'"),
        (("--rdzv-conf", "speed=3"), "--rdzv-conf: given 'speed=3'; expected join_timeout=SECONDS or last_call"),
        (("--max-restarts", "-1"), "--max-restarts: given '-1'"),
        (("--restart-window", "0"), "--restart-window: given '0'; expected seconds, more than 0"),
        (("--hang-timeout", "nan"), "--hang-timeout: given 'nan'"),
        (("--hang-timeout", "inf"), "--hang-timeout: given 'inf'"),
        (("--terminal-ranks", "0-3"), "--terminal-ranks: given '0-3'; expected ranks"),
    ],
)
def test_wrong_flags_are_reported(argv: tuple[str, ...], expected: str) -> None:
    with pytest.raises(LaunchError) as caught:
        _read(*argv)
    assert expected in str(caught.value)


def test_flags_of_the_agent_are_rejected_under_torchrun() -> None:
    reject_agent_flags(_read("--terminal-ranks", "all"))
    with pytest.raises(LaunchError) as caught:
        reject_agent_flags(_read("--max-restarts", "3", "--nproc-per-node", "2"))
    assert [problem.path for problem in caught.value.problems] == ["--nproc-per-node", "--max-restarts"]


def test_all_problems_are_listed_at_once() -> None:
    with pytest.raises(LaunchError, match="the command line has 3 problems") as caught:
        _read("--nnodes", "x", "--max-restarts", "many", "--hang-timeout", "soon")
    assert len(caught.value.problems) == 3
    assert caught.value.exit_code == 2
