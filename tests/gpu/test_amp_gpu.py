"""The loss scale on a CUDA device: counted and gathered there, without synchronizing the host. `pytest -m gpu`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.monitoring.samples import RankSample
from tests.support.plain_trainer import plain_trainer
from tests.support.wandb_stand_in import RecordingWandb

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]
DEVICE = "cuda"
OVERFLOWS = (1.0, float("inf"), 1.0, 1.0, 1.0, float("inf"), float("inf"), 1.0)


@contextlib.contextmanager
def no_host_sync() -> Iterator[None]:
    """Operations that make the host wait for the device raise."""
    import torch

    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def backward(scaler: Any, factor: float) -> Any:
    """A loss, its scaled gradient, and whether the optimizer may step; waits for the device."""
    import torch

    weight = torch.nn.Parameter(torch.ones(2, device=scaler._device))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    loss = (weight * factor).sum()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    return loss


def test_a_cuda_scaler_counts_as_one_on_a_cpu() -> None:
    from strategies.loss_scale import CountingGradScaler

    seen = []
    for device in (DEVICE, "cpu"):
        scaler = CountingGradScaler(device, floor=8.0, init_scale=16.0, growth_interval=3)
        for factor in OVERFLOWS:
            backward(scaler, factor)
            scaler.update()
        live = scaler.live()
        assert {value.device.type for value in (live.scale, live.skipped_steps, live.floor_steps)} == {device}  # type: ignore[union-attr]
        seen.append((scaler.counts(), scaler.state_dict()))
    assert seen[0] == seen[1]
    assert seen[0][0]["skipped_steps"] == 3


def test_counting_does_not_synchronize_the_host() -> None:
    from strategies.loss_scale import CountingGradScaler

    scaler = CountingGradScaler(DEVICE, init_scale=16.0)
    for number, factor in enumerate(OVERFLOWS):
        backward(scaler, factor)
        # The counts are copied to the device once, in the first step.
        with no_host_sync() if number else contextlib.nullcontext():
            scaler.update()
    assert scaler.counts()["skipped_steps"] == 3


def test_a_sample_of_cuda_tensors_reaches_the_host_asynchronously() -> None:
    import torch

    from launcher.monitoring.gather import SampleExchange

    exchange = SampleExchange()
    values: dict[str, Any] = {
        "has_scale": 1.0,
        "scale": torch.tensor(1024.0, device=DEVICE),
        "skipped_steps": torch.tensor(3.0, dtype=torch.float64, device=DEVICE),
        "growth_tracker": torch.tensor([17], dtype=torch.int32, device=DEVICE),
        "floor_steps": 0,
        "loss_not_finite": torch.tensor(True, device=DEVICE),
        "step_seconds": 0.5,
        "data_seconds": 0.125,
        "own_seconds": 0.25,
        "peak_memory": 2**40 + 1,
    }
    with no_host_sync():
        exchange.send(7, 2, values)
        exchange.take()
        # Later training steps must not change a sample in transfer.
        values["scale"].fill_(1.0)
        exchange.send(8, 2, values)
    torch.cuda.synchronize()
    (gathered,) = [g for g in exchange.take(wait=True) if g.step == 8]
    assert gathered.samples == (RankSample(0, 1.0, 3, 17, 0, True, 0.5, 0.125, 0.25, 2**40 + 1),)


def test_a_sample_has_the_values_of_its_step() -> None:
    import torch

    from launcher.monitoring.gather import SampleExchange

    exchange = SampleExchange()
    scale = torch.tensor(1024.0, device=DEVICE)
    # Queue work first, so that the copies run after the scale has changed.
    torch.randn(2000, 2000, device=DEVICE).matmul(torch.randn(2000, 2000, device=DEVICE))
    exchange.send(7, 0, {"has_scale": 1.0, "scale": scale, "loss_not_finite": 0.0})
    scale.fill_(1.0)
    (gathered,) = exchange.take(wait=True)
    assert gathered.samples[0].scale == 1024.0


def test_no_hook_of_the_callback_synchronizes_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from launcher import AmpWandbCallback
    from strategies.loss_scale import CountingGradScaler

    wandb = RecordingWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    scaler = CountingGradScaler(DEVICE, init_scale=16.0)
    amp, trainer = AmpWandbCallback(True, "16", every_n_steps=3), plain_trainer(scaler)
    module = SimpleNamespace(device=torch.device(DEVICE, 0))
    amp.on_train_start(trainer, module)
    for step, factor in enumerate(OVERFLOWS, start=1):
        # The pinned memory and the streams are created before the first step.
        with no_host_sync() if step > 3 else contextlib.nullcontext():
            amp.on_train_batch_start(trainer, module, None, step)
            amp.on_before_backward(trainer, module, None)
        loss = backward(scaler, factor)
        with no_host_sync() if step > 3 else contextlib.nullcontext():
            scaler.update()
            trainer.global_step = step
            amp.on_train_batch_end(trainer, module, {"loss": loss}, None, step)
    amp.on_train_end(trainer, module)
    rows = [row for _, row in wandb.rows]
    assert [row["trainer/global_step"] for row in rows] == [3, 6]
    assert [row["amp/skipped_steps"] for row in rows] == [1, 2]
    assert [row["amp/loss_scale"] for row in rows] == [8.0, 4.0]
    assert all(row["perf/peak_memory_bytes"] == torch.cuda.max_memory_allocated() for row in rows[-1:])


def test_a_real_fp16_training_on_the_gpu_adds_no_host_sync_and_counts_its_overflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lightning.pytorch as pl
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    from launcher import AmpWandbCallback
    from tests.support.amp_ranks import Net, Watched

    wandb = RecordingWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    syncs = []
    for callbacks in ([], [AmpWandbCallback(every_n_steps=3)]):
        watched = Watched()
        trainer = pl.Trainer(
            accelerator="gpu", devices=1, precision="16-mixed", max_steps=6, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
            callbacks=[watched.first, *callbacks, watched.last],
        )  # fmt: skip
        trainer.fit(Net(overflow_on=0), DataLoader(TensorDataset(torch.ones(64, 4)), batch_size=4))
        syncs.append(watched.syncs)
    bare, with_it = syncs
    assert min(bare) > 0
    # Also on steps 3 and 6, which log.
    assert with_it == bare
    rows = [row for _, row in wandb.rows]
    assert [row["trainer/global_step"] for row in rows] == [3, 6]
    assert [row["amp/skipped_steps"] for row in rows][-1] >= 1
    assert rows[0]["amp/loss_scale"] == 65536.0 / 2 ** rows[0]["amp/skipped_steps"]
