"""`launcher validate`, `test` and `predict` on real runs, compared with plain Lightning on one device."""

from __future__ import annotations

import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from launcher.agreement.script_ranks import make_rank_variables
from launcher.checkpoint.deepspeed import read_consolidated
from tests.support import wandb_file
from tests.support.processes import Finished, launcher, run, run_warm
from tests.support.runs import REPOSITORY, events_of, free_port, train_on
from tests.support.warm import DEEPSPEED

pytestmark = pytest.mark.slow

_THEIRS = """
import torch
from torch.utils.data import DataLoader
from tests.support.toy import Numbers, Toy, ToyData

class Data(ToyData):
    def val_dataloader(self):
        # 17 samples: no number of ranks but one divides them.
        return DataLoader(Numbers(17), batch_size=self.batch_size)
    test_dataloader = predict_dataloader = val_dataloader

class Model(Toy):
    def error(self, batch):
        return (self.net(batch[1]).squeeze(-1) - batch[1].sum(-1)) ** 2
    def validation_step(self, batch, batch_idx):
        self.log("val", self.error(batch).mean(), sync_dist=True)
    def test_step(self, batch, batch_idx):
        self.log("test", self.error(batch).mean(), sync_dist=True)
    def predict_step(self, batch, batch_idx):
        return self.net(batch[1]).squeeze(-1)
"""
_TRAINED = ("fit", "--model", "evaluated.Model", "--data", "evaluated.Data", "--accelerator", "cpu",
            "--trainer.max_epochs", "3", "--trainer.enable_model_summary", "false",
            "--checkpoint.monitor", "val")  # fmt: skip


def env_of(folder: Path) -> dict[str, str]:
    return {"PYTHONPATH": f"{folder}:{REPOSITORY}", "DS_ACCELERATOR": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one run, `first`, trained on one rank, with W&B offline."""
    made = tmp_path_factory.mktemp("evaluate")
    (made / "evaluated.py").write_text(_THEIRS)
    train_on(1, [*_TRAINED, "--name", "first", "--wandb.mode", "offline"], made, env_of(made)).check()
    return made


def evaluate(folder: Path, ranks: int, command: str, *arguments: str, name: str = "first", code: int = 0) -> Finished:
    config = ("--config", f"runs/{name}/config.yaml")
    return train_on(ranks, [command, *config, *arguments], folder, env_of(folder), preloaded=DEEPSPEED).check(code)


def plain(folder: Path, checkpoint: Path, *, stage: str = "test") -> float:
    """Results of plain Lightning on one device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        import evaluated  # pyright: ignore[reportMissingImports]

        content = read_consolidated(checkpoint) if checkpoint.is_dir() else torch.load(checkpoint, weights_only=True)
        model = evaluated.Model()
        model.load_state_dict(content["state_dict"])
        trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
                             enable_model_summary=False, enable_checkpointing=False)  # fmt: skip
        evaluates: Any = trainer.test if stage == "test" else trainer.validate
        return evaluates(model, datamodule=evaluated.Data(), verbose=False)[0]["test" if stage == "test" else "val"]


def checkpoints(folder: Path, name: str = "first") -> tuple[Path, Path]:
    """The best one and the last."""
    kept = folder / "runs" / name / "checkpoints"
    (best,) = kept.glob("epoch*.ckpt")
    return best, kept / "last.ckpt"


@pytest.mark.parametrize("ranks", [1, 2])
def test_metrics_equal_plain_lightnings_on_any_number_of_ranks(folder: Path, ranks: int) -> None:
    best, last = checkpoints(folder)
    run_directory = folder / "runs" / "first"
    before = len(events_of(run_directory, "evaluated"))
    output = evaluate(folder, ranks, "test").output
    right = plain(folder, best)
    assert output.count("Test metric") == 1, output
    evaluate(folder, ranks, "validate", "--checkpoint", "last", "--wandb.mode", "disabled")
    events = events_of(run_directory, "evaluated")[before:]
    assert [(event["command"], event["checkpoint"]) for event in events] == [
        ("test", str(best)), ("validate", str(last))
    ]  # fmt: skip
    assert events[0]["metrics"] == [{"test": pytest.approx(right, rel=1e-6)}]
    assert events[1]["metrics"] == [{"val": pytest.approx(plain(folder, last, stage="validate"), rel=1e-6)}]
    assert [path.name for path in (folder / "runs").iterdir() if path.is_dir()] == ["first"], "no run is made for it"
    # The run's W&B run continues, at the step of the checkpoint.
    rows = [row for row in wandb_file.history_rows(run_directory) if "test" in row]
    step = torch.load(best, weights_only=True)["global_step"]
    assert rows[-1]["test"] == pytest.approx(right, rel=1e-6)
    assert rows[-1]["trainer/global_step"] == step
    assert len(rows) == 1 + before // 2, "nothing while it was disabled"


