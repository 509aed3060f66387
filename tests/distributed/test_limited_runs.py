"""A plan's pick under a real limit of memory: real gloo ranks under `RLIMIT_DATA`."""

from __future__ import annotations

from pathlib import Path

import pytest

from strategies.candidates import CANDIDATES, DDP
from tests.benchmarks.oracle import plan, profile_of
from tests.limited_runs import Case, ranks_ready, run_case


@pytest.mark.slow
@pytest.mark.timeout(290)
def test_what_the_plan_picks_lives_under_the_limit_that_ddp_dies_of(tmp_path: Path) -> None:
    profile = profile_of("deep_mlp", 16)
    needs = plan(profile, 1 << 40).of("ddp")
    assert needs is not None
    # More than DDP is expected to need, less than it does beside its bookkeeping.
    limit = int(needs.memory.total * 1.02)
    picked = plan(profile, limit).pick
    assert picked is not None
    candidate = next(c for c in CANDIDATES if c.name == picked)
    assert candidate.stage > 0
    found = []
    with ranks_ready() as context:
        for number, tried in enumerate((candidate, DDP)):
            folder = tmp_path / str(number)
            folder.mkdir()
            case = Case("deep_mlp", tried, 16, limit_bytes=limit, steps=2)
            found.append(run_case(context, case, folder, timeout=120))
    lives, dies = found
    assert lives.lives, lives.reason
    assert not dies.lives
    assert "memory" in dies.reason
