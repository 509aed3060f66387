"""`checkpoint.every: auto` on two ranks, which save at the same steps, in the background."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.checkpoint.manifest import find_problem, read_step
from tests.support.runs import TOY, events_of, toy_env, train_on

pytestmark = pytest.mark.slow


def test_two_ranks_save_at_the_chosen_steps_and_the_plan_and_the_events_state_it(tmp_path: Path) -> None:
    own = ("--checkpoint.every", "auto", "--checkpoint.background", "true", "--trainer.max_steps", "60")
    settings = (*TOY, "--data.size", "512", "--global_batch_size", "8", "--name", "it", *own)
    output = train_on(2, settings, tmp_path, toy_env(tmp_path / "trace")).check().output
    run = tmp_path / "runs" / "it"
    assert "Young/Daly interval of the measured cost" in output
    intervals = events_of(run, "checkpoint_interval")
    saved = sorted({event["step"] for event in events_of(run, "checkpoint")})
    assert saved[0] == 11
    assert intervals[0]["step"] == 11
    assert saved[1] == 11 + intervals[0]["steps"]
    assert saved[-1] == 60, "and at the end"
    last = run / "checkpoints" / "last.ckpt"
    assert (find_problem(last), read_step(last)) == (None, 60)
    assert events_of(run, "planned")[0]["plan"]["save_reasons"]
