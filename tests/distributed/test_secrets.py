"""Real runs with a secret in their settings: no file, including W&B's, and no terminal output contains it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support import wandb_file
from tests.support.processes import launcher, run_warm
from tests.support.runs import REPOSITORY, start_by_hand, train_on

CANARY = "CANARY-x9-token"
MODULE = """
from tests.support.toy import Toy, ToyData
from lightning.pytorch.callbacks import Callback
class Model(Toy):
    def __init__(self, hf_token: str = "", fail: bool = False, hub: dict | None = None) -> None:
        super().__init__()
        if fail:
            raise ValueError("refused: " + hf_token)
        self.save_hyperparameters()
class Count(Callback):
    def __init__(self, api_key: int = 0) -> None:
        pass
"""
ARGUMENTS = ("--model", "mine.Model", "--data", "mine.ToyData", "--name", "a", "--trainer.max_epochs", "1",
             "--accelerator", "cpu", "--trainer.limit_train_batches", "2", "--wandb.mode", "offline")  # fmt: skip


@pytest.fixture
def cwd(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(MODULE)
    return tmp_path


def holders(folder: Path) -> list[Path]:
    """Files that contain the secret; W&B's records are decoded."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert files
    plain = [path for path in files if CANARY.encode() in path.read_bytes() and path.name != "given.yaml"]
    records = [path for path in wandb_file.files(folder) if CANARY in "".join(map(str, wandb_file.records(path)))]
    return [*plain, *records]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_secret_is_nowhere_in_a_run(cwd: Path, ranks: int) -> None:
    env = {"PYTHONPATH": f"{cwd}{os.pathsep}{REPOSITORY}", "WANDB_SILENT": "true"}
    (cwd / "given.yaml").write_text(
        f"model: {{init_args: {{hub: {{password: {CANARY}, uri: 'db://me:{CANARY}@host/x'}}}}}}\n"
    )
    arguments = (*ARGUMENTS, "--config", "given.yaml", "--model.hf_token", CANARY)
    done = train_on(ranks, ["fit", *arguments], cwd, env).check()
    assert CANARY not in done.output
    assert holders(cwd) == []
    assert "hyperparameter hf_token, hub.password, hub.uri is hidden in them" in " ".join(done.output.split())
    assert wandb_file.files(cwd), "W&B ran"
    stored = (cwd / "runs/a/config.yaml").read_text()
    assert "hf_token: ${oc.env:LAUNCHER_SECRET_MODEL_INIT_ARGS_HF_TOKEN}" in stored

    # The same command line resumes the run, and so does one with another token.
    more = ("--resume", "auto", "--trainer.max_epochs", "2")
    changed = [word.replace("token", "TOKEN") if word == CANARY else word for word in arguments]
    again = train_on(ranks, ["fit", *changed, *more], cwd, env).check()
    assert "resuming from" in again.output
    assert holders(cwd) == []
    if ranks == 1:
        refused = run_warm(launcher("fit", "--config", "runs/a/config.yaml", *more), cwd, env=env).check(2)
        for path in ("model.init_args.hf_token", "model.init_args.hub.password", "model.init_args.hub.uri"):
            assert f"{path}: its value is a secret, which is not stored" in refused.output


@pytest.mark.slow
def test_an_error_does_not_show_a_secret(cwd: Path) -> None:
    env = {"PYTHONPATH": f"{cwd}{os.pathsep}{REPOSITORY}"}
    differ = start_by_hand(
        [["fit", *ARGUMENTS, "--model.hf_token", f"{CANARY}{rank}", "--seed", str(rank)] for rank in range(2)], cwd, env
    )
    output = "".join(each.check(2).output for each in differ)
    assert "model.init_args.hf_token: differs on rank 1" in output
    assert "seed: 0 on rank 0" in output
    callback = f"{{class_path: mine.Count, init_args: {{api_key: {CANARY}}}}}"
    wrong = run_warm(launcher("fit", *ARGUMENTS, "--trainer.callbacks", f"[{callback}]"), cwd, env=env).check(2)
    assert "trainer.callbacks[0].init_args.api_key: given '(hidden)'" in wrong.output
    failed = run_warm(
        launcher("fit", *ARGUMENTS, "--model.hf_token", CANARY, "--model.fail", "true"), cwd, env=env
    ).check(1)
    assert "ValueError: refused: (hidden)" in failed.output
    assert CANARY not in output + wrong.output + failed.output
    assert holders(cwd) == []
