"""A LightningCLI file, trained by LightningCLI and by the launcher."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.logged_rows import users_rows
from tests.support.processes import run_warm
from tests.support.runs import REPOSITORY, train_on

pytestmark = pytest.mark.slow
_FILE = """
seed_everything: true
model:
  class_path: tests.support.cli_zoo.Plain
data:
  class_path: tests.support.cli_zoo.Data
  init_args: {batch_size: "2"}
optimizer:
  class_path: torch.optim.Adam
  init_args: {lr: "0.25"}
lr_scheduler: {class_path: StepLR, init_args: {step_size: 1, gamma: 0.5}}
trainer:
  accelerator: cpu
  devices: "1"
  max_epochs: 3
  log_every_n_steps: 1
  enable_progress_bar: false
  strategy:
    class_path: lightning.pytorch.strategies.DDPStrategy
    init_args: {find_unused_parameters: true, bucket_cap_mb: 1, process_group_backend: gloo}
  profiler: {class_path: SimpleProfiler, init_args: {dirpath: ., filename: profile}}
  logger: {class_path: CSVLogger, init_args: {save_dir: NAME, name: csv, version: 0}}
  callbacks:
    - class_path: EarlyStopping
      init_args: {monitor: loss, patience: 99}
"""
_CLI = """
import lightning.pytorch as pl
from lightning.pytorch.cli import LightningCLI
LightningCLI(pl.LightningModule, pl.LightningDataModule, subclass_mode_model=True, subclass_mode_data=True,
             save_config_callback=None)
"""
_ADDED = ("--trainer.callbacks+=LearningRateMonitor", "--trainer.callbacks.logging_interval=epoch")


def _rows(folder: Path) -> list[dict[str, str]]:
    return users_rows(folder / "csv" / "version_0" / "metrics.csv")


def _weights(checkpoint: Path) -> dict[str, list[float]]:
    found: dict[str, Any] = torch.load(checkpoint, weights_only=True)["state_dict"]
    return {name: weight.tolist() for name, weight in found.items()}


def test_the_weights_and_the_logged_rows_are_the_same(tmp_path: Path) -> None:
    env = {"PYTHONPATH": str(REPOSITORY)}
    for name in ("theirs", "ours"):
        (tmp_path / f"{name}.yaml").write_text(_FILE.replace("NAME", name))
    cli = [sys.executable, "-c", _CLI, "fit", "--config", "theirs.yaml", *_ADDED]
    run_warm(cli, tmp_path, env=env).check()
    (tmp_path / "fit-profile.txt").unlink()
    arguments = ["fit", "--config", "ours.yaml", *_ADDED, "--wandb.mode", "disabled", "--name", "it"]
    ours = train_on(1, arguments, tmp_path, env).check()

    (checkpoint,) = (tmp_path / "theirs").glob("csv/version_0/checkpoints/*.ckpt")
    assert _weights(tmp_path / "runs" / "it" / "checkpoints" / "last.ckpt") == _weights(checkpoint)
    expected, rows = _rows(tmp_path / "theirs"), _rows(tmp_path / "ours")
    assert expected
    assert [{key: row.get(key) for key in expected[0]} for row in rows] == expected
    assert "own options of DDP: bucket_cap_mb" in ours.output
    assert "Action" in (tmp_path / "fit-profile.txt").read_text()
