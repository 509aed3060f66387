"""DeepSpeed configs for property tests: valid ones, broken ones, and any JSON value."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

ENABLED = st.sampled_from([True, False, "auto"])
FP16_BLOCKS = st.fixed_dictionaries(
    {},
    optional={
        "enabled": ENABLED,
        "loss_scale": st.sampled_from([0, 128.0, "auto"]),
        "initial_scale_power": st.sampled_from([8, 16, "auto"]),
        "loss_scale_window": st.sampled_from([1, 500]),
        "hysteresis": st.just(2),
        "min_loss_scale": st.sampled_from([1, 4, "auto"]),
    },
)
BF16_BLOCKS = st.fixed_dictionaries(
    {}, optional={"enabled": ENABLED, "immediate_grad_update": st.booleans(), "check_grad_overflow": st.just("auto")}
)
# Configs of a user who knows DeepSpeed; the precision may differ from the agreed one.
WHOLE: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {},
    optional={
        "zero_optimization": st.just({"stage": 2}),
        "fp16": FP16_BLOCKS,
        "bf16": BF16_BLOCKS,
        "communication_data_type": st.sampled_from(["fp32", "auto"]),
    },
)

# JSON has no limit on integers; Python also reads NaN and Infinity.
_LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**400, -(10**400), 2**127])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["auto", "fp16", "bf16", "true"])
)
JSON = st.recursive(
    _LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner), max_leaves=6
)
_KEYS = st.sampled_from(
    ["enabled", "auto_cast", "loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis", "min_loss_scale",
     "consecutive_hysteresis", "immediate_grad_update", "grad_accum_dtype"]
)  # fmt: skip
_BLOCK_NAMES = st.sampled_from(
    ["fp16", "bf16", "bfloat16", "amp", "torch_autocast", "data_types", "communication_data_type"]
)
# Valid keys with any value, for checks that assume a type.
ANYTHING: st.SearchStrategy[dict[str, Any]] = st.dictionaries(
    _BLOCK_NAMES | st.text(max_size=6), JSON | st.dictionaries(_KEYS | st.text(max_size=6), _LEAVES, max_size=4)
)
