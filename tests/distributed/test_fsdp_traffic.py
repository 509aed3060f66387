"""The formulas of FSDP2's traffic against what real ranks send: plain `fully_shard` over gloo."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.program_ranks import run_program
from tests.support.sent_shards import CASES, MODELS, SENDING


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_formulas_equal_the_bytes_and_messages_that_four_ranks_send(tmp_path: Path) -> None:
    found = run_program("tests.support.sent_shards", tmp_path, ranks=4, timeout=180)[0]
    assert len(found) == len(MODELS) * len(SENDING) * len(CASES) * 2
    assert {case: values for case, values in found.items() if values[0] != values[1]} == {}
    # Only `hsdp` has replicas.
    assert all((real[1] > 0) is ("hsdp" in case or "shards" in case) for case, (real, _) in found.items())
