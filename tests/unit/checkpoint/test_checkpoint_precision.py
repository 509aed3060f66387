"""The precision of a checkpoint, with valid, damaged and missing records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.checkpoint.precision import RECORD, CheckpointPrecision, make_record, read_precision
from launcher.checkpoint.resume import check_checkpoint, scaler_problem
from strategies.loss_scale import CountingGradScaler
from strategies.precision import Precision

SCALE = {"scale": 4096.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 7}
NEEDED = {"state_dict": {}, "loops": {}, "global_step": 2, "epoch": 0, "optimizer_states": []}


@pytest.mark.parametrize("precision", list(Precision))
def test_record_of_a_run_is_read(precision: Precision, tmp_path: Path) -> None:
    record = make_record(precision.value, "ddp", 2)
    assert json.loads(json.dumps(record)) == {"precision": precision.value, "strategy": "ddp", "world_size": 2}
    torch.save({**NEEDED, RECORD: record}, tmp_path / "a.ckpt")
    assert check_checkpoint(tmp_path / "a.ckpt") == CheckpointPrecision(precision)


def test_user_precision_plugin_leaves_the_precision_unknown() -> None:
    assert read_precision({RECORD: make_record("custom", "ddp", 2), "MixedPrecision": SCALE}) == CheckpointPrecision(
        None
    )


def weights(*dtypes: torch.dtype) -> dict[str, torch.Tensor]:
    return {f"w{n}": torch.ones(2, dtype=dtype) for n, dtype in enumerate(dtypes)}


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        ({}, None),
        ({"state_dict": weights(torch.float32)}, None),
        ({"state_dict": weights(torch.float16)}, Precision.FP16_TRUE),
        ({"state_dict": weights(torch.bfloat16, torch.bfloat16)}, Precision.BF16_TRUE),
        ({"state_dict": weights(torch.float64)}, Precision.FP64_TRUE),
        # Counters are integers in every precision.
        ({"state_dict": weights(torch.bfloat16, torch.int64)}, Precision.BF16_TRUE),
        ({"state_dict": weights(torch.bfloat16, torch.float32)}, None),
        ({"state_dict": weights(torch.int64)}, None),
        ({"state_dict": [1]}, None),
        ({"MixedPrecision": SCALE, "state_dict": weights(torch.float32)}, Precision.FP16_MIXED),
        ({"MixedPrecisionPlugin": SCALE}, Precision.FP16_MIXED),
        ({"native_amp_scaling_state": SCALE}, Precision.FP16_MIXED),
        # Lightning saves an empty state with bf16.
        ({"MixedPrecision": {}}, None),
        ({"MixedPrecision": [1, 2]}, None),
    ],
)
def test_precision_without_a_record_is_read_from_the_content(content: dict[str, Any], shown: Any) -> None:
    assert read_precision(content) == CheckpointPrecision(shown)


DAMAGED = [3, 8.5, True, None, [], [16], {}, {"precision": None}, {"precision": ["16-mixed"]}, "", "fp15", "nonsense",
           {"precision": "custom16"}, {"precision": {}}, {"world_size": 2}, ("bf16",), torch.ones(2)]  # fmt: skip


@pytest.mark.parametrize("record", DAMAGED, ids=repr)
def test_damaged_record_gives_a_notice_and_the_content_is_used(record: Any) -> None:
    found = read_precision({RECORD: record, "state_dict": weights(torch.bfloat16)})
    assert found.precision is Precision.BF16_TRUE
    assert found.notice is not None
    assert found.notice.startswith("the checkpoint's record of its precision is damaged (")
    assert found.notice.endswith("; its content shows bf16-true")
    without = read_precision({RECORD: record})
    assert without.precision is None
    assert (without.notice or "").endswith("; its content does not show one")


@pytest.mark.parametrize("record", ["x" * 100_000, list(range(100_000)), {"precision": "\x1b[2J" * 50_000}])
def test_the_notice_of_a_huge_record_is_short_and_shows_no_control_characters(record: Any) -> None:
    notice = read_precision({RECORD: record}).notice or ""
    assert 0 < len(notice) < 300
    assert notice.isprintable()


def saved(folder: Path, **content: Any) -> Path:
    torch.save({**NEEDED, **content}, folder / "some.ckpt")
    return folder / "some.ckpt"


def test_valid_loss_scale_is_no_problem(tmp_path: Path) -> None:
    counted = {**SCALE, "counts": {"skipped_steps": 3, "overflows": 3, "floor_steps": 0}}
    for state in (SCALE, counted):
        assert scaler_problem(saved(tmp_path, MixedPrecision=state)) is None
        assert scaler_problem(saved(tmp_path, native_amp_scaling_state=state)) is None


DAMAGED_SCALES = [
    ([1, 2], "it is a list, not a mapping"),
    ("65536", "it is a str, not a mapping"),
    (7, "it is a int, not a mapping"),
    ({}, "it is empty"),
    ({k: v for k, v in SCALE.items() if k != "growth_interval"}, "it lacks growth_interval"),
    ({**SCALE, "scale": "65536"}, "scale is '65536'"),
    ({**SCALE, "scale": float("nan")}, "scale is nan"),
    ({**SCALE, "scale": float("inf")}, "scale is inf"),
    ({**SCALE, "scale": -2.0}, "scale is -2.0"),
    ({**SCALE, "scale": True}, "scale is True"),
    ({**SCALE, "scale": None}, "scale is None"),
    ({**SCALE, "scale": 0.0}, "is out of range"),
    ({**SCALE, "growth_factor": 1.0}, "is out of range"),
    ({**SCALE, "backoff_factor": 1.5}, "is out of range"),
    ({**SCALE, "_growth_tracker": -1}, "_growth_tracker is -1"),
    # The device holds the scale in 32 bits: it would be infinite there, and half of that is too.
    ({**SCALE, "scale": 1e300}, "scale is 1e+300"),
    ({**SCALE, "_growth_tracker": 2**31}, "_growth_tracker is 2147483648"),
    ({**SCALE, "growth_interval": 10**400}, "growth_interval is 1000"),
    ({**SCALE, "growth_interval": 2000.0}, "growth_interval is 2000.0"),
]


@pytest.mark.parametrize(("state", "expected"), DAMAGED_SCALES, ids=[expected for _, expected in DAMAGED_SCALES])
def test_damaged_loss_scale_is_described(tmp_path: Path, state: Any, expected: str) -> None:
    for key in ("MixedPrecision", "native_amp_scaling_state"):
        assert expected in (scaler_problem(saved(tmp_path, **{key: state})) or ""), key


def test_missing_loss_scale_is_reported(tmp_path: Path) -> None:
    fp16 = make_record("16-mixed", "ddp", 2)
    assert scaler_problem(saved(tmp_path, **{RECORD: fp16})) == "it was not saved"
    # A change of precision has another notice.
    assert scaler_problem(saved(tmp_path, **{RECORD: make_record("bf16-mixed", "ddp", 2)})) is None
    assert scaler_problem(saved(tmp_path)) is None


def test_deepspeed_folder_is_not_checked_for_a_loss_scale(tmp_path: Path) -> None:
    assert scaler_problem(tmp_path) is None


@pytest.mark.parametrize(("state", "expected"), DAMAGED_SCALES, ids=[expected for _, expected in DAMAGED_SCALES])
def test_scaler_with_a_damaged_state_starts_at_its_initial_scale(
    state: Any, expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    scaler = CountingGradScaler("cpu", init_scale=1024.0)
    scaler.load_state_dict(state)
    assert expected in caplog.text
    assert _scale_after_a_step(scaler) == 1024.0


@pytest.mark.parametrize(
    "counts",
    [
        {"skipped_steps": "many"},
        {"overflows": float("nan")},
        [1],
        "x",
        None,
        {"overflows": -1},
        {"floor_steps": 1e9},
        {"overflows": 10**400},
    ],
)
def test_damaged_counts_with_a_valid_scale_start_at_zero(counts: Any) -> None:
    scaler = CountingGradScaler("cpu", init_scale=1024.0)
    scaler.load_state_dict({**SCALE, "counts": counts})
    assert scaler.counts() == {"skipped_steps": 0, "overflows": 0, "floor_steps": 0}
    assert _scale_after_a_step(scaler) == 4096.0


def _scale_after_a_step(scaler: CountingGradScaler) -> float:
    weight = torch.ones(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], 0.1)
    scaler.scale(weight.sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert weight.item() < 1
    return scaler.get_scale()
