"""Under `torchrun --max-restarts` a killed rank is replaced, and the run continues from its last step."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.processes import run_warm, torchrun
from tests.support.runs import PERSISTENT, TOY, WORKERS, events_of, only_run, read_trace, toy_env

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_replaced_and_the_run_continues_in_its_directory(tmp_path: Path, victim: int) -> None:
    arguments = (*TOY, "--global_batch_size", "8", "--trainer.max_epochs", "2", "--checkpoint.every_n_steps", "2",
                 "--model.kill_at", "5", "--model.by_rank", str(victim),
                 *(PERSISTENT if victim else WORKERS))  # fmt: skip
    command = torchrun(2, *arguments, options=("--max-restarts", "1"))
    run_warm(command, tmp_path, env=toy_env(tmp_path / "trace"), timeout=150).check()

    directory = only_run(tmp_path)
    attempts = events_of(directory, "run_started")
    assert [event["restart_count"] for event in attempts] == [0, 1]
    assert attempts[0]["attempt"] != attempts[1]["attempt"]
    assert attempts[0]["wandb_id"] == attempts[1]["wandb_id"]
    # Step 5 had started: it is done again, then the rest follows, each sample once in an epoch.
    steps = [step for step, _, _ in read_trace(tmp_path / "trace", 1 - victim)]
    assert steps == [0, 1, 2, 3, 4, 5, *range(5, 16)]
    assert events_of(directory, "finished")[0]["step"] == 16
    assert (directory / "logs" / "rank-0.1.log").exists(), "the first attempt's log is kept"
