"""The user's W&B settings have priority: a logger, a run of the script, variables; metrics are logged once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import launcher, run_warm
from tests.support.runs import REPOSITORY, start_by_hand
from tests.support.wandb_file import config_of, files, history_rows, records

pytestmark = pytest.mark.slow

_ENV = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
_OWN = """
model: {class_path: tests.support.callback_user.Net, init_args: {lr: 0.125}}
data: {class_path: tests.support.callback_user.Data}
accelerator: cpu
trainer:
  max_epochs: 1
  log_every_n_steps: 1
  logger:
    - {class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: csv}}
    - class_path: lightning.pytorch.loggers.WandbLogger
      init_args: {project: theirs, name: baseline, tags: [a], save_dir: own, config: {precision: kept}}
"""


def place_of(file: Path) -> tuple[str, str, str, list[str]]:
    """Project, id, name and tags of a run."""
    run = next(record.run for record in records(file) if record.HasField("run"))
    return run.project, run.run_id, run.display_name, list(run.tags)


def steps_of(rows: list[dict[str, Any]], key: str) -> list[int]:
    return [row["trainer/global_step"] for row in rows if key in row]


def test_a_user_logger_receives_every_row_once_and_a_resume_continues_its_run(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(_OWN)
    arguments = ["fit", "--config", "run.yaml", "--name", "r"]
    for each in start_by_hand([arguments, arguments], tmp_path, _ENV):
        each.check()
    run_id = (tmp_path / "runs" / "r" / "wandb" / "run_id").read_text().strip()
    (first,) = files(tmp_path)
    assert first.is_relative_to(tmp_path / "own")
    assert place_of(first) == ("theirs", run_id, "baseline", ["a"])
    rows = history_rows(tmp_path)
    # Lightning counts the steps of its rows from 0.
    assert (steps_of(rows, "loss"), steps_of(rows, "perf/step_seconds")) == ([0, 1, 2, 3], [1, 2, 3, 4])
    config = config_of(tmp_path)
    assert config["precision"] == "kept", "the user's values stay"
    assert (config["lr"], config["model_class"], config["plan"]["world_size"]) == (0.125, "Net", 2)
    run_warm(launcher(*arguments, "--resume", "auto", "--trainer.max_epochs", "2"), tmp_path, env=_ENV).check()
    assert [place_of(file)[:2] for file in files(tmp_path)] == [("theirs", run_id)] * 2


def test_the_scripts_wandb_run_receives_every_row_once_and_stays_open(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("""
import wandb
from launcher import TrainingCoordinator
from tests.support.callback_user import Data, Net

run = wandb.init(project="theirs", name="trial", config={"lr": 0.1})
for epochs in (1, 2):
    end = TrainingCoordinator("runs", False, "32", None).train(Net(), Data(), max_epochs=epochs, log_every_n_steps=4)
    assert end["trainer"].logger.experiment is run
    assert wandb.run is run
    wandb.log({f"after_{epochs}": 0.9})
    end["trainer"].validate(end["model"], datamodule=Data(), verbose=False)
wandb.finish()
""")
    run_warm([sys.executable, "train.py"], tmp_path, env=_ENV).check()
    (file,) = files(tmp_path)
    assert place_of(file)[0::2] == ("theirs", "trial")
    rows = history_rows(tmp_path)
    assert (steps_of(rows, "loss"), steps_of(rows, "perf/step_seconds")) == ([3, 7, 3, 7, 11, 15], [4, 8, 4, 8, 12, 16])
    assert [sum(f"after_{n}" in row for row in rows) for n in (1, 2)] == [1, 1]
    # At the end of each of three epochs, and twice after training.
    assert sum("val_loss" in row for row in rows) == 5, "what was logged last is written before the script ends its run"


def test_variables_select_the_wandb_run_and_later_attempts_continue_it(tmp_path: Path) -> None:
    arguments = ["fit", "--model", "tests.support.callback_user.Net", "--data", "tests.support.callback_user.Data",
                 "--accelerator", "cpu", "--trainer.max_epochs", "1", "--wandb.project", "config's", "--name",
                 "r"]  # fmt: skip
    variables = {"WANDB_PROJECT": "theirs", "WANDB_RUN_ID": "fixed", "WANDB_NAME": "trial", "WANDB_TAGS": "a,b"}
    run_warm(launcher(*arguments), tmp_path, env={**_ENV, **variables}).check()
    longer = [*arguments, "--resume", "auto", "--trainer.max_epochs", "2"]
    run_warm(launcher(*longer), tmp_path, env=_ENV).check()
    first, second = files(tmp_path / "runs" / "r")
    assert place_of(first) == ("theirs", "fixed", "trial", ["a", "b"])
    assert place_of(second)[:3] == ("config's", "fixed", "r")


@pytest.mark.parametrize("begin", ["", 'wandb.init(project="theirs")'])
def test_a_module_may_write_keys_of_the_launcher_into_the_wandb_config(tmp_path: Path, begin: str) -> None:
    (tmp_path / "train.py").write_text(f"""
import wandb
from launcher import TrainingCoordinator
from tests.support.callback_user import Data, Net

class Theirs(Net):
    def on_train_start(self):
        # W&B raises where a key has another value.
        self.logger.experiment.config.update({{"num_layers": 2, "precision": "full", "plan": "B", "config": [1]}})

{begin}
for _ in range(2):
    TrainingCoordinator("runs", False, "32", None).train(Theirs(), Data(), max_epochs=1)
    wandb.config["model_type"] = "resnet"
""")
    run_warm([sys.executable, "train.py"], tmp_path, env=_ENV).check()
    config = config_of(tmp_path)
    assert [config[k] for k in ("num_layers", "precision", "plan", "config")] == [2, "full", "B", [1]]
    assert (config["model_type"], config["model_class"]) == ("resnet", "Theirs")
