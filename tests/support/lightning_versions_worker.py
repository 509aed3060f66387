"""A training with `AmpWandbCallback` under the installed Lightning; run by `lightning_versions`."""

from __future__ import annotations

import importlib
import json
import logging
import sys
import types
import warnings
from typing import Any

import torch
from torch.utils.data import DataLoader

warnings.filterwarnings("ignore")
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
try:
    pl: Any = importlib.import_module("lightning.pytorch")
except ImportError:
    pl = importlib.import_module("pytorch_lightning")

from launcher import AmpWandbCallback  # noqa: E402

rows: list[tuple[int, dict[str, Any]]] = []
wandb: Any = types.ModuleType("wandb")
wandb.run = types.SimpleNamespace(step=0, summary={})
wandb.log = lambda row, step, commit: rows.append((step, row))
wandb.alert = wandb.define_metric = lambda *_, **__: None
sys.modules["wandb"] = wandb


class Model(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 8)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = self.layer(batch).square().mean()
        return loss * float("inf") if self.global_step == 3 else loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


def main() -> None:
    plugins = importlib.import_module(f"{pl.__name__}.plugins.precision")
    is_old = pl.__version__.startswith("1.")
    mixed = plugins.MixedPrecisionPlugin if is_old else plugins.MixedPrecision
    plugin = mixed("16" if is_old else "16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    callback = AmpWandbCallback(True, "16", every_n_steps=4)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=2, plugins=[plugin], callbacks=[callback], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Model(), DataLoader(torch.randn(64, 8), batch_size=8))
    callback.flush()
    last = rows[-1][1]
    print(
        json.dumps(
            {
                "version": pl.__version__,
                "precision": str(trainer.precision),
                "steps": [step for step, _ in rows],
                "scale": last.get("amp/loss_scale"),
                "skipped": last.get("amp/skipped_steps"),
            }
        )
    )


if __name__ == "__main__":
    main()
