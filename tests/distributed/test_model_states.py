"""The memory formulas against what real ranks hold: plain DDP, plain DeepSpeed and FSDP2 over gloo."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from tests.support.live_comparison import compare
from tests.support.live_shards import VARIANTS
from tests.support.peak_estimates import compare_peaks


@pytest.mark.slow
@pytest.mark.timeout(290)
def test_formulas_equal_the_bytes_that_two_ranks_hold_under_ddp_and_every_zero_stage(
    tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    # None if pytest runs without its cache plugin.
    cache = getattr(pytestconfig, "cache", None)
    # HOME is new for each test; DeepSpeed's compiled ops are shared.
    extensions = cache.mkdir("torch_extensions") if cache is not None else tmp_path
    models = ("odd", "gpt", "frozen", "conv")
    found = list(compare(models, (0, 1, 2, 3), ("fp32", "bf16"), 2, tmp_path, extensions, 270))
    assert len(found) == 4 * 4 * 2 * 4
    assert [case for case in found if case.live != case.formula] == []
    # Every part has a value to compare.
    assert all(any(case.live > 0 for case in found if case.part == part) for part in {case.part for case in found})


@pytest.mark.slow
@pytest.mark.timeout(170)
def test_formulas_equal_the_bytes_that_two_ranks_hold_under_fsdp2(tmp_path: Path) -> None:
    # `separable` has batch norms, which mixed precision does not shard.
    models = ("odd", "gpt", "frozen", "separable")
    found = list(compare(models, VARIANTS, ("fp32", "bf16", "mixed"), 2, tmp_path, tmp_path, 150))
    assert len(found) == len(models) * 3 * (3 * 4 + 1)
    assert [case for case in found if case.live != case.formula] == []
    assert all(any(case.live > 0 for case in found if case.part == part) for part in ("gradients", "all"))


@pytest.mark.slow
@pytest.mark.timeout(170)
def test_peak_of_fsdp2_on_two_ranks_is_the_estimate(tmp_path: Path) -> None:
    stages = ("fsdp2", "fsdp2_grad_op", "hsdp+last", "fsdp2+every", "fsdp2+checkpoint")
    found = list(compare_peaks((("odd", "gpt", "frozen"), stages, ("fp32", "mixed")), 2, tmp_path, 150))
    assert len(found) == 3 * 5 * 2
    # A thread of gloo may still hold a buffer.
    assert {case: error for case, error in found if abs(error) > 0.02} == {}
    assert statistics.median(abs(error) for _, error in found) < 0.001
