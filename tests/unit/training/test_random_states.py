"""Random generators that go on where they were."""

from __future__ import annotations

import io
import random
from typing import Any, cast

import numpy as np
import torch

from launcher.checkpoint.rng_state import capture, restore
from launcher.training.resume.random_states import KEY, RandomStates, gather_states


def _draw() -> list[float]:
    # A normal number leaves a second one in the generator: that is state too.
    python = [random.random(), random.gauss()]  # noqa: S311 -- no secret
    return [*python, float(np.random.rand()), float(np.random.randn()), float(torch.rand(()))]


def test_what_is_drawn_after_a_restore_is_what_would_have_been_drawn() -> None:
    _draw()
    states = capture()
    first = _draw()
    restore(states)
    assert _draw() == first


def test_the_states_go_through_a_file_that_runs_nothing() -> None:
    buffer = io.BytesIO()
    torch.save(gather_states(capture(), torch.device("cpu")), buffer)
    first = _draw()
    (loaded,) = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    restore(loaded)
    assert _draw() == first


class _Trainer:
    world_size = 1
    global_rank = 0

    class strategy:  # noqa: N801 -- Lightning's name
        root_device = torch.device("cpu")


def _resume(checkpoint: dict[str, Any], world_size: int = 1) -> list[str]:
    notices: list[str] = []
    callback, trainer, module = RandomStates(notices.append), cast(Any, _Trainer()), cast(Any, None)
    trainer.world_size = world_size
    callback.on_load_checkpoint(trainer, module, checkpoint)
    callback.on_train_start(trainer, module)
    return notices


def test_the_training_begins_with_the_checkpoints_states() -> None:
    checkpoint: dict[str, Any] = {}
    RandomStates(print).on_save_checkpoint(cast(Any, _Trainer()), cast(Any, None), checkpoint)
    first = _draw()
    assert _resume(checkpoint) == []
    assert _draw() == first


def test_a_checkpoint_without_states_or_of_other_ranks_says_so_and_changes_nothing() -> None:
    states = capture()
    first = _draw()
    for checkpoint, world_size, said in (
        ({}, 1, "no random states"),
        ({KEY: [states] * 4}, 2, "of 4 ranks and this"),
    ):
        restore(states)
        (notice,) = _resume(checkpoint, world_size)
        assert said in notice
        assert _draw() == first
