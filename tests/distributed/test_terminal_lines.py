"""Every line of a run is the launcher's or the user's: in a terminal of 80 columns, in a pipe, and after a restart."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.processes import launcher
from tests.support.runs import REPOSITORY, train_on
from tests.support.warm import DEEPSPEED

pexpect = pytest.importorskip("pexpect")
pytestmark = pytest.mark.slow

_MODULE = """
import os, signal, warnings
import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

METRICS = ("train_loss", "train_regression_mean_absolute_error", "train_regression_root_mean_squared_error",
           "train_gradient_norm_of_the_encoder_part")

class Net(pl.LightningModule):
    def __init__(self, crash: bool = False):
        super().__init__()
        self.encoder, self.crash = torch.nn.Linear(4, 1), crash

    def training_step(self, batch, batch_idx):
        if self.global_step == 4:
            print("the user's print")
            warnings.warn("the user's warning", stacklevel=1)
        if self.crash and self.global_step == 6 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        for index, name in enumerate(METRICS):
            self.log(name, 0.5 + index, prog_bar=index < 2)
        return self.encoder(batch[0]).pow(2).mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", 0.25, prog_bar=True, sync_dist=True)
        self.log("validation_regression_mean_absolute_error", 0.125, sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())

class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.ones(32, 4)), batch_size=2)

    val_dataloader = train_dataloader
"""
_LINES = re.compile(r"""
    Plan | (ranks|strategy|precision|batch|not\ taken)\ .* | \ {6,}\S.*  # the plan
  | notice:\ W&B\ is\ offline.* | resuming\ from\ .*
  | Model\ Net:\ 5\ parameters\ \(20\ B\),\ all\ trained | \ \ encoder\ \ Linear\ \ 5
  | (Epoch\ \d/1|Sanity\ Checking|Validation)\ .* | (train|val|validation)_\w+\ [\d.]+(\ \ .*)?  # the bar
  | step\ \d+/\d+\ \ .* | validation\ at\ step\ \d+\ \ .*
  | error:\ rank\ \d.* | \ \ (its\ last\ lines|rank\ \d|restart\ 1\ of\ 1).* | \ \ \ \ \|\ .*  # the failure
  | \ \ \ \ \(/.*\.log\):  # the log of the rank, on a line of its own where its path is long
  | .*line\ \d+,\ in\ .* | .*/site-packages/.*  # where the other rank was
  | the\ user's\ print | .*net\.py:\d+:(\ UserWarning:\ the\ user's\ warning)? | UserWarning:\ the\ user's\ warning
  | \ \ warnings\.warn\(.*
  | Done | (steps|metrics|run|checkpoint|W&B|report|continue)\ .*
""", re.VERBOSE)  # fmt: skip
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
# Commands and paths are not divided: the terminal wraps them. A line of a log is as long as it was, and its prefix.
_MAY_BE_LONG = re.compile(
    r"(W&B|report|continue|checkpoint|run|resuming|error|  its last|    [|(]|.*UserWarning|  rank)"
)


def arguments(folder: Path, *more: str) -> list[str]:
    (folder / "net.py").write_text(_MODULE, encoding="utf-8")
    csv = '{"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "csv"}}'
    return ["fit", "--model", "net.Net", "--data", "net.Data", "--name", "it", "--accelerator", "cpu",
            "--wandb.mode", "offline", "--trainer.logger+", csv, "--trainer.max_epochs", "2",
            "--trainer.log_every_n_steps", "2", "--trainer.limit_val_batches", "2", *more]  # fmt: skip


def foreign_lines(lines: Sequence[str]) -> list[str]:
    return [line for line in lines if not _LINES.fullmatch(line)]


def test_a_terminal_of_80_columns_with_a_restart_on_two_ranks(tmp_path: Path) -> None:
    given = ("--devices", "2", "--max-restarts", "1", "--checkpoint.every_n_steps", "2", "--model.crash", "true")
    command = launcher(*arguments(tmp_path, *given))
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TERM": "xterm", "WANDB_API_KEY": ""}
    for name in ("COLUMNS", "NO_COLOR", "FORCE_COLOR"):
        env.pop(name, None)
    child = pexpect.spawn(command[0], command[1:], cwd=str(tmp_path), env=env, dimensions=(24, 80), timeout=180,
                          encoding="utf-8")  # fmt: skip
    child.expect(pexpect.EOF)
    child.close()
    output = child.before
    assert child.exitstatus == 0, output
    # A redraw begins with a carriage return.
    drawn = [_CONTROL.sub("", part).rstrip() for line in output.split("\n") for part in line.split("\r")]
    lines = [line for line in drawn if line]
    assert foreign_lines(lines) == []
    assert [line for line in lines if len(line) > 80 and not _MAY_BE_LONG.match(line)] == []
    assert sum(line.startswith("Model Net") for line in lines) == 1, "once, and not again after the restart"
    assert sum(line.startswith("W&B  ") for line in lines) == 1
    assert sum(line == "Plan" for line in lines) == 2
    assert any(line.startswith("Epoch 1/1 ━") and " steps/s (mean " in line and " ETA 0:0" in line for line in lines)
    shown = {name for line in lines for name in re.findall(r"(\w+) [\d.]+", line)}
    assert {"train_loss", "train_regression_root_mean_squared_error", "validation_regression_mean_absolute_error",
            "train_gradient_norm_of_the_encoder_part"} <= shown  # fmt: skip
    assert output.rstrip().rfind("\x1b[?25h") > output.rfind("\x1b[?25l"), "the cursor is visible"


def test_lines_in_a_pipe_are_not_wrapped(tmp_path: Path) -> None:
    env = {"PYTHONPATH": str(REPOSITORY), "COLUMNS": "", "OMP_NUM_THREADS": "1", "WANDB_API_KEY": ""}
    given = arguments(tmp_path, "--strategy", "deepspeed_stage_2")
    output = train_on(2, given, tmp_path, env, preloaded=DEEPSPEED).check().output
    lines = [line for line in output.splitlines() if line]
    assert foreign_lines(lines) == []
    first, end = (next(n for n, line in enumerate(lines) if line.startswith(name)) for name in ("metrics ", "run "))
    assert "val_loss 0.25" in " ".join(lines[first:end])
    assert max(map(len, lines[first:end])) <= 160
    assert all(line == line.rstrip() for line in lines)
    assert sum(line.startswith("the user's print") for line in lines) == 1
