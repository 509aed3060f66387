"""User checkpoint callbacks, in any number and with any settings, besides the run's own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support.processes import Finished, found_in, launcher, run_warm
from tests.support.runs import REPOSITORY, events_of

pytestmark = pytest.mark.slow

_HEAD = """
import json, os, sys
from datetime import timedelta
from pathlib import Path

import fsspec
import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from launcher import TrainingCoordinator
from launcher.config.schema import CheckpointOptions, WandbOptions
from tests.support.callback_user import Data, Net


class Mine(ModelCheckpoint):
    pass


class Bringing(Net):
    def __init__(self, brought):
        super().__init__()
        self.brought = brought

    def configure_callbacks(self):
        return self.brought()
"""
# Each runs once with Lightning's Trainer and once with the launcher.
_SETTINGS = """
SETTINGS = {
    "usual": lambda d: [ModelCheckpoint(d)],
    "same as the run's": lambda d: [ModelCheckpoint(d, "{epoch}-{step}", save_last=True, enable_version_counter=False)],
    "best": lambda d: [ModelCheckpoint(d, "best-{val_loss:.2f}", monitor="val_loss", save_top_k=2, save_last=True)],
    "best by a high value": lambda d: [ModelCheckpoint(d, monitor="val_loss", mode="max")],
    "all steps": lambda d: [ModelCheckpoint(d, every_n_train_steps=5, save_top_k=-1)],
    "time": lambda d: [ModelCheckpoint(d, train_time_interval=timedelta(days=1), save_last=True)],
    "none but the last": lambda d: [ModelCheckpoint(d, save_top_k=0, save_last=True)],
    "a link": lambda d: [ModelCheckpoint(d, save_last="link")],
    "weights": lambda d: [ModelCheckpoint(d, save_weights_only=True, every_n_epochs=2)],
    "a class of the user's": lambda d: [Mine(d, monitor="val_loss")],
    "two": lambda d: [ModelCheckpoint(d, "{epoch}", monitor="val_loss"), ModelCheckpoint(d, every_n_train_steps=9)],
}


def files(folder):
    return sorted(p.name for p in folder.iterdir())


def quiet():
    return {"max_epochs": 3, "enable_progress_bar": False, "enable_model_summary": False}


def by_lightning(make, kept, folder):
    pl.seed_everything(42, verbose=False)
    trainer = pl.Trainer(**quiet(), accelerator="cpu", devices=1, logger=False, callbacks=kept(folder))
    trainer.fit(make(), Data())
    return trainer


def by_launcher(make, kept, folder, name, **options):
    pl.seed_everything(42, verbose=False)
    made = TrainingCoordinator("runs", False, "32", None, callbacks=kept(folder), wandb=WandbOptions("disabled"))
    end = made.train(make(), Data(), name=name, **{**quiet(), **options})
    assert Path(f"runs/{name}/checkpoints/last.ckpt").is_file(), "a resume needs it"
    return end
"""


def script(folder: Path, text: str, code: int = 0) -> Finished:
    (folder / "train.py").write_text(_HEAD + _SETTINGS + text)
    env = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return run_warm([sys.executable, "train.py"], folder, env=env, timeout=240).check(code)


def test_user_checkpoints_are_the_same_as_in_lightnings_trainer(tmp_path: Path) -> None:
    output = script(tmp_path, """
for number, (name, kept) in enumerate(SETTINGS.items()):
    theirs, ours = Path(f"plain-{number}").absolute(), Path(f"ours-{number}").absolute()
    plain = by_lightning(Net, kept, theirs)
    end = by_launcher(Net, kept, ours, f"run-{number}")
    first, mine = plain.checkpoint_callback, end["trainer"].checkpoint_callback
    best = lambda c, d: os.path.relpath(c.best_model_path, d) if c.best_model_path else ""
    print("FOUND", json.dumps({"name": name, "theirs": files(theirs), "ours": files(ours),
        "best": [best(first, theirs), best(mine, ours)], "reported": end["best_model_path"], "folder": str(ours),
        "monitor": mine.monitor, "score": [str(first.best_model_score), str(mine.best_model_score)]}), flush=True)
""").output  # fmt: skip
    found = found_in(output)
    assert len(found) == 11, output
    for each in found:
        assert each["ours"] == each["theirs"], each["name"]
        assert each["best"][0] == each["best"][1], each["name"]
        assert each["score"][0] == each["score"][1], each["name"]
        if each["monitor"] is not None:
            assert each["reported"] == f"{each['folder']}/{each['best'][0]}", each["name"]


def test_a_model_with_checkpoint_callbacks_keeps_the_runs_callback(tmp_path: Path) -> None:
    output = script(tmp_path, """
