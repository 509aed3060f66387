"""A run that continues on another number of ranks says that its batch changes."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import pytest

from launcher.config.schema import RunConfig
from launcher.planning.plan import make_plan
from launcher.training.callbacks.run_checkpoint import PlanRecorder
from tests.support.rank_threads import CPU, ranks


@pytest.mark.parametrize(
    ("before", "now", "micro", "notice"),
    [
        (2, 2, 50, None),
        (2, 1, 50, ("the checkpoint was trained on 2 ranks and this run has 1: the batch of a step changes from 100 to "
                   "50 samples; continue on 2 ranks, or set global_batch_size to 100")),
        (1, 4, 8, ("the checkpoint was trained on 1 rank and this run has 4: the batch of a step changes from 8 to 32 "
                  "samples; continue on 1 rank, or set global_batch_size to 8")),
        (2, 3, 8, ("the checkpoint was trained on 2 ranks and this run has 3: the batch of a step changes from 16 to "
                  "24 samples; continue on 2 ranks to keep it")),
        (2, 1, None, ("the checkpoint was trained on 2 ranks and this run has 1: the batch of a step changes; continue "
                     "on 2 ranks, or set global_batch_size to the former size")),
    ],
)  # fmt: skip
@pytest.mark.parametrize("keeps_batch", [True, False])
def test_another_batch_of_a_resumed_run_is_reported(
    before: int, now: int, micro: int | None, notice: str | None, keeps_batch: bool
) -> None:
    def record(world_size: int, notices: list[str]) -> PlanRecorder:
        plan = make_plan(RunConfig(), ranks(*[CPU] * world_size))
        plan = dataclasses.replace(plan, batch=dataclasses.replace(plan.batch, micro_batch_size=micro))
        return PlanRecorder(plan, notices.append, keeps_batch=keeps_batch)

    none = cast(Any, None)
    checkpoint: dict[str, Any] = {}
    record(before, []).on_save_checkpoint(none, none, checkpoint)
    notices: list[str] = []
    record(now, notices).on_load_checkpoint(none, none, checkpoint)
    assert notices == ([] if notice is None or keeps_batch else [notice])


@pytest.mark.parametrize("checkpoint", [{}, {"launcher": "16-mixed"}, {"launcher": {"world_size": None}}])
def test_a_checkpoint_without_a_record_of_its_ranks_has_no_notice(checkpoint: dict[str, Any]) -> None:
    notices: list[str] = []
    recorder = PlanRecorder(make_plan(RunConfig(), ranks(CPU)), notices.append, keeps_batch=False)
    recorder.on_load_checkpoint(cast(Any, None), cast(Any, None), checkpoint)
    assert notices == []
