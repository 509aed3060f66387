"""Every public Lightning callback in a usual configuration, and the logger calls of users, on 1 and 2 ranks."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import callbacks

from tests.support.callback_user import GROUPS, make_group
from tests.support.processes import Finished, launcher, run_warm
from tests.support.runs import REPOSITORY, start_by_hand
from tests.support.wandb_file import history_rows

pytestmark = pytest.mark.slow

# YAML of users; callbacks with objects as arguments are in `tests.support.callback_user`.
_CONFIG = """
model: {class_path: tests.support.callback_user.Net, init_args: {use_logger: true}}
data: {class_path: tests.support.callback_user.Data}
accelerator: cpu
trainer:
  max_epochs: 2
  log_every_n_steps: 2
  callbacks:
    - class_path: lightning.pytorch.callbacks.LearningRateMonitor
    - {class_path: lightning.pytorch.callbacks.DeviceStatsMonitor, init_args: {cpu_stats: true}}
    - {class_path: lightning.pytorch.callbacks.Timer, init_args: {duration: "00:01:00:00"}}
    - {class_path: lightning.pytorch.callbacks.EarlyStopping, init_args: {monitor: val_loss}}
    - {class_path: lightning.pytorch.callbacks.ModelSummary, init_args: {max_depth: 2}}
    - class_path: lightning.pytorch.callbacks.RichProgressBar
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
    - {class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: {monitor: val_loss, filename: best}}
    - {class_path: lightning.pytorch.callbacks.OnExceptionCheckpoint, init_args: {dirpath: failed}}
    - class_path: lightning.pytorch.callbacks.EMAWeightAveraging
    - class_path: tests.support.callback_user.OwnRows
"""


def user(kind: str, ranks: int, groups: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    """Results by group and rank."""
    env = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    arguments = ["-m", "tests.support.callback_user", kind, str(ranks), *groups]
    output = run_warm([sys.executable, *arguments], folder, env=env, timeout=240).check().output
    # A rank may write its line into the middle of another rank's progress.
    found = [json.JSONDecoder().raw_decode(text)[0] for text in output.split("FOUND ")[1:]]
    assert len(found) == ranks * len(groups), output
    return sorted(found, key=lambda each: (groups.index(each["group"]), each["rank"]))


def test_every_public_callback_is_tested() -> None:
    made = [each for group in GROUPS for each in make_group(group)]
    bases = {base.__name__ for each in made for base in type(each).__mro__}
    assert {*callbacks.__all__} - bases == set()


def test_on_one_rank_every_callback_works_as_in_lightnings_trainer(tmp_path: Path) -> None:
    plain, ours = (user(kind, 1, GROUPS, tmp_path) for kind in ("plain", "launcher"))
    for theirs, mine in zip(plain, ours, strict=True):
        group = theirs["group"]
        assert mine["loggers"] == ["CSVLogger"]
        for name in ("steps", "epochs", "parameters"):
            assert mine[name] == theirs[name], (group, name)
        assert without_times(mine["rows"]) == without_times(theirs["rows"]), group


def without_times(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The rows without measured times."""
    measured = ("DeviceStatsMonitor", "train/", "validate/")
    return [{k: v for k, v in row.items() if not k.startswith(measured)} for row in rows]


def test_on_two_ranks_of_a_script_every_callback_trains_equally(tmp_path: Path) -> None:
    groups = [group for group in GROUPS if group != "batch"]
    found = user("launcher", 2, groups, tmp_path)
    for group, both in itertools.groupby(found, key=lambda each: each["group"]):
        zero, one = both
        assert zero["loggers"] == one["loggers"]
        # The group's scheduler halves the steps of two of three epochs.
        assert (zero["steps"], one["steps"]) == ((8, 8) if group == "average" else (12, 12)), group
        assert zero["parameters"] == one["parameters"], group


@pytest.mark.parametrize(
    ("start", "mode"),
    [("alone", "disabled"), ("agent", "offline"), ("variables", "offline"), ("variables", "disabled")],
)
def test_loggers_and_their_callbacks_on_every_rank(tmp_path: Path, start: str, mode: str) -> None:
    (tmp_path / "run.yaml").write_text(_CONFIG)
    arguments = ["fit", "--config", "run.yaml", "--name", "r", "--wandb.mode", mode]
    ended = _started(start, arguments, tmp_path)
    for each in ended:
        each.check()
    runs = list((tmp_path / "runs" / "r" / "wandb").glob("*run-*"))
    assert len(runs) == (1 if mode == "offline" else 0), "\n".join(each.output for each in ended)
    if mode == "offline":
        keys = {key.split("/")[0] for row in history_rows(runs[0]) for key in row}
        assert {"loss", "val_loss", "lr-SGD", "by_hand", "experiment", "table", "text", "image", "perf"} <= keys
    steps = [path.read_text().split() for path in tmp_path.glob("rows-*.csv")]
    assert [each[-1:] for each in steps] == ([["16"]] if start == "alone" else [["8"]] * 2), "rows are lost"
    (best,) = (tmp_path / "runs" / "r" / "launcher").glob("*/checkpoints/best.ckpt")
    assert f"{best.relative_to(tmp_path)} (val_loss)" in "".join(ended[0].output.split("\n")).replace("  ", "")


def _started(start: str, arguments: list[str], folder: Path) -> list[Finished]:
    env = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    if start == "variables":
        return start_by_hand([arguments, arguments], folder, env)
    ranks = ["--devices", "2" if start == "agent" else "1"]
    return [run_warm(launcher(*arguments, *ranks), folder, env=env)]
