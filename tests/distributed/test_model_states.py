"""The memory formulas against what real ranks hold: plain DDP and plain DeepSpeed over gloo."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.live_comparison import compare


@pytest.mark.slow
@pytest.mark.timeout(290)
def test_formulas_equal_the_bytes_that_two_ranks_hold_under_ddp_and_every_zero_stage(
    tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    cache = pytestconfig.cache
    # HOME is new for each test; DeepSpeed's compiled ops are shared.
    extensions = cache.mkdir("torch_extensions") if cache is not None else tmp_path
    models = ("odd", "gpt", "frozen", "conv")
    found = list(compare(models, (0, 1, 2, 3), ("fp32", "bf16"), 2, tmp_path, extensions, 270))
    assert len(found) == 4 * 4 * 2 * 4
    assert [case for case in found if case.live != case.formula] == []
    # Every part has a value to compare.
    assert all(any(case.live > 0 for case in found if case.part == part) for part in {case.part for case in found})
