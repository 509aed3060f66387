"""`strategies.deepspeed_precision`: requested precision, conflicts and blocks of a DeepSpeed config."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.deepspeed_precision import precision_blocks, precision_conflicts, requested_precision, without_precision
from strategies.precision import Precision
from tests.support.deepspeed_configs import ANYTHING, WHOLE

FP16, BF16, FP32 = Precision.FP16_MIXED, Precision.BF16_MIXED, Precision.FP32_TRUE


@pytest.mark.parametrize(
    ("config", "order"),
    [
        ({}, None),
        ({"fp16": {"enabled": True}}, FP16),
        ({"bf16": {"enabled": True}}, BF16),
        ({"bfloat16": {"enabled": True}}, BF16),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": False}}, FP16),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, None),
        ({"fp16": {"enabled": True}, "bfloat16": {"enabled": True}}, None),
        ({"fp16": {"enabled": "auto"}}, None),
        ({"fp16": {"enabled": "true"}}, None),
        ({"fp16": {"enabled": 1}}, None),
        ({"fp16": {"loss_scale": 128}}, None),
        ({"fp16": True}, None),
        ({"fp16": None, "bf16": []}, None),
    ],
)
def test_exactly_one_enabled_block_requests_a_precision(config: dict[str, Any], order: Precision | None) -> None:
    assert requested_precision(config) is order


def only_conflict(precision: Precision, config: Mapping[str, Any]) -> str:
    (conflict,) = precision_conflicts(precision, config)
    return conflict


@pytest.mark.parametrize(
    ("precision", "config"),
    [
        (FP16, {}),
        (FP32, {}),
        (FP16, {"fp16": {"enabled": True}}),
        (Precision.FP16_TRUE, {"fp16": {"enabled": True}}),
        (BF16, {"bf16": {"enabled": True}}),
        (BF16, {"bfloat16": {"enabled": True}}),
        (Precision.BF16_TRUE, {"bf16": {"enabled": True}}),
        (BF16, {"bf16": {"enabled": True}, "fp16": {"enabled": False, "loss_scale": 0}}),
        (FP32, {"fp16": {"enabled": False}, "bf16": {"enabled": False}}),
        (FP16, {"fp16": {"enabled": "auto", "loss_scale": "auto", "initial_scale_power": "auto"}}),
        (FP16, {"fp16": {"loss_scale": 0}}),
        (FP16, {"fp16": {"loss_scale": 0.5}}),
        (FP16, {"fp16": {"loss_scale": sys.float_info.max}}),
        (FP16, {"fp16": {"initial_scale_power": 127}}),
        (FP16, {"fp16": {"initial_scale_power": 0, "min_loss_scale": 1}}),
        (FP16, {"fp16": {"initial_scale_power": 3, "min_loss_scale": 8}}),
        (FP16, {"fp16": {"loss_scale_window": 1, "hysteresis": 1, "min_loss_scale": 1.0}}),
        (BF16, {"communication_data_type": "bf16", "data_types": {"grad_accum_dtype": "fp32"}}),
        (FP16, {"communication_data_type": "fp16", "data_types": {"grad_accum_dtype": "auto"}}),
        (FP32, {"amp": {"enabled": False}, "torch_autocast": {"enabled": False}}),
        (FP32, {"communication_data_type": None}),
        (FP16, {"train_batch_size": 32, "zero_optimization": {"stage": 3}}),
    ],
)
def test_consistent_config_has_no_conflict(precision: Precision, config: dict[str, Any]) -> None:
    assert precision_conflicts(precision, config) == ()


@pytest.mark.parametrize(
    ("precision", "config", "message"),
    [
        (BF16, {"fp16": {"enabled": True}},
         "fp16.enabled is true, and the precision is bf16-mixed: set it to false or 'auto'"),
        (FP16, {"bf16": {"enabled": True}},
         "bf16.enabled is true, and the precision is 16-mixed: set it to false or 'auto'"),
        (FP32, {"bfloat16": {"enabled": True}},
         "bfloat16.enabled is true, and the precision is 32-true: set it to false or 'auto'"),
        (FP16, {"fp16": {"enabled": False}},
         "fp16.enabled is false, and the precision is 16-mixed: set it to true or 'auto'"),
        (BF16, {"bf16": {"enabled": False}},
         "bf16.enabled is false, and the precision is bf16-mixed: set it to true or 'auto'"),
        (BF16, {"bfloat16": {"enabled": False}},
         "bfloat16.enabled is false, and the precision is bf16-mixed: set it to true or 'auto'"),
        (FP32, {"fp16": True}, "fp16 is True; expected a block such as {'enabled': true}"),
        (FP32, {"bf16": None}, "bf16 is None; expected a block such as {'enabled': true}"),
        (FP16, {"fp16": {"enabled": "yes"}}, "fp16.enabled is 'yes'; expected true or false, or 'auto'"),
        (FP16, {"fp16": {"enabled": 1}}, "fp16.enabled is 1; expected true or false, or 'auto'"),
        (FP16, {"fp16": {"auto_cast": 0}}, "fp16.auto_cast is 0; expected true or false, or 'auto'"),
        (FP16, {"fp16": {"loss_scale": -1}},
         "fp16.loss_scale is -1; expected a number, at least 0 (0: dynamic), or 'auto'"),
        (FP16, {"fp16": {"loss_scale": float("nan")}},
         "fp16.loss_scale is nan; expected a number, at least 0 (0: dynamic), or 'auto'"),
        (FP16, {"fp16": {"loss_scale": True}},
         "fp16.loss_scale is True; expected a number, at least 0 (0: dynamic), or 'auto'"),
        (FP16, {"fp16": {"initial_scale_power": 128}},
         "fp16.initial_scale_power is 128; expected a whole number from 0 to 127, or 'auto'"),
        (FP16, {"fp16": {"initial_scale_power": 1.5}},
         "fp16.initial_scale_power is 1.5; expected a whole number from 0 to 127, or 'auto'"),
        (FP16, {"fp16": {"loss_scale_window": 0}},
         "fp16.loss_scale_window is 0; expected a whole number, at least 1, or 'auto'"),
        (FP16, {"fp16": {"hysteresis": 0}}, "fp16.hysteresis is 0; expected a whole number, at least 1, or 'auto'"),
        (FP16, {"fp16": {"min_loss_scale": 0}},
         "fp16.min_loss_scale is 0; expected a whole number, at least 1, or 'auto'"),
        (FP16, {"fp16": {"initial_scale_power": 3, "min_loss_scale": 9}},
         "fp16.min_loss_scale is 9, above the first scale of 2**3; lower it"),
        (FP16, {"fp16": {"initial_scale_power": 0, "min_loss_scale": 2}},
         "fp16.min_loss_scale is 2, above the first scale of 2**0; lower it"),
        (FP16, {"fp16": {"initial_scale_power": 127, "min_loss_scale": 2**128}},
         f"fp16.min_loss_scale is {2**128}, above the first scale of 2**127; lower it"),
        (FP16, {"fp16": {"loss_scal": 0}}, "fp16.loss_scal does not exist; did you mean loss_scale?"),
        (BF16, {"bf16": {"zzz": 0}},
         ("bf16.zzz does not exist; valid are enabled, immediate_grad_update, check_grad_overflow, "
          "bf16_master_weights_and_grads, bf16_optimizer_states")),
        (BF16, {"bf16": {"enabled": True}, "bfloat16": {}},
         "bfloat16: DeepSpeed reads this old name only where bf16 is absent; remove it"),
        (FP32, {"amp": {"enabled": True}}, "amp.enabled: DeepSpeed no longer supports Apex AMP; remove the block"),
        (BF16, {"torch_autocast": {"enabled": True}},
         "torch_autocast.enabled is a second mixed precision beside bf16-mixed; remove the block"),
        (BF16, {"communication_data_type": "fp16"},
         "communication_data_type is 'fp16', and the precision is bf16-mixed: set it to fp32 or bf16"),
        (FP16, {"data_types": {"grad_accum_dtype": "bf16"}},
         "data_types.grad_accum_dtype is 'bf16', and the precision is 16-mixed: set it to fp32 or fp16"),
        (FP16, {"communication_data_type": "int7"}, "communication_data_type is 'int7'; expected fp32, fp16 or bf16"),
        (FP16, {"data_types": {"grad_accum_dtype": ["fp32"]}},
         "data_types.grad_accum_dtype is ['fp32']; expected fp32, fp16 or bf16"),
        (Precision.FP64_TRUE, {}, "DeepSpeed trains in fp16, bf16 or fp32; use `strategy: ddp` for 64-true"),
    ],
)  # fmt: skip
def test_conflict_states_path_value_and_fix(precision: Precision, config: dict[str, Any], message: str) -> None:
    assert only_conflict(precision, config) == message


@pytest.mark.parametrize("name", ["bf16", "bfloat16"])
def test_two_enabled_blocks_conflict_with_either_bf16_name(name: str) -> None:
    assert precision_conflicts(FP16, {"fp16": {"enabled": True}, name: {"enabled": True}}) == (
        "fp16.enabled and bf16.enabled are both true; DeepSpeed trains in one of them: set one to false",
        f"{name}.enabled is true, and the precision is 16-mixed: set it to false or 'auto'",
    )


def test_all_dtype_keys_are_checked() -> None:
    config = {"data_types": {"grad_accum_dtype": "int7"}, "communication_data_type": "int9"}
    assert precision_conflicts(FP16, config) == (
        "data_types.grad_accum_dtype is 'int7'; expected fp32, fp16 or bf16",
        "communication_data_type is 'int9'; expected fp32, fp16 or bf16",
    )


def test_all_conflicts_are_reported_together() -> None:
    config = {
        "fp16": {"enabled": True, "loss_scale": "big", "hysteresiss": 2},
        "bf16": {"enabled": True},
        "amp": {"enabled": True},
        "communication_data_type": "fp16",
    }
    message = "\n".join(precision_conflicts(BF16, config))
    assert all(part in message for part in (
        "fp16.loss_scale is 'big'", "did you mean hysteresis?", "fp16.enabled and bf16.enabled are both true",
        "fp16.enabled is true, and the precision", "amp.enabled", "communication_data_type is 'fp16'",
    ))  # fmt: skip
    assert len(message.splitlines()) == 6


@pytest.mark.parametrize("number", [10**400, -(10**400), 1e309], ids=["large", "small", "infinite"])
@pytest.mark.parametrize("key", ["loss_scale", "initial_scale_power", "min_loss_scale"])
def test_number_larger_than_any_float_is_a_conflict(key: str, number: float) -> None:
    config = json.loads(json.dumps({"fp16": {key: number}}))
    assert only_conflict(FP16, config).startswith(f"fp16.{key} is ")


@pytest.mark.case(48)
@settings(deadline=None, max_examples=150)
@given(st.sampled_from(Precision), ANYTHING)
def test_any_json_value_is_handled_without_an_exception(precision: Precision, config: dict[str, Any]) -> None:
    conflicts = precision_conflicts(precision, config)
    assert all(isinstance(conflict, str) and conflict for conflict in conflicts)
    requested_precision(config)
    without_precision(config)
    if not conflicts:
        precision_blocks(precision, config)


@pytest.mark.case(48)
@settings(deadline=None, max_examples=60)
@given(st.sampled_from([p for p in Precision if p is not Precision.FP64_TRUE]), WHOLE)
def test_blocks_enable_at_most_one_dtype_and_have_no_conflict(precision: Precision, config: dict[str, Any]) -> None:
    if precision_conflicts(precision, config):
        return
    blocks = precision_blocks(precision, config)
    assert set(blocks) == {"fp16", "bf16"}
    enabled = [name for name, block in blocks.items() if block["enabled"]]
    assert enabled == [name for name in ("fp16", "bf16") if precision.startswith(name.removeprefix("fp"))]
    assert "auto" not in [value for block in blocks.values() for value in block.values()]
    merged = {**config, **blocks}
    assert precision_conflicts(precision, merged) == ()
    assert precision_blocks(precision, merged) == blocks


def test_user_settings_are_kept_and_auto_becomes_the_default() -> None:
    auto = dict.fromkeys(["loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis", "min_loss_scale",
                          "consecutive_hysteresis", "auto_cast", "fp16_master_weights_and_grads"], "auto")  # fmt: skip
    assert precision_blocks(FP16, {"fp16": auto})["fp16"] == {
        "enabled": True, "loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 1000, "hysteresis": 2,
        "min_loss_scale": 1, "consecutive_hysteresis": False, "auto_cast": False,
        "fp16_master_weights_and_grads": False,
    }  # fmt: skip
    assert precision_blocks(FP16, {"fp16": {"loss_scale": 128}})["fp16"] == {"enabled": True, "loss_scale": 128}
    bf16 = dict.fromkeys(["immediate_grad_update", "check_grad_overflow", "bf16_master_weights_and_grads",
                          "bf16_optimizer_states"], "auto")  # fmt: skip
    assert precision_blocks(BF16, {"bf16": bf16})["bf16"] == {
        "enabled": True, "immediate_grad_update": False, "check_grad_overflow": True,
        "bf16_master_weights_and_grads": False, "bf16_optimizer_states": False,
    }  # fmt: skip


@pytest.mark.slow
def test_defaults_match_deepspeed() -> None:
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config

    for precision, name, theirs in ((FP16, "fp16", DeepSpeedFP16Config), (BF16, "bf16", DeepSpeedBF16Config)):
        fields = {key: field.default for key, field in theirs.model_fields.items() if key != "enabled"}
        block = precision_blocks(precision, {name: dict.fromkeys(fields, "auto")})[name]
        assert precision_conflicts(precision, {name: dict.fromkeys(fields, "auto")}) == ()
        assert {key: block[key] for key in fields} == fields


def test_settings_of_bfloat16_move_to_bf16() -> None:
    blocks = precision_blocks(BF16, {"bfloat16": {"immediate_grad_update": True}})
    assert blocks["bf16"] == {"immediate_grad_update": True, "enabled": True}


def test_without_precision_keeps_other_settings() -> None:
    config = {"fp16": {"enabled": True, "loss_scale": 8}, "bf16": {}, "train_batch_size": 4}
    assert without_precision(config) == {
        "fp16": {"enabled": "auto", "loss_scale": 8},
        "bf16": {},
        "train_batch_size": 4,
    }
    assert config["fp16"] == {"enabled": True, "loss_scale": 8}
    assert without_precision({}) == {}
