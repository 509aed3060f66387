"""A preflight on real gloo ranks of this machine."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

from launcher.doctor.finding import Finding
from launcher.doctor.preflight_run import add_preflight_arguments, preflight
from tests.support.processes import run
from tests.support.runs import REPOSITORY

pytestmark = pytest.mark.slow


def findings(*arguments: str, how: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> list[Finding]:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    parser = argparse.ArgumentParser()
    add_preflight_arguments(parser)
    command = (sys.executable, "-m", "tests.support.slow_preflight_rank", *how)
    return list(preflight(parser.parse_args([*arguments, "--cpu"]), command))


def test_one_slow_rank_of_three_is_reported_and_all_reduce_and_exchange_are_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    # Other processes may slow down any rank by a small factor; this rank does twenty times the work.
    found = findings("--nproc-per-node", "3", "--slow-factor", "6", how=("slow", "1"), monkeypatch=monkeypatch)
    slow = [f for f in found if f.status != "ok"]
    assert [f.name for f in slow] == ["matmul"], found
    assert slow[0].found.startswith("rank 1 (")
    assert "times slower than the median" in slow[0].found
    assert [f.name for f in found if f.status == "ok"] == ["ranks", "matmul", "all-reduce", "exchange"]
    assert list(tmp_path.iterdir()) == [], "nothing is left of it"


def test_a_killed_rank_is_a_failure_with_its_last_lines_and_the_others_are_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("launcher.doctor.preflight_node._GRACE", 1.0)
    found = findings("--nproc-per-node", "2", how=("die", "1"), monkeypatch=monkeypatch)
    dead = next(f for f in found if f.found.startswith("rank 1 ("))
    assert dead.status == "failure"
    assert "did not complete the matmul:" in dead.found
    assert "RuntimeError: CUDA error: an illegal memory access was encountered\nexit code 1" in dead.found
    assert "ranks" not in [f.name for f in found if f.status == "ok"]


def test_the_command_with_one_rank(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launcher", "doctor", "--nproc-per-node", "1", "--cpu"]
    output = run(command, tmp_path, env={"PYTHONPATH": str(REPOSITORY)}).output
    assert "ok       matmul" in output
    assert "GFLOP/s a rank in fp32" in output
