"""Output of user code, and output that users request from Lightning, appears as with Lightning's Trainer."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.support.processes import run_warm
from tests.support.runs import REPOSITORY

pytestmark = pytest.mark.slow

_SCRIPT = """
import contextlib, io, json, logging, sys, warnings
import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from launcher import TrainingCoordinator
from launcher.config.schema import WandbOptions
from tests.support.callback_user import Data, Net

class Talking(Net):
    def on_fit_start(self):
        rank_zero_info("the user's own")
        warnings.filterwarnings("ignore", f"the user's filter with {by}")
    def on_train_epoch_end(self):
        print("epoch", self.current_epoch)
    def test_step(self, batch, batch_idx):
        self.log("test_loss", self._loss(batch[0]))

class Kept(logging.Handler):
    def emit(self, record):
        records.append(record.getMessage())

def fit(by):
    kept = [ModelCheckpoint(by, monitor="val_loss", verbose=True), EarlyStopping("val_loss", verbose=True)]
    options = {"max_epochs": 2, "enable_progress_bar": False, "enable_model_summary": False}
    pl.seed_everything(42, verbose=False)
    if by == "Lightning":
        trainer = pl.Trainer(**options, accelerator="cpu", logger=False, callbacks=kept)
        trainer.fit(Talking(), Data())
        return trainer
    made = TrainingCoordinator("runs", False, "32", None, callbacks=kept, wandb=WandbOptions("disabled"))
    return made.train(Talking(), Data(), **options)["trainer"]

logging.getLogger("lightning.pytorch").addHandler(Kept())
for by in ("Lightning", "launcher"):
    filters, records, printed = warnings.filters[:], [], io.StringIO()
    with contextlib.redirect_stdout(printed):
        trainer = fit(by)
    left = [each for each in warnings.filters if each not in filters]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.test(dataloaders=Data().val_dataloader(), ckpt_path="best", verbose=False)
        warnings.warn("Checkpoint directory x exists and is not empty")
    rank_zero_info("after")
    print("FOUND", json.dumps({"records": records, "left": [str(each[1].pattern) for each in left],
        "warned": [str(each.message) for each in caught], "printed": printed.getvalue().splitlines()}), flush=True)
"""


def test_requested_output_is_shown_and_nothing_stays_hidden_afterwards(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(_SCRIPT)
    env = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    output = run_warm([sys.executable, "train.py"], tmp_path, env=env, timeout=120).check().output
    theirs, ours = (json.loads(line[6:]) for line in output.splitlines() if line.startswith("FOUND"))

    def asked_for(found: dict[str, list[str]]) -> list[str]:
        lines = [line.replace("/Lightning/", "/launcher/") for line in found["records"]]
        return [line for line in lines if line.startswith(("the user's", "Epoch", "Metric", "after"))]

    assert asked_for(ours) == asked_for(theirs)
    assert len(asked_for(ours)) == 6, output
    assert ours["records"][: len(asked_for(ours)) - 1] == asked_for(ours)[:-1], "nothing else while it trains"
    assert ours["left"] == ["the user's filter with launcher"], theirs["left"]
    printed = [line for line in ours["printed"] if line.startswith("epoch ")]
    assert printed == theirs["printed"] == ["epoch 0", "epoch 1"]
    assert not [line for line in ours["warned"] if "multiple `ModelCheckpoint`" in line]
    assert [line for line in ours["warned"] if "is not empty" in line], "hidden in the run alone"
