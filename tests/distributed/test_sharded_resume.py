"""Runs under FSDP2 resume with the next batch: on other numbers of ranks, under other strategies, after a kill."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.support.interrupted_runs import STEPS, assert_same, curve, interrupt, run_uninterrupted, train
from tests.support.processes import launcher, run_warm
from tests.support.runs import events_of, toy_env, train_on

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[list[int], float]]:
    return run_uninterrupted(tmp_path_factory.mktemp("uninterrupted"))


def test_a_run_resumes_under_any_strategy_and_number_of_ranks(
    tmp_path: Path, uninterrupted: list[tuple[list[int], float]]
) -> None:
    def last(name: str) -> tuple[str, str]:
        return "--resume", str(tmp_path / "runs" / name / "checkpoints" / "last.ckpt")

    interrupt(tmp_path, "trace", 4, "four", 1, "--strategy", "fsdp2")
    interrupt(tmp_path, "trace", 2, "two", 4, *last("four"), "--strategy", "deepspeed_stage_3")
    interrupt(tmp_path, "trace", 3, "again", 7, *last("two"), "--strategy", "hsdp", "--fsdp.shard_ranks", "1")
    end = train(tmp_path, "trace", 1, "--name", "end", *last("again")).check()

    assert "saved by hsdp on 3 ranks: it is consolidated for single_device" in " ".join(end.output.split())
    assert_same(curve(tmp_path, "trace"), uninterrupted)
    assert not list((tmp_path / "runs").glob("*/.resume-whole*"))

    source, one = str(tmp_path / "runs" / "again" / "checkpoints" / "last.ckpt"), tmp_path / "one.ckpt"
    run_warm(launcher("convert", source, str(one), "--format", "lightning"), tmp_path).check()
    content = torch.load(one, weights_only=True)
    assert content["global_step"] in (8, 9)
    steps = [value["step"] for value in content["optimizer_states"][0]["state"].values()]
    assert steps == [torch.tensor(float(content["global_step"]))] * 4


SAVES = """
from tests.support.toy import NoisyData, Toy


class Model(Toy):
    def validation_step(self, batch, batch_idx):
        self.log("val", ((self.net(batch[1]).squeeze(-1) - batch[1].sum(-1)) ** 2).mean(), sync_dist=True)

    def test_step(self, batch, batch_idx):
        self.validation_step(batch, batch_idx)


class Data(NoisyData):
    def test_dataloader(self):
        return self.val_dataloader()
"""


@pytest.fixture(scope="module")
def saves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run on two ranks that has saved in each way that Lightning offers."""
    folder = tmp_path_factory.mktemp("saves")
    (folder / "mine.py").write_text(SAVES)
    (folder / "run.yaml").write_text(
        "trainer:\n"
        "  callbacks:\n"
        "  - class_path: lightning.pytorch.callbacks.ModelCheckpoint\n"
        "    init_args: {dirpath: best, filename: 'best-{step}', monitor: val, save_top_k: 2, save_last: link}\n"
        "  - class_path: lightning.pytorch.callbacks.ModelCheckpoint\n"
        "    init_args: {dirpath: steps, filename: '{step}', every_n_train_steps: 3, save_top_k: -1, "
        "save_weights_only: true}\n"
    )
    arguments = ("--config", "run.yaml", "--model", "mine.Model", "--data", "mine.Data",
                 "--name", "it", "--wandb.mode", "disabled", "--strategy", "fsdp2", "--trainer.max_epochs", "4",
                 "--checkpoint.every_n_steps", "2", "--global_batch_size", "16")  # fmt: skip
    env = {**toy_env(folder / "trace"), "PYTHONPATH": f"{folder}{os.pathsep}{toy_env(folder)['PYTHONPATH']}"}
    train_on(2, arguments, folder, env).check()
    return folder


