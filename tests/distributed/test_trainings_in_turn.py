"""Several trainings in one process: each optimizer steps as under plain Lightning, and each model is freed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.support.processes import run_warm

pytestmark = pytest.mark.slow
_SCRIPT = """
import gc, json, sys, warnings, weakref
import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class Net(pl.LightningModule):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(16, 1)

    def training_step(self, batch, batch_idx):
        x = batch[0]
        for block in self.blocks:
            x = block(x)
        return self.head(x).pow(2).mean()

    def configure_optimizers(self):
        options = {"momentum": 0.9} if self.kind == "SGD" else {}
        return getattr(torch.optim, self.kind)(self.parameters(), lr=0.05, **options)

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.ones(16, 16)), batch_size=4)

def whole(p):
    p = p.detach()
    return p.full_tensor() if hasattr(p, "full_tensor") else p

models, sums = [], {}
for kind in ("SGD", "Adagrad", "RMSprop", "Adam", "AdamW", "NAdam"):
    net = Net(kind)
    models.append(weakref.ref(net))
    if sys.argv[1] == "plain":
        pl.Trainer(max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False).fit(net)
    else:
        from launcher import TrainingCoordinator
        TrainingCoordinator(strategy=sys.argv[1], use_gpu=False).train(net)
    sums[kind] = float(sum(whole(p).double().abs().sum() for p in net.parameters()))
    del net
    gc.collect()
print("RESULT", json.dumps({"sums": sums, "alive": [one() is not None for one in models]}))
"""


def _train(strategy: str, folder: Path) -> tuple[dict[str, float], list[bool]]:
    folder.mkdir()
    output = run_warm([sys.executable, "-c", _SCRIPT, strategy], folder, timeout=150).check().output
    found = json.loads(output.partition("RESULT ")[2].partition("\n")[0])
    return found["sums"], found["alive"]


@pytest.mark.parametrize("strategy", ["auto", "fsdp2_offload"])
def test_each_optimizer_steps_as_under_plain_lightning_and_each_model_is_freed(tmp_path: Path, strategy: str) -> None:
    expected, _ = _train("plain", tmp_path / "plain")
    sums, alive = _train(strategy, tmp_path / strategy)
    assert sums == pytest.approx(expected, abs=1e-5)
    assert not any(alive)
