"""A user's DeepSpeed config: unknown keys, contradictions and 'auto', against the installed DeepSpeed's own records."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.agreement.facts import Agreement
from launcher.config.deepspeed_file import with_deepspeed_file
from launcher.config.loading import load_config
from launcher.config.schema import RunConfig, TrainerOptions
from launcher.core.errors import ConfigError
from launcher.planning.plan import make_plan
from strategies.deepspeed_keys import OFFLOAD_OPTIMIZER, OFFLOAD_PARAM, REMOVED, TOP, ZERO, find_broken_keys
from tests.support.processes import run_warm
from tests.support.rank_threads import CPU, H100, facts
from tests.support.warm import DEEPSPEED
from tests.unit.planning.test_plan import ranks, refusal

_OF_DEEPSPEED = """
import json
from deepspeed.runtime import constants
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig
def keys(model):
    fields = model.model_fields
    return sorted({*fields, *(field.alias for field in fields.values() if field.alias)})
from deepspeed.runtime import config
removed = [*config._REMOVED_TOP_LEVEL_CONFIG_KEYS,
           *(f"zero_optimization.{key}" for key in config._REMOVED_ZERO_CONFIG_KEYS)]
print(json.dumps({
    "removed": removed,
    "zero": keys(DeepSpeedZeroConfig),
    "param": keys(DeepSpeedZeroOffloadParamConfig),
    "optimizer": keys(DeepSpeedZeroOffloadOptimizerConfig),
    "constants": [v for v in vars(constants).values() if isinstance(v, str)],
}))
"""


def with_config(deepspeed: dict[str, Any], **options: Any) -> RunConfig:
    return RunConfig(**{"strategy": "deepspeed_stage_2", "deepspeed_config": deepspeed, **options})


@pytest.mark.slow
def test_the_known_keys_are_those_of_the_installed_deepspeed(tmp_path: Path) -> None:
    # In a process of its own: DeepSpeed's import changes warnings and logging for good.
    output = run_warm([sys.executable, "-c", _OF_DEEPSPEED], tmp_path, preloaded=DEEPSPEED).check().output
    theirs = json.loads(output.splitlines()[-1])
    assert set(ZERO) == set(theirs["zero"])
    assert set(REMOVED) == set(theirs["removed"])
    assert set(OFFLOAD_PARAM) == set(theirs["param"])
    assert set(OFFLOAD_OPTIMIZER) == set(theirs["optimizer"])
    scalars = {key for key, kind in TOP.items() if kind != "block"}
    assert scalars <= set(theirs["constants"])


@pytest.mark.parametrize("path", REMOVED)
def test_a_removed_key_of_deepspeed_is_reported_as_removed(path: str) -> None:
    block, _, key = path.rpartition(".")
    given = {block: {key: {}}} if block else {key: {}}
    assert list(find_broken_keys(given)) == [(path, f"DeepSpeed 0.19 no longer has it: {REMOVED[path]}")]


def test_unknown_keys_wrong_types_and_misplaced_keys_are_listed_with_their_paths() -> None:
    found = dict(
        find_broken_keys(
            {
                "train_micro_batch_size": 4,
                "stage": 2,
                "gradient_clipping": "a lot",
                "zero_optimization": {
                    "stage": 4,
                    "overlap_com": True,
                    "reduce_bucket_size": 5e8,
                    "contiguous_gradients": 1,
                    "offload_optimizer": {"device": "gpu", "pin_mem": True},
                },
                "qqq": 1,
            }
        )
    )
    assert found == {
        "train_micro_batch_size": "unknown key; did you mean train_micro_batch_size_per_gpu?",
        "stage": "unknown key; did you mean zero_optimization.stage?",
        "gradient_clipping": "given 'a lot'; expected a number, or 'auto'",
        "zero_optimization.stage": "given 4; expected 0, 1, 2 or 3",
        "zero_optimization.overlap_com": "unknown key; did you mean overlap_comm?",
        "zero_optimization.contiguous_gradients": "given 1; expected true or false, or 'auto'",
        "zero_optimization.offload_optimizer.device": "given 'gpu'; expected one of none, cpu, nvme",
        "zero_optimization.offload_optimizer.pin_mem": "unknown key; did you mean pin_memory?",
        "qqq": "unknown key; DeepSpeed 0.19 has none of that name",
    }


def test_auto_takes_the_plans_value_and_the_users_settings_are_kept() -> None:
    user = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "steps_per_print": 50,
        "zero_optimization": {
            "stage": "auto",
            "reduce_bucket_size": "auto",
            "allgather_bucket_size": 1e6,
            "sub_group_size": "auto",
            "round_robin_gradients": True,
        },
        "bf16": {"enabled": "auto"},
    }
    before = copy.deepcopy(user)
    config = with_config(user, global_batch_size=96, precision="bf16-mixed",
                         trainer=TrainerOptions(gradient_clip_val=0.5))  # fmt: skip
    planned = make_plan(config, ranks(H100, H100, batch_size=8)).deepspeed
    assert planned is not None
    assert user == before
    assert "auto" not in json.dumps(planned)
    assert (planned["train_batch_size"], planned["train_micro_batch_size_per_gpu"]) == (96, 8)
    assert (planned["gradient_accumulation_steps"], planned["gradient_clipping"]) == (6, 0.5)
    assert planned["steps_per_print"] == 50
    zero = planned["zero_optimization"]
    assert (zero["stage"], zero["reduce_bucket_size"], zero["allgather_bucket_size"]) == (2, 200_000_000, 1e6)
    assert zero["round_robin_gradients"]
    # What the plan has no value for is DeepSpeed's own default.
    assert "sub_group_size" not in zero
    assert planned["bf16"]["enabled"]
    assert not planned["fp16"]["enabled"]


def test_every_conflict_with_the_run_config_is_listed_at_once() -> None:
    user = {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 16,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "fp16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
        "scheduler": {"type": "WarmupLR"},
        "wandb": {"enabled": True},
        "zero_optimization": {"stage": 3},
    }
    config = with_config(user, global_batch_size=96, precision="bf16-mixed",
                         trainer=TrainerOptions(gradient_clip_val=0.5))  # fmt: skip
    text = refusal(config, ranks(H100, H100, batch_size=8))
    for part in (
        "deepspeed_config.train_batch_size: given 64, but the plan has 96; set it to 'auto', or change global_batch_",
        "deepspeed_config.train_micro_batch_size_per_gpu: given 16, but the plan has 8",
        "deepspeed_config.gradient_accumulation_steps: given 2, but the plan has 6",
        "deepspeed_config.gradient_clipping: given 1.0, but the plan has 0.5",
        "deepspeed_config.optimizer: the optimizer comes from the model's configure_optimizers",
        "deepspeed_config.scheduler: ",
        "deepspeed_config.wandb: the launcher logs to W&B itself",
        "zero_optimization: given stage 3, but the strategy is deepspeed_stage_2; use `strategy: deepspeed_stage_3`",
        "fp16.enabled is true, and the precision is bf16-mixed",
    ):
        assert part in text


def test_equal_values_are_no_conflict_and_clipping_that_only_deepspeed_has_counts() -> None:
    user = {"train_batch_size": 32, "gradient_accumulation_steps": 2, "gradient_clipping": 0.3,
            "wandb": {"enabled": False}}  # fmt: skip
    planned = make_plan(with_config(user, global_batch_size=32), ranks(CPU, CPU, batch_size=8)).deepspeed
    assert planned is not None
    assert planned["gradient_clipping"] == 0.3
    assert "wandb" not in planned


def test_a_total_batch_without_a_global_batch_size_is_rejected() -> None:
    text = refusal(with_config({"train_batch_size": 64}), ranks(CPU, CPU))
    assert "set `global_batch_size: 64`, and this to 'auto'" in text


@pytest.mark.parametrize(
    ("zero", "expected"),
    [
        ({"stage": 0}, "use `strategy: ddp`"),
        ({"offload_optimizer": {"device": "cpu"}}, "use `strategy: deepspeed_stage_2_offload`"),
        ({"offload_param": {"device": "cpu"}}, "only stage 3 offloads parameters"),
        ({"stage": 1}, "given stage 1, but the strategy is deepspeed_stage_2; use `strategy: deepspeed_stage_1`"),
    ],
)
def test_another_variant_than_the_strategy_names_the_right_one(zero: dict[str, Any], expected: str) -> None:
    assert expected in refusal(with_config({"zero_optimization": zero}), ranks(CPU, CPU))


def test_offload_without_a_strategy_of_its_own_is_accepted() -> None:
    config = with_config({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, strategy="deepspeed_stage_3")
    planned = make_plan(config, ranks(CPU, CPU)).deepspeed
    assert planned is not None
    assert planned["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert "offload_param" not in planned["zero_optimization"]


def test_deepspeed_settings_without_deepspeed_suggest_the_matching_strategy() -> None:
    user = {
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    }
    text = refusal(RunConfig(deepspeed_config=user), ranks(CPU, CPU))
    assert "the strategy is auto; use `strategy: deepspeed_stage_3_offload`" in text


def test_a_block_with_a_precision_sets_the_precision() -> None:
    plan = make_plan(with_config({"bf16": {"enabled": True}}), ranks(H100, H100))
    assert plan.precision == "bf16-mixed"


@pytest.mark.parametrize("lacks", ["c++", "ninja"])
def test_missing_build_tools_are_named_with_package_and_host(lacks: str) -> None:
    agreement = Agreement(tuple(facts(n, H100) for n in range(2)))
    hardware = agreement.facts[1].hardware
    assert hardware is not None
    hardware.versions[lacks] = None  # type: ignore[index]
    text = refusal(RunConfig(strategy="deepspeed_stage_3_offload_nvme"), agreement)
    package = {"c++": "g++", "ninja": "ninja-build"}[lacks]
    assert f"compiles DeepSpeed's async_io at its first start, but {lacks} not on the PATH of node1" in text
    assert f"install {package}" in text
    notices = make_plan(RunConfig(strategy="deepspeed_stage_3_offload"), agreement).notices
    assert [n for n in notices if "CPU Adam cannot be compiled" in n and package in n]
    assert not make_plan(RunConfig(strategy="deepspeed_stage_3"), agreement).notices


class TestFile:
    def test_its_content_is_read_and_the_file_not_changed(self, tmp_path: Path) -> None:
        file = tmp_path / "ds.json"
        file.write_text('{"zero_optimization": {"stage": "auto"}, "steps_per_print": 7}')
        before = (file.read_bytes(), file.stat().st_mtime_ns)
        argv = ["--strategy", "deepspeed_stage_3", "--deepspeed_config", str(file)]
        config = load_config([], argv)
        assert config.deepspeed_config == {"zero_optimization": {"stage": "auto"}, "steps_per_print": 7}
        assert (file.read_bytes(), file.stat().st_mtime_ns) == before
        assert with_deepspeed_file(RunConfig(deepspeed_config=str(file))).deepspeed_config == config.deepspeed_config

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ('{"fp16": {\n"enabled": tru}}', "line 2, column 12): invalid JSON: Expecting value"),
            ("[1]", "found list; expected a mapping of settings"),
            ('{"steps_per_print": 1, "steps_per_print": 2}', "key 'steps_per_print' is given twice"),
            ('{"zero_optimisation": {}}', "deepspeed_config.zero_optimisation: unknown key; did you mean zero_opt"),
        ],
    )
    def test_an_invalid_file_is_rejected(self, tmp_path: Path, text: str, expected: str) -> None:
        file = tmp_path / "ds.json"
        file.write_text(text)
        with pytest.raises(ConfigError) as caught:
            with_deepspeed_file(RunConfig(deepspeed_config=str(file)))
        assert expected in str(caught.value)

    def test_a_missing_file_is_rejected(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="no such file"):
            with_deepspeed_file(RunConfig(deepspeed_config=str(tmp_path / "ds.json")))

    def test_unknown_keys_of_a_mapping_are_listed_with_the_other_problems_of_the_config(self) -> None:
        with pytest.raises(ConfigError) as caught:
            load_config([], ["--deepspeed_config", "{stage: 2}", "--seed", "x"])
        assert {p.path for p in caught.value.problems} == {"deepspeed_config.stage", "seed"}
