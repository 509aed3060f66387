"""Warnings of Lightning that do not help when a checkpoint is only evaluated."""

from __future__ import annotations

import warnings
from pathlib import Path

from lightning.pytorch.callbacks import ModelCheckpoint

from launcher.training.quiet_lightning import EVALUATION_WARNINGS, quiet_lightning


def test_another_directory_of_checkpoints_is_not_reported(tmp_path: Path) -> None:
    before, now = ModelCheckpoint(tmp_path / "version_1"), ModelCheckpoint(tmp_path / "version_3")
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        now.load_state_dict(before.state_dict())
        assert len(shown) == 1, "Lightning warns of it"
        with quiet_lightning(*EVALUATION_WARNINGS):
            now.load_state_dict(before.state_dict())
    assert len(shown) == 1
