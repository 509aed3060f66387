"""Findings of a preflight, and how it is started; tests/distributed/test_preflight.py runs the ranks."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.cli.main import run
from launcher.doctor.finding import Finding
from launcher.doctor.preflight_findings import NodeResult, RankResult, exchange_rounds, preflight_findings
from slurm.job import SlurmJob
from slurm.step import make_step_arguments


def node(number: int, ranks: int = 2, **more: object) -> NodeResult:
    return NodeResult(number, f"n{number + 1}", ranks, **more)  # type: ignore[arg-type]


def rank(number: int, per_node: int = 2, **more: object) -> RankResult:
    healthy = RankResult(number, f"n{number // per_node + 1}", "NVIDIA A100", "bf16", 250e12,
                       0.0 if number % per_node == 0 else None, 1e-4 if number % per_node == 0 else None, 40e9, True,
                       {0: 12e9} if number % per_node == 0 else {})  # fmt: skip
    return dataclasses.replace(healthy, **more)  # type: ignore[arg-type]


def all_findings(nodes: Sequence[NodeResult], ranks: Sequence[RankResult], expected: int = 4) -> list[Finding]:
    findings = list(preflight_findings(nodes, ranks, expected, 1.5))
    assert all(bool(f.advice) == (f.status != "ok") for f in findings), "every problem has advice"
    return findings


def problems(nodes: Sequence[NodeResult], ranks: Sequence[RankResult], expected: int = 4) -> list[tuple[str, str, str]]:
    return [(f.name, f.status, f.found) for f in all_findings(nodes, ranks, expected) if f.status != "ok"]


NODES = [node(i) for i in range(4)]
RANKS = [rank(i) for i in range(8)]


@given(st.integers(2, 70))
def test_each_participant_exchanges_with_both_neighbours_one_at_a_time(count: int) -> None:
    rounds = exchange_rounds(count)
    for pairs in rounds:
        busy = [one for pair in pairs for one in pair]
        assert len(busy) == len(set(busy))
    edges = [frozenset(pair) for pairs in rounds for pair in pairs]
    ring = {frozenset((i, (i + 1) % count)) for i in range(count)}
    assert set(edges) == ring
    assert len(edges) == len(ring)
    assert exchange_rounds(1) == []


def test_a_healthy_cluster() -> None:
    assert {f.name: f.found for f in all_findings(NODES, RANKS)} == {
        "nodes": "n1, n2, n3, n4: versions, devices, disk and limits are ok",
        "ranks": "8 on n1, n2, n3, n4 (NVIDIA A100)",
        "matmul": "250 TFLOP/s a rank in bf16 (median), from 250 TFLOP/s to 250 TFLOP/s",
        "all-reduce": "40 GB/s over 8 ranks (bus bandwidth)",
        "exchange": "12 GB/s between neighbours of 4 nodes (median)",
        "clock": "at most 0 ms (+- 0.1 ms) from the node of rank 0",
    }
    assert problems(NODES, RANKS) == []


def test_slow_ranks_are_reported_the_slowest_first() -> None:
    ranks = [dataclasses.replace(r, flops={2: 120e12, 5: 60e12, 6: 200e12}.get(r.rank, 250e12)) for r in RANKS]
    assert problems(NODES, ranks) == [
        ("matmul", "warning", "rank 5 (n3, NVIDIA A100): 60 TFLOP/s, 4.2 times slower than the median"),
        ("matmul", "warning", "rank 2 (n2, NVIDIA A100): 120 TFLOP/s, 2.1 times slower than the median"),
    ]
    assert "--exclude n3" in next(f for f in all_findings(NODES, ranks) if "rank 5" in f.found).advice


def test_a_slow_node_is_distinguished_from_its_neighbours() -> None:
    speeds = {0: {2: 12e9, 6: 12e9}, 2: {0: 12e9, 4: 1e9}, 4: {2: 1e9, 6: 1.2e9}, 6: {0: 12e9, 4: 1.2e9}}
    ranks = [dataclasses.replace(r, exchange=speeds.get(r.rank, {})) for r in RANKS]
    found = "rank 4 (n3): 1.2 GB/s with its faster neighbour, 10.0 times slower than the median"
    assert problems(NODES, ranks) == [("exchange", "warning", found)]


def test_a_slow_network_is_a_warning_only_between_nodes() -> None:
    slow = [rank(0, exchange={2: 5e7}), rank(1), rank(2, exchange={0: 5e7}), rank(3)]
    ((name, status, found),) = problems(NODES[:2], slow, 2)
    assert (name, status, found) == ("exchange", "warning", "50 MB/s between neighbours of 2 nodes (median)")
    assert problems([node(0, 4)], [rank(i, 4, exchange={0: 5e7}) for i in range(4)], 1) == []


def test_different_clocks_are_reported_unless_the_answer_was_slow() -> None:
    ranks = [*RANKS[:2], rank(2, clock_offset=-3.2, clock_error=0.01), rank(3),
             rank(4, clock_offset=0.4, clock_error=0.35), rank(5), rank(6, clock_offset=7.0), rank(7)]  # fmt: skip
    assert problems(NODES, ranks) == [
        ("clock", "warning", "n4 is 7 s ahead of the node of rank 0"),
        ("clock", "warning", "n2 is 3.2 s behind the node of rank 0"),
    ]


def test_a_wrong_sum_is_a_failure() -> None:
    ranks = [dataclasses.replace(r, all_reduce_sum=r.rank != 3) for r in RANKS]
    assert problems(NODES, ranks) == [("all-reduce", "failure", "rank 3 (n2) received a wrong sum")]
    assert [f.name for f in all_findings(NODES, ranks)].count("all-reduce") == 1


def test_dead_ranks_are_reported_with_their_stage_and_log() -> None:
    nodes = [node(0, log_tails={1: "RuntimeError: CUDA error\nexit code 1"}), *NODES[1:]]
    ranks = [RANKS[0], rank(1, flops=None), *RANKS[2:5], rank(6, all_reduce=None, exchange=None),
             rank(7, exchange=None)]  # fmt: skip
    assert problems(nodes, ranks) == [
        ("ranks", "failure", "rank 1 (n1) did not complete the matmul:\nRuntimeError: CUDA error\nexit code 1"),
        ("ranks", "failure", "rank 5 (n3) did not start, and logged nothing"),
        ("ranks", "failure", "rank 6 (n4) did not complete the all-reduce, and logged nothing"),
        ("ranks", "failure", "rank 7 (n4) did not complete the exchange, and logged nothing"),
    ]


def test_missing_nodes_and_a_failed_rendezvous_are_failures() -> None:
    alone = [node(0, 0, error="node 1 of 2 did not come within 120 s")]
    assert problems(alone, [], 2) == [
        ("ranks", "failure", "n1: node 1 of 2 did not come within 120 s"),
        ("ranks", "failure", "1 of 2 nodes did not report; n1 did"),
    ]


def test_many_dead_ranks_are_counted() -> None:
    lines = problems([node(0, 64)], [], 1)
    assert len(lines) == 9
    assert lines[-1][2] == "and 56 more ranks"


def test_a_problem_of_several_nodes_is_reported_once() -> None:
    old, full = Finding("CUDA", "failure", "too old", "update"), Finding("disk", "warning", "full", "clean")
    nodes = [node(0, findings=(old, Finding("python", "ok", "3.11"))), node(1, findings=(full,)),
             node(2, findings=(old,)), node(3)]  # fmt: skip
    assert problems(nodes, RANKS) == [("CUDA", "failure", "n1, n3: too old"), ("disk", "warning", "n2: full")]


def test_a_single_rank_does_not_exchange() -> None:
    alone = RankResult(0, "n1", "CPU", "fp32", 50e9)
    assert [f.name for f in all_findings([node(0, 1)], [alone], 1)] == ["ranks", "matmul"]


def test_results_survive_json() -> None:
    for one in (RANKS[0], rank(1, exchange=None)):
        assert RankResult.from_dict(json.loads(json.dumps(dataclasses.asdict(one)))) == one
    full = node(0, findings=(Finding("a", "ok", "b"),), log_tails={3: "x"})
    assert NodeResult.from_dict(json.loads(json.dumps(dataclasses.asdict(full)))) == full


def test_the_arguments_of_srun() -> None:
    job = SlurmJob("launcher-preflight", nodes=3, gpus_per_node=8, partition="gpu", time=5)
    arguments = make_step_arguments(job, ["python", "-m", "x"], 300, {})
    assert arguments == [
        "srun", "--job-name=launcher-preflight", "--nodes=3", "--ntasks-per-node=1", "--ntasks=3",
        "--kill-on-bad-exit=0", "--wait=0", "--quiet", "--immediate=300", "--time=5", "--partition=gpu",
        "--gpus-per-node=8", "python", "-m", "x",
    ]  # fmt: skip
    assert not [w for w in make_step_arguments(job, [], 300, {"SLURM_JOB_ID": "1"}) if w.startswith("--immediate")]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--nodes", "2"], "--nodes: given, but this machine has no srun; run it on the login node"),
        (["--nproc-per-node", "2", "--partition", "gpu"], "--partition: given without --nodes"),
        (["--nodes", "2", "--partition", "a b"], "--partition: given 'a b'; expected a partition's name"),
    ],
)
def test_invalid_options_are_reported_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], text: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("launcher.doctor.checks.CHECKS", ())
    monkeypatch.chdir(tmp_path)
    assert run(["doctor", *arguments]) == 2
    errors = capsys.readouterr().err
    assert "error: no preflight was started: the command line has" in errors
    assert text in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["--nodes", "0"], ["--nproc-per-node", "x"], ["--slow-factor", "1"], ["--nope"]])
def test_numbers_out_of_range_are_usage_errors(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert run(["doctor", *arguments]) == 2
    assert arguments[0] in capsys.readouterr().err


def test_the_message_of_srun_is_shown_if_it_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "srun").write_text("#!/bin/sh\necho 'srun: error: Unable to allocate resources' >&2; exit 1\n")
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr("launcher.doctor.checks.CHECKS", ())
    monkeypatch.chdir(tmp_path)
    assert run(["doctor", "--nodes", "2"]) == 1
    assert (
        "srun started nothing: srun: error: Unable to allocate resources; check free nodes" in capsys.readouterr().err
    )
    assert [path.name for path in tmp_path.iterdir()] == ["srun"], "the folder of the results is removed"
