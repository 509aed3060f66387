"""A `checkpoint.monitor` that the model does not log."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.config.schema import CheckpointOptions
from launcher.core.errors import ConfigError
from launcher.training.callbacks.run_checkpoint import RunCheckpoint, describe_unknown_monitor

LOGGED = ["train/loss", "val/loss", "val/acc"]


@pytest.mark.parametrize(
    ("monitor", "advice"),
    [
        ("val_loss", "did you mean val/loss?"),
        ("val/los", "did you mean val/loss?"),
        ("valAcc", "did you mean val/acc?"),
        ("f1", "give one of them, or log 'f1' in the model"),
    ],
)
def test_the_logged_metrics_and_a_similar_one_are_reported(monitor: str, advice: str) -> None:
    expected = f"given {monitor!r}, but the model logs train/loss, val/loss, val/acc; {advice}"
    assert describe_unknown_monitor(monitor, LOGGED) == expected


def test_all_ranks_raise_it_after_they_have_saved(tmp_path: Path) -> None:
    val_loop = SimpleNamespace(_has_run=True)
    saved: list[str] = []
    trainer: Any = SimpleNamespace(
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(val_loop=val_loop)),
        save_checkpoint=lambda path, _: saved.append(path),
        checkpoint_callback=None,
        global_step=4,
    )
    checkpoint = RunCheckpoint(CheckpointOptions(monitor="val_loss"), tmp_path)
    with pytest.raises(ConfigError) as raised:
        checkpoint._save_topk_checkpoint(trainer, dict.fromkeys([*LOGGED, "epoch", "step"], 0))
    (problem,) = raised.value.problems
    assert problem.path == "checkpoint.monitor"
    assert "epoch" not in problem.message
    assert saved == [str(tmp_path / "last.ckpt")]