def test_every_way_to_save_writes_folders(saves: Path) -> None:
    def names(folder: Path) -> list[str]:
        return sorted(path.name for path in folder.iterdir())

    assert all((path / ".metadata").is_file() for part in ("best", "steps") for path in (saves / part).glob("*.ckpt"))
    found = names(saves / "best")
    assert len(found) == 3, "save_top_k removes folders, and a folder of the user has no manifests"
    assert found[-1] == "last.ckpt"
    assert (saves / "best" / "last.ckpt").is_symlink()
    assert names(saves / "steps") == ["step=12.ckpt", "step=15.ckpt", "step=3.ckpt", "step=6.ckpt", "step=9.ckpt"]
    own = saves / "runs" / "it" / "checkpoints"
    assert {"last.ckpt", "last.ckpt.manifest"} < {*names(own)}
    assert not [path for path in saves.rglob("*") if path.name.endswith((".new", "-before.ckpt"))]


def test_a_folder_is_evaluated_on_any_number_of_ranks(saves: Path) -> None:
    env = {**toy_env(saves / "trace"), "PYTHONPATH": f"{saves}{os.pathsep}{toy_env(saves)['PYTHONPATH']}"}
    best = str(next((saves / "best").glob("best*.ckpt")))
    for ranks, command, checkpoint in ((1, "validate", best), (2, "test", "last")):
        arguments = (command, "--name", "it", "--checkpoint", checkpoint)
        train_on(ranks, arguments, saves, env).check()
    evaluated = events_of(saves / "runs" / "it", "evaluated")
    assert [event["command"] for event in evaluated] == ["validate", "test"]
    values = [event["metrics"][0]["val"] for event in evaluated]
    assert all(0 < value < 20 for value in values), values


def test_weights_alone_do_not_continue_a_training(saves: Path, tmp_path: Path) -> None:
    source = str(saves / "steps" / "step=3.ckpt")
    refused = train(tmp_path, "trace", 1, "--resume", source).check(2)
    assert "is not a Lightning training checkpoint: it lacks optimizer_states" in " ".join(refused.output.split())
    run_warm(launcher("convert", source, "weights.safetensors"), tmp_path).check()
    assert (tmp_path / "weights.safetensors").stat().st_mode & 0o777 == 0o600


def test_a_killed_rank_resumes_from_the_last_complete_folder(
    tmp_path: Path, uninterrupted: list[tuple[list[int], float]]
) -> None:
    """The last folder of the first part is damaged, and one was never completed."""
    arguments = ("--strategy", "fsdp2", "--checkpoint.every_n_steps", "2", "--name", "it")
    interrupt(tmp_path, "trace", 2, "it", 6, *arguments)
    checkpoints = tmp_path / "runs" / "it" / "checkpoints"
    part = checkpoints / "last.ckpt" / "__1_0.distcp"
    part.write_bytes(part.read_bytes()[:-1])
    (checkpoints / ".last.ckpt.new").mkdir()
    (checkpoints / ".last.ckpt.new" / "__0_0.distcp").write_bytes(b"half")
    again = train(tmp_path, "trace", 2, "--resume", "auto", *arguments).check()
    assert "last.ckpt is skipped: __1_0.distcp in it has" in " ".join(again.output.split())
    assert_same(curve(tmp_path, "trace"), uninterrupted)
    assert events_of(tmp_path / "runs" / "it", "finished")[-1]["step"] == STEPS
    assert not [path for path in checkpoints.iterdir() if path.name.startswith(".") or "before" in path.name]


def test_a_folder_with_code_ends_the_run_before_training(tmp_path: Path, saves: Path) -> None:
    import pickle
    import shutil

    source = tmp_path / "other.ckpt"
    shutil.copytree(saves / "runs" / "it" / "checkpoints" / "last.ckpt", source)

    class RunsCode:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "mark"),)

    (source / ".metadata").write_bytes(pickle.dumps(RunsCode()))
    refused = train(tmp_path, "trace", 2, "--resume", str(source), "--strategy", "fsdp2").check(2)
    text = " ".join(refused.output.split())
    assert f"resume: {source} is damaged: .metadata cannot be read: it names posix.mkdir" in text
    assert not (tmp_path / "mark").exists()
