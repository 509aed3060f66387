"""The random generators continue after a resume."""

from __future__ import annotations

import io
import random
from typing import Any, cast

import numpy as np
import torch

from launcher.checkpoint.rng_state import capture, restore
from launcher.training.resume.random_states import KEY, RandomStates, gather_states


def _draw() -> list[float]:
    # A normal number leaves a second one in the generator, which is part of its state.
    python = [random.random(), random.gauss()]  # noqa: S311 -- no secret
    return [*python, float(np.random.rand()), float(np.random.randn()), float(torch.rand(()))]


def test_draws_after_a_restore_are_the_same() -> None:
    _draw()
    states = capture()
    first = _draw()
    restore(states)
    assert _draw() == first


def test_states_are_loaded_with_weights_only() -> None:
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


def test_training_starts_with_the_states_of_the_checkpoint() -> None:
    checkpoint: dict[str, Any] = {}
    RandomStates(print).on_save_checkpoint(cast(Any, _Trainer()), cast(Any, None), checkpoint)
    first = _draw()
    assert _resume(checkpoint) == []
    assert _draw() == first


def test_missing_states_give_a_notice_and_change_nothing() -> None:
    states = capture()
    first = _draw()
    for checkpoint, world_size, expected in (
        ({}, 1, "no random states"),
        ({KEY: [states] * 4}, 2, "of 4 ranks and this"),
    ):
        restore(states)
        (notice,) = _resume(checkpoint, world_size)
        assert expected in notice
        assert _draw() == first
