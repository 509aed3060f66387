"""The coordinator in a notebook: cells in a real Jupyter kernel, and code that is piped to Python."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from tests.support.processes import found_in, run
from tests.support.runs import REPOSITORY, events_of, toy_env

pytestmark = pytest.mark.slow

_PIPED = """
import json, os
from launcher import TrainingCoordinator
from launcher.config.schema import WandbOptions
from tests.support.toy import Toy, ToyData

coordinator = TrainingCoordinator("runs", use_gpu=False, precision="32", devices=2, wandb=WandbOptions("disabled"))
end = coordinator.train(Toy(), ToyData(), name="only", enable_progress_bar=False, enable_model_summary=False)
print("FOUND", json.dumps([end["plan"].world_size, end["trainer"].global_step]), flush=True)
"""


@pytest.mark.case(44)
def test_a_notebook_trains_on_one_process_with_one_notice(tmp_path: Path) -> None:
    (tmp_path / "cells").write_text(_PIPED)
    command = ["sh", "-c", 'exec "$0" - < cells', sys.executable]
    output = run(command, tmp_path, env=toy_env(tmp_path / "trace"), timeout=240).check(0).output
    assert found_in(output) == [[1, 16]]
    assert output.count("notice: this is a notebook, so one process trains instead of 2") == 1
    (notice,) = events_of(tmp_path / "runs" / "only", "notice")
    assert "notebook_processes=True" in notice["message"]
    assert not Path(f"{tmp_path}/trace-1").exists()


# The notebook has used threads before it trains, and its model is defined in a cell.
_MODEL = """
import copy, json, os
import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset
from launcher import TrainingCoordinator
from launcher.config.schema import WandbOptions

torch.set_num_threads(2)
torch.randn(600, 600) @ torch.randn(600, 600)

class Net(pl.LightningModule):
    def __init__(self, fails_at=-1):
        super().__init__()
        self.net = torch.nn.Linear(4, 1)
        self.fails_at = fails_at
        self.pids = [os.getpid()]
    def training_step(self, batch, batch_idx):
        if self.global_rank == 1 and self.global_step == self.fails_at:
            raise ValueError("the cell's own mistake")
        loss = self.net(batch[0]).pow(2).mean()
        self.log("loss", loss, on_epoch=True, sync_dist=True)
        return loss
    def test_step(self, batch, batch_idx):
        self.log("test", self.net(batch[0]).pow(2).mean(), sync_dist=True)
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
data = DataLoader(TensorDataset(x), batch_size=4)
model = Net()
plain = copy.deepcopy(model)
before = dict(os.environ)
coordinator = TrainingCoordinator("runs", use_gpu=False, precision="32", gradient_clip_val=None, devices=2,
                                  notebook_processes=True, wandb=WandbOptions("disabled"))
"""
_TRAIN = 'end = coordinator.train(model, data, name="first", enable_progress_bar=False)'
_LOOK = """
kept = torch.load(end["best_model_path"], weights_only=True)["state_dict"]
print("FOUND", json.dumps({
    "world": end["trainer"].world_size, "steps": end["trainer"].global_step, "epoch": end["trainer"].current_epoch,
    "metrics": sorted(end["final_metrics"]), "same": end["model"] is model, "cuda": torch.cuda.is_initialized(),
    "weights": all(torch.equal(kept[name], value) for name, value in model.state_dict().items()),
    "best": end["trainer"].checkpoint_callback.best_model_path == end["best_model_path"],
    "loss": float(end["trainer"].callback_metrics["loss_epoch"]) == end["final_metrics"]["loss_epoch"],
    "environment": sorted(set(os.environ) - set(before)), "group": torch.distributed.is_initialized()}))
"""
_TEST = """
tested = end["trainer"].test(model, data, verbose=False)
print("FOUND", json.dumps([tested[0]["test"], model.net(x).pow(2).mean().item()]))
"""
_BY_HAND = """
optimizer = torch.optim.SGD(plain.parameters(), 0.1)
for batch in x.split(8):
    optimizer.zero_grad()
    plain.net(batch).pow(2).mean().backward()
    optimizer.step()
