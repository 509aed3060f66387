"""Every preset trains: a few steps of a user's model, on the preset's number of CPU ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.config.presets import preset_names
from tests.support.processes import launcher, run_warm
from tests.support.runs import events_of, only_run, toy_env, train_on
from tests.support.warm import DEEPSPEED

pytestmark = pytest.mark.slow

_RANKS = {"debug": 1, "single-gpu": 1}
_FEW = ("--accelerator", "cpu", "--wandb.mode", "disabled", "--trainer.max_epochs", "1", "--trainer.max_steps", "2")
_MODEL = ("--model", "tests.support.toy.Toy", "--data", "tests.support.toy.ToyData")


@pytest.mark.case(45)
@pytest.mark.parametrize("preset", preset_names())
def test_a_preset_is_written_and_trains(tmp_path: Path, preset: str) -> None:
    env = toy_env(tmp_path / "trace")
    run_warm(launcher("init", "--yes", "--preset", preset, *_MODEL, *_FEW), tmp_path, env=env).check()
    ranks = _RANKS.get(preset, 2)
    arguments = ("fit", "--config", "run.yaml")
    train_on(ranks, arguments, tmp_path, env, preloaded=DEEPSPEED if preset.startswith("zero") else ()).check()
    (planned,) = events_of(only_run(tmp_path), "planned")
    assert planned["plan"]["world_size"] == ranks


def test_debug_without_a_model_trains_the_demo(tmp_path: Path) -> None:
    run_warm(launcher("init", "--yes", "--preset", "debug"), tmp_path).check()
    output = run_warm(launcher("fit", "--config", "run.yaml", "--accelerator", "cpu"), tmp_path).check().output
    assert "val_loss" in output
    assert "steps       20\n" in output
