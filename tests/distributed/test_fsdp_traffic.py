"""The formulas of FSDP2's traffic against what real ranks send: plain `fully_shard` over gloo."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.support.processes import run
from tests.support.runs import REPOSITORY


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_formulas_equal_the_bytes_and_messages_that_four_ranks_send(tmp_path: Path) -> None:
    out = tmp_path / "sent.json"
    launch = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node", "4",
              "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]  # fmt: skip
    env = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    run([*launch, "-m", "tests.support.sent_shards", str(out)], tmp_path, env=env, timeout=180).check()
    found = json.loads(out.read_text())
    assert len(found) == 3 * 3 * 2 * 3 * 2
    assert [case for case in found if case["real"] != case["formula"]] == []
    # Only `hsdp` has replicas.
    assert all((case["real"][1] > 0) is ("hsdp" in case["case"] or "shards" in case["case"]) for case in found)
