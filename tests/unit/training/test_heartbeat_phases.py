"""The phases that a rank reports during a training of Lightning, as its user's hooks see them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from launcher.process.heartbeat import HeartbeatReader
from launcher.process.phases import Phase
from launcher.process.rank_status import RankStatusWriter, beat_path
from launcher.training.callbacks.heartbeat import heartbeat_callbacks
from tests.support.hanging import Hanging, HangingData

HOOKS = (
    "on_sanity_check_end", "on_train_start", "on_train_batch_start", "on_train_batch_end", "on_validation_start",
    "on_validation_batch_start", "on_validation_batch_end", "on_validation_epoch_end", "on_train_epoch_start",
    "on_train_epoch_end", "on_save_checkpoint", "on_train_end",
)  # fmt: skip


class _Recorder(pl.Callback):
    """A callback of the user that notes the reported phase in each hook."""

    def __init__(self, path: Path) -> None:
        self.reader = HeartbeatReader(path)
        self.found: list[tuple[str, Phase]] = []

    def note(self, hook: str) -> None:
        beat = self.reader.read()
        assert beat is not None
        self.found.append((hook, Phase(beat.phase)))


def _make_hook(name: str) -> Any:
    return lambda self, *_, **__: self.note(name)


for each in HOOKS:
    setattr(_Recorder, each, _make_hook(each))


@pytest.fixture
def recorder(tmp_path: Path) -> _Recorder:
    status = RankStatusWriter(tmp_path, 0)
    recorder = _Recorder(beat_path(tmp_path, 0))
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=2, limit_train_batches=3, limit_val_batches=2, logger=False,
        num_sanity_val_steps=1, default_root_dir=tmp_path, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[*heartbeat_callbacks(status), recorder],
    )  # fmt: skip
    trainer.fit(Hanging(pace=0.0), datamodule=HangingData())
    return recorder


def test_each_hook_of_the_user_counts_to_the_phase_that_it_begins(recorder: _Recorder) -> None:
    phases: dict[str, set[Phase]] = {}
    for hook, phase in recorder.found:
        phases.setdefault(hook, set()).add(phase)
    assert phases == {
        "on_sanity_check_end": {Phase.SETUP},
        "on_train_start": {Phase.FIRST_STEP},
        "on_train_epoch_start": {Phase.FIRST_STEP, Phase.EPOCH_START},
        "on_train_batch_start": {Phase.FIRST_STEP, Phase.STEP},
        "on_train_batch_end": {Phase.BETWEEN_STEPS},
        "on_validation_start": {Phase.EVALUATION_START},
        "on_validation_batch_start": {Phase.EVALUATION_STEP},
        "on_validation_batch_end": {Phase.BETWEEN_EVALUATION_STEPS},
        "on_validation_epoch_end": {Phase.EVALUATION_END},
        "on_train_epoch_end": {Phase.EPOCH_END},
        "on_save_checkpoint": {Phase.CHECKPOINT},
        "on_train_end": {Phase.ENDING},
    }


def test_durations_of_each_phase_are_kept_and_the_training_ends_after_its_last_hook(recorder: _Recorder) -> None:
    beat = recorder.reader.read()
    assert beat is not None
    assert (beat.step, beat.phase) == (6, Phase.ENDED)
    assert len(recorder.reader.read_durations(Phase.STEP)) == 5, "all but the first step"
    assert len(recorder.reader.read_durations(Phase.EVALUATION_STEP)) == 5, "one is of the sanity check"
    assert len(recorder.reader.read_durations(Phase.EPOCH_START)) == 1
    assert all(0 < seconds < 60 for phase in Phase for seconds in recorder.reader.read_durations(phase))
