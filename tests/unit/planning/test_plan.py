"""`launcher.planning.plan`: one plan for dry run and training, or an error with all problems."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.agreement.facts import Agreement
from launcher.config.schema import RunConfig, TrainerOptions
from launcher.core.errors import PlanError
from launcher.planning.plan import Plan, make_plan
from tests.support.rank_threads import CPU, H100, V100, ranks


def refusal(config: RunConfig, agreement: Agreement) -> str:
    with pytest.raises(PlanError) as caught:
        make_plan(config, agreement)
    return str(caught.value)


def test_plan_states_choices_and_reasons() -> None:
    plan = make_plan(RunConfig(global_batch_size=48), ranks(H100, H100, V100, batch_size=8))
    assert (plan.strategy.name, plan.strategy.backend, plan.precision) == ("ddp", "nccl", "16-mixed")
    assert plan.has_loss_scale
    assert plan.devices == {"NVIDIA H100": 2, "Tesla V100": 1}
    assert (plan.world_size, plan.num_nodes, plan.hosts) == (3, 3, ("node0", "node1", "node2"))
    assert any("rank 2 (node2, Tesla V100)" in reason for reason in plan.precision_reasons)
    assert plan.batch_reasons == ("global_batch_size 48 = 8 samples x 3 ranks x 2 accumulated",)


@pytest.mark.parametrize(("world", "micro", "accumulate"), [(1, 16, 32), (2, 16, 16), (64, 8, 1)])
def test_global_batch_is_independent_of_rank_count(world: int, micro: int, accumulate: int) -> None:
    plan = make_plan(RunConfig(global_batch_size=512), ranks(*[CPU] * world, batch_size=16))
    assert (plan.batch.micro_batch_size, plan.batch.accumulate) == (micro, accumulate)
    assert plan.batch.global_batch_size == 512
    assert plan.to_dict()["batch"]["global_batch_size"] == 512


def test_smaller_micro_batch_has_a_reason() -> None:
    plan = make_plan(RunConfig(global_batch_size=60), ranks(CPU, CPU, batch_size=8))
    assert plan.batch_reasons[0].endswith("(the data's batch_size 8 is the most a rank takes at once)")


def test_batch_grows_with_ranks_without_a_global_size() -> None:
    config = RunConfig(trainer=TrainerOptions(accumulate_grad_batches=3))
    plan = make_plan(config, ranks(CPU, CPU, batch_size=4))
    assert (plan.batch.micro_batch_size, plan.batch.accumulate, plan.batch.global_batch_size) == (4, 3, 24)
    assert "set global_batch_size" in plan.batch_reasons[0]
    assert make_plan(config, ranks(CPU)).batch.global_batch_size is None


def test_fixed_accumulation_is_kept() -> None:
    config = RunConfig(global_batch_size=48, trainer=TrainerOptions(accumulate_grad_batches=3))
    assert make_plan(config, ranks(CPU, CPU)).batch.micro_batch_size == 8


def test_accumulation_that_overrides_the_batch_size_has_a_reason() -> None:
    config = RunConfig(global_batch_size=256, trainer=TrainerOptions(accumulate_grad_batches=2))
    plan = make_plan(config, ranks(CPU, batch_size=4))
    assert (plan.batch.micro_batch_size, plan.batch.accumulate) == (128, 2)
    (reason,) = plan.batch_reasons
    assert reason.endswith("(trainer.accumulate_grad_batches 2 overrides the data's batch_size 4)")
    assert "overrides" not in make_plan(config, ranks(CPU, batch_size=128)).batch_reasons[0]


def test_uneven_split_lists_nearest_sizes() -> None:
    text = refusal(RunConfig(global_batch_size=100), ranks(*[CPU] * 64))
    assert "global_batch_size 100 cannot be shared by 64 ranks" in text
    assert "64 or 128, or 50 or 100 ranks" in text


def test_precision_that_a_rank_cannot_run_names_the_rank() -> None:
    text = refusal(RunConfig(precision="bf16-mixed"), ranks(H100, V100))
    assert "rank 1 (node1, Tesla V100)" in text
    assert "`precision: 16-mixed`" in text


def test_fallback_gives_a_notice() -> None:
    plan = make_plan(RunConfig(precision="bf16", precision_fallback=True), ranks(H100, V100))
    assert (plan.precision, len(plan.notices)) == ("16-mixed", 1)


def test_use_amp_on_cpu_gives_a_notice() -> None:
    plan = make_plan(RunConfig(use_amp=True), ranks(CPU))
    assert (plan.precision, len(plan.notices), plan.has_loss_scale) == ("32-true", 1, False)


def test_all_problems_are_reported_together() -> None:
    config = RunConfig(global_batch_size=5, precision="bf16-mixed", strategy="single_device")
    text = refusal(config, ranks(H100, V100))
    assert text.startswith("no plan meets the config:\n  ")
    assert text.count("\n  ") == 3
    for part in (
        "global_batch_size 5 cannot",
        "precision bf16-mixed was requested",
        "strategy single_device was requested",
    ):
        assert part in text


def test_mixed_device_kinds_are_rejected() -> None:
    assert "the ranks train on cpu and cuda" in refusal(RunConfig(), ranks(H100, CPU))


@pytest.mark.parametrize(
    ("setting", "declared", "static"),
    [("auto", True, True), ("auto", False, False), (True, False, True), (False, True, False)],
)
def test_config_takes_precedence_over_the_model_for_static_graph(setting: Any, declared: bool, static: bool) -> None:
    plan = make_plan(RunConfig(static_graph=setting), ranks(CPU, CPU, static_graph=declared))
    assert plan.strategy.static_graph is static


def test_static_graph_is_off_with_accumulation() -> None:
    plan = make_plan(RunConfig(global_batch_size=64), ranks(CPU, CPU, batch_size=8, static_graph=True))
    assert (plan.batch.accumulate, plan.strategy.static_graph) == (4, False)


def test_assumed_ranks_are_marked() -> None:
    agreement = ranks(CPU, CPU)
    assert not make_plan(RunConfig(), agreement).assumed
    assert make_plan(RunConfig(), Agreement(agreement.facts, assumed=True)).assumed


@settings(deadline=None)
@given(
    st.sampled_from(["auto", "16-mixed", "bf16-mixed", "32", "64"]),
    st.none() | st.booleans(),
    st.sampled_from(["auto", "ddp", "ddp_find_unused_parameters_true"]),
    st.none() | st.integers(1, 64),
    st.integers(1, 8),
    st.sampled_from([CPU, V100, H100]),
    st.none() | st.integers(1, 16),
)
def test_plan_survives_json(
    precision: str, use_amp: bool | None, strategy: str, size: int | None, world: int, device: Any, micro: int | None
) -> None:
    config = RunConfig(
        precision=precision,
        use_amp=use_amp,
        strategy=strategy,
        precision_fallback=True,
        global_batch_size=None if size is None else size * world,
    )
    plan = make_plan(config, ranks(*[device] * world, batch_size=micro))
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert make_plan(config, ranks(*[device] * world, batch_size=micro)) == plan