brought = {
    "one": lambda: ModelCheckpoint("one", monitor="val_loss"),
    "of the user's class": lambda: [Mine("two")],
    "several": lambda: [EarlyStopping("val_loss"), ModelCheckpoint("three"), Mine("four", monitor="val_loss")],
}
for number, (name, make) in enumerate(brought.items()):
    end = by_launcher(lambda: Bringing(make), lambda d: [], None, f"run-{number}")
    keepers = end["trainer"].checkpoint_callbacks
    print("FOUND", json.dumps({"classes": [type(c).__name__ for c in keepers],
        "places": [os.path.relpath(c.dirpath) for c in keepers], "best": end["best_model_path"]}), flush=True)
""").output  # fmt: skip
    one, own, several = found_in(output)
    assert one["classes"] == ["ModelCheckpoint", "RunCheckpoint"], "Trainer.checkpoint_callback is the user's"
    assert own["classes"] == ["Mine", "RunCheckpoint"]
    assert several["places"] == ["three", "four", "runs/run-2/checkpoints"]
    assert [Path(each["best"]).parent.name for each in (one, own, several)] == ["one", "two", "four"]


def test_urls_are_handled_as_by_fsspec(tmp_path: Path) -> None:
    output = script(tmp_path, """
here = Path.cwd()
for number, url in enumerate(("memory://kept", f"file://{here}/local", f"file://{here}/with space")):
    kept = lambda d: [ModelCheckpoint(d, "{epoch}", monitor="val_loss", save_top_k=1, save_last=True)]
    end = by_launcher(Net, kept, url, f"run-{number}")
    print("FOUND", json.dumps({"best": end["best_model_path"]}), flush=True)
print("FOUND", json.dumps({"memory": fsspec.filesystem("memory").ls("/kept", detail=False)}), flush=True)
""").output  # fmt: skip
    remote, local, spaced, memory = found_in(output)
    assert remote["best"].startswith("memory://kept/epoch=")
    for each, folder in ((local, "local"), (spaced, "with space")):
        assert each["best"] == str(tmp_path / folder / Path(each["best"]).name)
        assert (tmp_path / folder / "last.ckpt").is_file()
    assert not (tmp_path / "file:").exists()
    assert len(memory["memory"]) == 2, "the best and the last: the one that was best before is removed"


def test_the_runs_callback_state_is_restored_from_an_old_checkpoint(tmp_path: Path) -> None:
    output = script(tmp_path, """
import torch

def train(name, epochs, resume=None):
    made = TrainingCoordinator("runs", False, "32", None, wandb=WandbOptions("disabled"))
    made._config = __import__("dataclasses").replace(made._config, checkpoint=CheckpointOptions(monitor="val_loss"))
    return made.train(Net(), Data(), name=name, resume_from_checkpoint=resume, **{**quiet(), "max_epochs": epochs})

train("first", 2)
path = Path("runs/first/checkpoints/last.ckpt")
saved = torch.load(path, weights_only=True)
# As runs before had it: Lightning's own class.
(key,) = [key for key in saved["callbacks"] if key.startswith("RunCheckpoint")]
state = saved["callbacks"].pop(key)
saved["callbacks"]["ModelCheckpoint" + key.removeprefix("RunCheckpoint")] = {**state, "best_model_path": "the-old-one"}
torch.save(saved, "old.ckpt")
end = train("second", 2, "old.ckpt")
print("FOUND", json.dumps({"best": end["trainer"].checkpoint_callback.best_model_path}), flush=True)
""").output  # fmt: skip
    assert found_in(output) == [{"best": "the-old-one"}]


def test_a_run_without_checkpoints_reports_it_and_does_not_start_again_silently(tmp_path: Path) -> None:
    arguments = ["fit", "--model", "tests.support.callback_user.Net", "--data", "tests.support.callback_user.Data",
                 "--accelerator", "cpu", "--wandb.mode", "disabled", "--trainer.max_epochs", "1", "--name",
                 "r"]  # fmt: skip
    env = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    run_warm(launcher(*arguments, "--trainer.enable_checkpointing", "false"), tmp_path, env=env).check()
    notices = [event["message"] for event in events_of(tmp_path / "runs" / "r", "notice")]
    assert notices == ["trainer.enable_checkpointing is false: nothing is saved, and this run cannot be resumed"]
    output = run_warm(launcher(*arguments, "--resume", "auto"), tmp_path, env=env).check(2).output
    assert "run 'r' trained to step 8, but" in output
    # A requeued SLURM job may start its run again, with a notice.
    run_warm(launcher(*arguments, "--resume", "auto"), tmp_path, env={**env, "SLURM_RESTART_COUNT": "1"}).check()
    notices = [event["message"] for event in events_of(tmp_path / "runs" / "r", "notice")]
    assert notices[1:] == ["the run trained to step 8 before without saving a checkpoint: it starts again at step 0"]
