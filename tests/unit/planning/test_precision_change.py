"""Precision of the checkpoint on a resume: reported, kept by 'auto' if all ranks can, or an error."""

from __future__ import annotations

import json
from typing import Any

import pytest

from launcher.checkpoint.precision import CheckpointPrecision
from launcher.config.schema import RunConfig
from launcher.core.errors import PlanError
from launcher.planning.plan import Plan, make_plan
from strategies.precision import Precision
from tests.support.rank_threads import CPU, H100, V100, ranks


def was(precision: Precision | None, notice: str | None = None) -> CheckpointPrecision:
    return CheckpointPrecision(precision, notice)


@pytest.mark.case(21)
@pytest.mark.parametrize(
    ("before", "now", "scale"),
    [
        (Precision.FP16_MIXED, "bf16-mixed", "; its loss scale is no longer needed"),
        (Precision.BF16_MIXED, "16-mixed", "; the loss scale starts at its initial value"),
        (Precision.FP32_TRUE, "bf16-mixed", ""),
    ],
)
def test_precision_change_gives_one_notice_with_both_names(before: Precision, now: str, scale: str) -> None:
    plan = make_plan(RunConfig(precision=now), ranks(H100, H100), was(before))
    assert (plan.precision, plan.precision_before) == (now, before.value)
    assert plan.notices == (f"the checkpoint was trained in {before}, this run trains in {now}{scale}",)
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@pytest.mark.case(21)
def test_precision_change_error_names_both_and_two_fixes() -> None:
    config = RunConfig(precision="bf16-mixed", on_precision_change="error")
    with pytest.raises(PlanError) as caught:
        make_plan(config, ranks(H100), was(Precision.FP16_MIXED))
    assert caught.value.exit_code == 2
    text = str(caught.value)
    assert "the checkpoint was trained in 16-mixed, this run trains in bf16-mixed" in text
    assert "set `precision: 16-mixed`, or `on_precision_change: notice`" in text


@pytest.mark.parametrize("on_change", ["notice", "error"])
@pytest.mark.parametrize("checkpoint", [None, was(None), was(Precision.BF16_MIXED)], ids=["none", "silent", "same"])
def test_same_precision_gives_no_notice_and_no_error(on_change: Any, checkpoint: CheckpointPrecision | None) -> None:
    config = RunConfig(precision="bf16-mixed", on_precision_change=on_change)
    plan = make_plan(config, ranks(H100), checkpoint)
    assert (plan.notices, plan.precision_before) == ((), None)


@pytest.mark.case(22)
@pytest.mark.parametrize(
    ("before", "devices"),
    [
        (Precision.FP16_MIXED, (H100, H100)),
        (Precision.FP32_TRUE, (H100, V100)),
        (Precision.FP64_TRUE, (V100,)),
        (Precision.BF16_TRUE, (H100,)),
        (Precision.BF16_MIXED, (CPU, CPU)),
    ],
)
def test_auto_uses_the_checkpoint_precision_if_every_rank_can(before: Precision, devices: Any) -> None:
    plan = make_plan(RunConfig(), ranks(*devices), was(before))
    assert (plan.precision, plan.precision_before, plan.notices) == (before.value, None, ())
    assert plan.precision_reasons[0] == (f"precision auto: the checkpoint was trained in {before}, and every rank can")
    assert plan.has_loss_scale is (before is Precision.FP16_MIXED)


@pytest.mark.case(22)
@pytest.mark.parametrize(
    ("before", "devices", "now", "unable"),
    [
        (Precision.BF16_MIXED, (H100, V100, H100), "16-mixed", "rank 1 (node1, Tesla V100)"),
        (Precision.BF16_TRUE, (V100,), "16-mixed", "rank 0 (node0, Tesla V100)"),
    ],
)
def test_plan_names_the_rank_that_cannot_run_the_checkpoint_precision(
    before: Precision, devices: Any, now: str, unable: str
) -> None:
    plan = make_plan(RunConfig(), ranks(*devices), was(before))
    assert (plan.precision, plan.precision_before) == (now, before.value)
    assert f"precision auto: not the checkpoint's {before}, which {unable} cannot run; " in plan.precision_reasons[0]
    (notice,) = plan.notices
    assert notice.startswith(f"the checkpoint was trained in {before}, this run trains in {now}")


@pytest.mark.case(22)
def test_request_takes_precedence_over_the_checkpoint() -> None:
    for config in (RunConfig(precision="32"), RunConfig(use_amp=False)):
        plan = make_plan(config, ranks(H100), was(Precision.BF16_MIXED))
        assert (plan.precision, plan.precision_before) == ("32-true", "bf16-mixed")


def test_problem_of_the_checkpoint_record_is_the_first_notice() -> None:
    plan = make_plan(RunConfig(precision="bf16"), ranks(H100), was(Precision.FP16_MIXED, "the record is damaged"))
    assert plan.notices[0] == "the record is damaged"
    assert len(plan.notices) == 2


@pytest.mark.case(19)
def test_user_precision_plugin_gives_custom_precision() -> None:
    plan = make_plan(RunConfig(), ranks(CPU, CPU, precision_plugin="theirs.Own"), was(Precision.BF16_MIXED))
    assert (plan.precision, plan.has_loss_scale, plan.precision_before, plan.notices) == ("custom", False, None, ())
    assert plan.precision_reasons == ("the user's own theirs.Own decides",)


@pytest.mark.case(19)
@pytest.mark.parametrize("config", [RunConfig(precision="bf16-mixed"), RunConfig(use_amp=True)])
def test_precision_with_a_user_plugin_gives_a_notice(config: RunConfig) -> None:
    plan = make_plan(config, ranks(V100, precision_plugin="theirs.Own"))
    assert plan.notices == ("precision and use_amp are not used: the user's own theirs.Own decides",)
