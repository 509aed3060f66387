"""The same seed and global batch give the same training on any number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.runs import TOY, read_trace, toy_env, train_on

pytestmark = pytest.mark.slow
SETTINGS = (*TOY, "--global_batch_size", "12", "--data.size", "66", "--trainer.max_epochs", "3")


def _steps(trace: Path, ranks: int) -> list[tuple[set[int], float]]:
    """For each optimizer step: the samples of all ranks, and their mean loss."""
    steps: dict[int, list[tuple[list[int], float]]] = {}
    for rank in range(ranks):
        for step, samples, loss in read_trace(trace, rank):
            steps.setdefault(step, []).append((samples, loss))
    return [
        ({n for samples, _ in parts for n in samples}, sum(loss for _, loss in parts) / len(parts))
        for _, parts in sorted(steps.items())
    ]


def test_the_loss_curve_is_the_same_on_one_two_and_three_ranks(tmp_path: Path) -> None:
    curves: dict[int, list[tuple[set[int], float]]] = {}
    for ranks in (1, 2, 3):
        trace = tmp_path / f"trace{ranks}"
        train_on(ranks, SETTINGS, tmp_path, toy_env(trace)).check()
        curves[ranks] = _steps(trace, ranks)

    # 66 samples are 5 global batches of 12; batch_size 4 is the micro batch, so one rank accumulates 3 times.
    assert len(curves[1]) == 15
    for ranks in (2, 3):
        for (alone, alone_loss), (shared, shared_loss) in zip(curves[1], curves[ranks], strict=True):
            assert shared == alone
            assert len(alone) == 12
            assert shared_loss == pytest.approx(alone_loss, rel=1e-4, abs=1e-5)
