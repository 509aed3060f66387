"""A signal that a scheduler sends to every process of a job: the ranks save."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.processes import launcher, run_warm
from tests.support.runs import PERSISTENT, TOY, events_of, read_trace, toy_env

pytestmark = pytest.mark.slow
MODEL = ("fit", *TOY, "--model", "tests.support.slurm_paced.Scheduled", *PERSISTENT, "--accelerator", "cpu",
         "--nproc-per-node", "2", "--global_batch_size", "8", "--trainer.max_epochs", "2", "--name", "it")  # fmt: skip


def test_fork_server_and_loader_workers_survive_a_signal_to_every_process(tmp_path: Path) -> None:
    def train(folder: str, *arguments: str, code: int = 0) -> None:
        (tmp_path / folder).mkdir(exist_ok=True)
        env = toy_env(tmp_path / f"trace-{folder}")
        run_warm(launcher(*MODEL, *arguments), tmp_path / folder, env=env, timeout=150).check(code)

    train("whole")
    train("parts", "--model.term_at", "9", code=143)
    stopped = events_of(tmp_path / "parts/runs/it", "interrupted")
    assert {event["rank"] for event in stopped} == {0, 1}
    train("parts", "--resume", "auto")
    for rank in range(2):
        assert read_trace(tmp_path / "trace-parts", rank) == read_trace(tmp_path / "trace-whole", rank)