def test_predictions_are_in_a_private_file_for_each_rank_and_replace_earlier_ones(folder: Path) -> None:
    where = folder / "runs" / "first" / "predictions"
    for ranks in (2, 1):
        output = evaluate(folder, ranks, "predict").output
        more = " and rank-1.pt" if ranks == 2 else ""
        assert re.findall(r"predictions: 17 samples in \d+ batches: (runs/.*)", output) == [
            f"runs/first/predictions/rank-0.pt{more}"
        ]
        files = sorted(where.iterdir())
        assert [file.name for file in files] == [f"rank-{rank}.pt" for rank in range(ranks)]
        assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
        found: dict[int, float] = {}
        for file in files:
            content = torch.load(file, weights_only=True)
            for numbers, values in zip(content["batch_indices"][0], content["predictions"], strict=True):
                found.update(zip(numbers, values.tolist(), strict=True))
        assert sorted(found) == list(range(17))


def test_the_agents_ranks_evaluate_too_and_the_metrics_are_printed_once(folder: Path) -> None:
    arguments = launcher(
        "test", "--config", "runs/first/config.yaml", "--nproc-per-node", "2", "--wandb.mode", "disabled"
    )
    output = run(arguments, folder, env=env_of(folder), timeout=200).check().output
    assert output.count("Test metric") == 1
    assert f"{plain(folder, checkpoints(folder)[0]):.5f}" in output


_ZERO = """
import json, sys
import deepspeed, torch
import evaluated
from launcher import TrainingCoordinator
from launcher.config.schema import WandbOptions

model, data = evaluated.Model(), evaluated.Data()
coordinator = TrainingCoordinator("runs", use_gpu=False, precision="32", devices=2, strategy="deepspeed_stage_3",
                                  wandb=WandbOptions("disabled"))
trainer = coordinator.train(model, data, name="zero", enable_progress_bar=False)["trainer"]
found = [trainer.test(model, datamodule=data, verbose=False)[0]["test"]]
with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
    for parameter in model.parameters():
        parameter.data.zero_()
found.append(trainer.test(model, datamodule=data, verbose=False, ckpt_path="best")[0]["test"])
sys.stdout.write(f"FOUND {json.dumps(found)}\\n")
"""


def test_a_checkpoint_of_zero_3_is_evaluated_by_its_trainer_and_without_deepspeed(folder: Path) -> None:
    (folder / "zero.py").write_text(_ZERO)
    outputs = script_on_two_ranks(folder, "zero.py")
    best, _ = checkpoints(folder, "zero")
    assert best.is_dir()
    right = plain(folder, best)
    for output in outputs:
        (line,) = (line for line in output.splitlines() if line.startswith("FOUND"))
        now, restored = json.loads(line.removeprefix("FOUND "))
        # Lightning's sampler repeats the first sample on the second rank.
        assert restored == pytest.approx(now, rel=1e-6)
        assert now == pytest.approx(right, rel=0.2)
    output = evaluate(folder, 1, "test", "--data", "evaluated.Data", "--devices", "1", name="zero").output
    (event,) = events_of(folder / "runs" / "zero", "evaluated")
    assert event["metrics"] == [{"test": pytest.approx(right, rel=1e-6)}]
    assert "saved by ZeRO stage 3 in fp32 on 2 ranks: it is consolidated for single_device" in output
    assert not list((folder / "runs" / "zero").glob(".*.ckpt")), "what was made for it is gone"


def script_on_two_ranks(folder: Path, script: str) -> list[str]:
    """Output of both ranks."""
    port = free_port()

    def one(rank: int) -> str:
        env = {**env_of(folder), **make_rank_variables(rank, 2, port)}
        command = [sys.executable, script]
        return run_warm(command, folder, env=env, timeout=200, preloaded=DEEPSPEED).check().output

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, range(2)))


def test_invalid_evaluations_are_reported(folder: Path) -> None:
    arguments = ["test", "--model", "tests.support.toy.Toy", "--data", "evaluated.Data", "--accelerator", "cpu"]
    output = train_on(1, [*arguments, "--name", "first"], folder, env_of(folder)).check(2).output
    assert "error: Toy has no test_step, which `launcher test` needs; add it" in output
    output = train_on(1, [*arguments, "--name", "other"], folder, env_of(folder)).check(2).output
    assert "error: there is no run 'other' in" in output
    assert not (folder / "runs" / "other").exists()
