"""User files have the modes of the user's umask; the run directory is private."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from tests.support.processes import launcher, run
from tests.support.runs import TOY, toy_env

pytestmark = pytest.mark.slow
_USER = """
from pathlib import Path
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from tests.support.toy import Toy, ToyData

Path("own").mkdir(exist_ok=True)
Path("own/imported").touch()

class Module(Toy):
    def training_step(self, batch, batch_idx):
        Path("own/step").touch()
        return super().training_step(batch, batch_idx)

class Data(ToyData):
    def setup(self, stage):
        Path("own/setup").mkdir(exist_ok=True)

class Seen(Callback):
    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        Path("own/saving").touch()

    def on_train_end(self, trainer, pl_module):
        Path(trainer.default_root_dir, "beside").touch()
"""
_CALLBACKS = """[{class_path: user.Seen}, {class_path: lightning.pytorch.callbacks.ModelCheckpoint,
  init_args: {dirpath: own/checkpoints, filename: best, every_n_train_steps: 2}}]"""
_LOGGERS = "[{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: own}}]"


def _modes(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*")}


def test_user_files_get_the_users_umask_and_run_files_are_private(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(_USER)
    arguments = ("fit", *TOY, "--model", "user.Module", "--data", "user.Data", "--devices", "1", "--accelerator", "cpu",
                 "--name", "it", "--trainer.max_steps", "4", "--trainer.log_every_n_steps", "1", "--wandb.mode",
                 "offline", "--trainer.callbacks", _CALLBACKS, "--trainer.logger", _LOGGERS)  # fmt: skip
    umask = 0o027
    before = os.umask(umask)
    try:
        # Not a fork of a process with another umask.
        run(launcher(*arguments), tmp_path, env=toy_env(tmp_path / "trace")).check()
    finally:
        os.umask(before)
    own = _modes(tmp_path / "own")
    wanted = {name: (0o777 if (tmp_path / "own" / name).is_dir() else 0o666) & ~umask for name in own}
    assert own == wanted
    files = {"imported", "step", "setup", "saving", "checkpoints/best.ckpt"}
    assert files <= set(own)
    assert any(name.endswith("metrics.csv") for name in own)
    assert stat.S_IMODE((tmp_path / "trace-0").stat().st_mode) == 0o666 & ~umask
    private = _modes(tmp_path / "runs")
    assert {"it", "it/beside", "it/checkpoints/last.ckpt"} <= set(private)
    assert not [name for name, mode in private.items() if mode & 0o077]