print("FOUND", json.dumps(torch.allclose(plain.net.weight, model.net.weight, atol=1e-6)))
"""
_FAIL = 'coordinator.train(Net(fails_at=3), data, name="fails", enable_progress_bar=False)'
_REFUSED = 'coordinator.train(Net(), data, name="first", enable_progress_bar=False)'
_AGAIN = """
end = coordinator.train(model, data, name="second", enable_progress_bar=False)
print("FOUND", json.dumps(end["trainer"].global_step))
"""
# Functions of cells, which use variables of other cells, in processes of their own.
_LAUNCH = """
import launcher
def work(value):
    print("in a rank")
    return [int(os.environ["RANK"]), value, x.shape[0], isinstance(model, Net)]
print("FOUND", json.dumps(launcher.launch(work, (5,))))
"""
# The function needs no Lightning, which the ranks would import too.
_LAUNCH_FAILS = """
import sys
del sys.modules["lightning.pytorch"]
def fails():
    if os.environ["RANK"] == "1":
        raise KeyError("of a cell's function")
launcher.launch(fails)
"""


@pytest.mark.case(44)
def test_a_notebook_trains_on_two_ranks_in_a_real_kernel(tmp_path: Path) -> None:
    cells = [_MODEL, _TRAIN, _LOOK, _TEST, _BY_HAND, _FAIL, _REFUSED, _AGAIN, _LAUNCH, _LAUNCH_FAILS]
    (tmp_path / "cells").write_text(json.dumps(cells))
    folders = {name: str(tmp_path / "home") for name in ("HOME", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR")}
    env = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "2", **folders}
    command = [sys.executable, "-m", "tests.support.notebook_kernel", "cells"]
    shown = run(command, tmp_path, env=env, timeout=280).check(0).output
    outputs = [re.sub(r"\x1b\[[\d;]*m", "", "".join(cell)) for cell in json.loads((tmp_path / "cells").read_text())]
    _, trained, looked, tested, by_hand, failed, refused, again, launched, launch_failed = outputs
    assert "2 x " in trained, shown
    assert "ranks" in trained
    assert "this is a notebook" not in trained
    assert found_in(looked) == [
        {"world": 2, "steps": 8, "epoch": 1, "metrics": ["loss", "loss_epoch", "loss_step"], "same": True,
         "cuda": False, "weights": True, "best": True, "loss": True, "environment": [], "group": False}
    ], looked  # fmt: skip
    ((found, right),) = found_in(tested)
    assert found == pytest.approx(right), "the Trainer that came back evaluates on two ranks"
    assert found_in(by_hand) == [True], "each sample once, the gradients averaged over the ranks"
    # The cell shows the rank's traceback once, with the line of the user's code.
    lines = failed.strip().splitlines()
    lines = lines[next(number for number, line in enumerate(lines) if "failed first" in line) :]
    assert re.fullmatch(r"rank 1 \(.+\) failed first: ValueError: the cell's own mistake at step 3", lines[0]), failed
    assert lines[1].startswith("other ranks: rank 0 ")
    assert lines[-2:] == ['    raise ValueError("the cell\'s own mistake")', "ValueError: the cell's own mistake"]
    assert failed.count("Traceback") == 1
    assert "UsageError: run 'first' exists already" in refused
    assert found_in(again) == [8], again
    assert found_in(launched) == [[[0, 5, 64, True], [1, 5, 64, True]]], launched
    assert all(f"[rank {rank}] in a rank" in launched for rank in (0, 1))
    lines = launch_failed.strip().splitlines()
    assert re.fullmatch(r"rank 1 \(.+\) failed first: KeyError: .*", lines[0]), launch_failed
    assert lines[-2:] == ['    raise KeyError("of a cell\'s function")', 'KeyError: "of a cell\'s function"']
    for name in ("first", "second"):
        logs = (tmp_path / "runs" / name / "logs").iterdir()
        assert sorted(log.name for log in logs) == ["rank-0.log", "rank-1.log"]
