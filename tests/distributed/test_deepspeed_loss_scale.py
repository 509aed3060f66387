"""DeepSpeed's loss scale in a real fp16 training: read on every rank, logged from rank zero."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.runs import TOY, events_of, toy_env, train_on
from tests.support.warm import DEEPSPEED

pytestmark = pytest.mark.slow


@pytest.mark.case(43)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_overflow_under_zero_skips_a_step_halves_the_scale_and_is_logged_for_both_ranks(
    tmp_path: Path, stage: int
) -> None:
    arguments = (*TOY, "--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "1", "--precision", "16-mixed",
                 "--strategy", f"deepspeed_stage_{stage}", "--name", "it")  # fmt: skip
    # DeepSpeed accepts fp16 only on CPUs with instructions for it; the arithmetic is the same without them.
    env = {**toy_env(tmp_path / "trace"), "LAUNCHER_TEST_DEEPSPEED_CPU_FP16": "1"}
    train_on(2, arguments, tmp_path, env, preloaded=DEEPSPEED).check()

    seen = events_of(tmp_path / "runs" / "it", "ranks")
    assert [event["step"] for event in seen] == list(range(1, 17))
    scales = [event["loss_scale"] for event in seen]
    skipped = [event["skipped_steps"] for event in seen]
    # The toy's first gradients overflow at DeepSpeed's first scale of 65536.
    assert skipped[0] == [1, 1]
    assert all(one == two for one, two in [*scales, *skipped])
    assert skipped[-1][0] < 8
    # With DeepSpeed's hysteresis of 2 the first overflow keeps the scale; each later one halves it.
    for (scale, _), (count, _) in zip(scales, skipped, strict=True):
        assert scale == 65536 / 2 ** (count - 1)
    assert not events_of(tmp_path / "runs" / "it", "alert")
