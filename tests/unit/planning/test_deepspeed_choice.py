"""DeepSpeed's variants by Lightning's names: chosen only on request, with the config of each."""

from __future__ import annotations

from typing import Any

import pytest
from lightning.pytorch.strategies import StrategyRegistry

from launcher.config.schema import RunConfig, TrainerOptions
from launcher.core.errors import PlanError
from launcher.planning.plan import Plan, make_plan
from strategies.choice import StrategyError, choose_strategy
from strategies.deepspeed_config import CPU_BUCKET, GPU_BUCKET, BatchAndClip, zero_config
from strategies.registry import list_zero_variants
from tests.support.rank_threads import CPU, H100
from tests.unit.planning.test_plan import ranks, refusal

VARIANTS = list_zero_variants()
PLANNED = BatchAndClip(world_size=4, micro_batch_size=8, accumulate=3, gradient_clip_val=0.5)


def choose(name: str, world: int = 2, kind: str = "cuda") -> Any:
    return choose_strategy(name, world_size=world, device_kind=kind, accumulate=1, model_has_static_graph=True)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_match_lightning_names_and_settings(name: str) -> None:
    meant = StrategyRegistry[name]["init_params"]
    variant = VARIANTS[name]
    assert variant.stage == meant["stage"]
    assert (variant.offload_optimizer is not None) == meant.get("offload_optimizer", False)
    assert (variant.offload_parameters is not None) == meant.get("offload_parameters", False)
    nvme = "nvme" in (meant.get("offload_optimizer_device"), meant.get("offload_params_device"))
    assert (variant.offload_optimizer == "nvme") == nvme


@pytest.mark.parametrize(("kind", "backend"), [("cpu", "gloo"), ("cuda", "nccl")])
def test_requested_variant_is_chosen_with_reasons(kind: str, backend: str) -> None:
    choice = choose("deepspeed_stage_2", world=4, kind=kind)
    assert (choice.name, choice.backend) == ("deepspeed_stage_2", backend)
    assert "each rank keeps 1/4 of the optimizer's states, the gradients" in choice.reasons[1]
    assert any("debugging" in reason for reason in choice.reasons) == (kind == "cpu")


def test_auto_does_not_choose_deepspeed_without_memory() -> None:
    assert choose("auto", world=8).name == "ddp"


@pytest.mark.parametrize("name", [n for n in VARIANTS if not VARIANTS[n].offloads])
def test_stage_with_one_rank_is_rejected(name: str) -> None:
    with pytest.raises(StrategyError, match=rf"{name} shards .* but there is one rank; start several"):
        choose(name, world=1)


@pytest.mark.parametrize("name", [n for n in VARIANTS if VARIANTS[n].offloads])
def test_offload_is_allowed_with_one_rank(name: str) -> None:
    assert choose(name, world=1).name == name


def test_mps_cannot_run_deepspeed() -> None:
    with pytest.raises(StrategyError, match="Apple's GPU"):
        choose("deepspeed_stage_2_offload", world=1, kind="mps")


def test_plan_has_the_complete_deepspeed_config_and_survives_json() -> None:
    config = RunConfig(
        strategy="deepspeed_stage_2", global_batch_size=96, trainer=TrainerOptions(gradient_clip_val=0.5)
    )
    plan = make_plan(config, ranks(H100, H100, H100, H100, batch_size=8))
    assert plan.deepspeed is not None
    blocks = {"bf16": {"enabled": True}, "fp16": {"enabled": False}}
    assert plan.deepspeed == {**zero_config(VARIANTS["deepspeed_stage_2"], "cuda", PLANNED), **blocks}
    assert (plan.deepspeed["train_batch_size"], plan.deepspeed["train_micro_batch_size_per_gpu"]) == (96, 8)
    assert (plan.deepspeed["gradient_accumulation_steps"], plan.deepspeed["gradient_clipping"]) == (3, 0.5)
    assert Plan.from_dict(plan.to_dict()) == plan
    assert make_plan(RunConfig(), ranks(H100, H100)).deepspeed is None


def test_batch_sizes_known_only_to_the_loader_are_omitted() -> None:
    plan = make_plan(RunConfig(strategy="deepspeed_stage_1"), ranks(CPU, CPU))
    assert plan.deepspeed is not None
    assert not {"train_batch_size", "train_micro_batch_size_per_gpu"} & set(plan.deepspeed)


def test_buckets_are_small_on_cpu() -> None:
    for kind, size in (("cpu", CPU_BUCKET), ("cuda", GPU_BUCKET)):
        zero = zero_config(VARIANTS["deepspeed_stage_3"], kind, PLANNED)["zero_optimization"]
        assert zero["reduce_bucket_size"] == zero["allgather_bucket_size"] == size
        assert zero["overlap_comm"] == (kind == "cuda")


def test_offload_config_sets_the_device_and_allows_the_user_optimizer() -> None:
    config = zero_config(VARIANTS["deepspeed_stage_3_offload_nvme"], "cuda", PLANNED)
    for part in ("offload_optimizer", "offload_param"):
        assert config["zero_optimization"][part] == {"device": "nvme", "pin_memory": True, "nvme_path": "/local_nvme"}
    assert config["zero_force_ds_cpu_optimizer"] is False
    assert "zero_force_ds_cpu_optimizer" not in zero_config(VARIANTS["deepspeed_stage_2"], "cuda", PLANNED)


def test_deepspeed_problems_are_reported_with_all_others() -> None:
    config = RunConfig(
        strategy="deepspeed_stage_2",
        precision="64-true",
        global_batch_size=5,
        trainer=TrainerOptions(gradient_clip_val=1.0, gradient_clip_algorithm="value"),
    )
    text = refusal(config, ranks(CPU, CPU))
    for part in ("global_batch_size 5 cannot", "use `strategy: ddp` for 64-true", "only by their norm"):
        assert part in text
    with pytest.raises(PlanError, match="there is one rank"):
        make_plan(RunConfig(strategy="deepspeed_stage_3"), ranks(H100))
