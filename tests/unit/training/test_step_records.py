"""The record of a rank: what it holds after any writes, and after an end in the middle of one."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.checkpoint import rng_state
from launcher.training.loops.moment import StepMoment
from launcher.training.survivors import record as records
from launcher.training.survivors.own_state import RandomReader, pack, unpack
from launcher.training.survivors.record import RecordWriter, find_record, read_records

_MOMENTS = (StepMoment.BATCH, StepMoment.VALIDATED, StepMoment.EPOCH)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3), st.integers(0, 60_000)), min_size=1, max_size=12))
def test_the_last_finished_step_is_always_there_and_the_next_one_after_its_forward_pass(
    tmp_path: Path, writes: list[tuple[bool, int, int]]
) -> None:
    path = tmp_path / "record"
    writer, expected = RecordWriter(path), dict[int, tuple[StepMoment, int]]()
    for batches, (is_prepared, repeats, size) in enumerate(writes, 1):
        if is_prepared:
            writer.write(batches, StepMoment.FORWARD, {"size": size, "data": b"x" * size})
            expected = {step: value for step, value in expected.items() if step == batches - 1}
            expected[batches] = (StepMoment.FORWARD, size)
            assert {r.batches: (r.moment, r.content["size"]) for r in read_records(path)} == expected
        for moment in _MOMENTS[: max(repeats, 1)]:
            writer.write(batches, moment, {"size": size, "data": b"x" * size})
            expected[batches] = (moment, size)
        found = find_record(path, batches)
        assert found is not None
        assert (found.moment, found.content["size"]) == expected[batches]
    writer.close()
    assert not path.exists()
    assert read_records(path) == ()


def test_an_end_in_the_middle_of_a_write_leaves_the_step_before(tmp_path: Path) -> None:
    path, payload = tmp_path / "record", {"data": b"y" * 3000}
    writer = RecordWriter(path)
    writer.write(1, StepMoment.BATCH, payload)
    whole = path.read_bytes()
    writer.write(2, StepMoment.BATCH, payload)
    second = path.read_bytes()
    changed = [n for n, (one, other) in enumerate(zip(whole, second, strict=True)) if one != other]
    for cut in changed[:: max(len(changed) // 50, 1)]:
        path.write_bytes(second[: cut + 1] + whole[cut + 1 :])
        assert {record.batches for record in read_records(path)} >= {1}, cut
        assert all(record.content == payload for record in read_records(path))


@pytest.mark.parametrize("content", [b"", b"\0" * 10, b"\xff" * 40_000, b"\0" * 40_000])
def test_a_file_that_is_no_record_holds_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "record").write_bytes(content)
    assert read_records(tmp_path / "record") == ()


def test_a_record_that_would_create_objects_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = RecordWriter(tmp_path / "record")
    writer.write(1, StepMoment.BATCH, {"path": Path("x")})
    assert pickle.loads(pickle.dumps(Path("x"))) == Path("x")  # noqa: S301 -- created here
    assert read_records(tmp_path / "record") == ()


def test_a_disk_without_space_is_an_error_and_not_a_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records.os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space"):
        RecordWriter(tmp_path / "record").write(1, StepMoment.BATCH, {})
    assert list(tmp_path.iterdir()) == []


_DRAWS: dict[str, Callable[[], object]] = {
    "python": random.random,
    "python gauss": lambda: random.gauss(0, 1),
    "numpy": np.random.rand,
    "numpy normal": np.random.randn,
    "torch": lambda: torch.rand(3),
    "nothing": lambda: None,
}


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from(sorted(_DRAWS)), max_size=12))
def test_the_states_of_the_generators_are_those_of_now_after_any_draws(draws: list[str]) -> None:
    reader = RandomReader()
    for name in ["nothing", *draws]:
        _DRAWS[name]()
        found: dict[str, Any] = unpack(reader.read())
        now = rng_state.capture()
        assert found["python"]["words"].equal(now["python"]["words"])
        assert found["python"]["gauss"] == now["python"]["gauss"]
        assert found["numpy"]["keys"].equal(now["numpy"]["keys"])
        assert {k: v for k, v in found["numpy"].items() if k != "keys"} == {
            k: v for k, v in now["numpy"].items() if k != "keys"
        }
        assert found["torch"].equal(now["torch"])


def test_the_states_of_another_numpy_generator_are_read() -> None:
    before = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.MT19937(3))
        reader = RandomReader()
        np.random.rand()
        assert unpack(reader.read())["numpy"]["keys"].equal(rng_state.capture()["numpy"]["keys"])
    finally:
        np.random.set_bit_generator(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3)])
def test_tensors_are_the_same_after_packing(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.ones(shape).to(dtype)
    value = {"a": [tensor, None, {"b": (tensor.t() if tensor.ndim == 2 else tensor, 1.5)}], "c": "text"}
    found = unpack(pickle.loads(pickle.dumps(pack(value))))  # noqa: S301 -- created here
    assert found["a"][0].equal(tensor)
    assert found["a"][0].dtype == dtype
    assert found["a"][2]["b"][0].equal(value["a"][2]["b"][0])  # type: ignore[index]
    assert (found["a"][1], found["a"][2]["b"][1], found["c"]) == (None, 1.5, "text")
