"""The loggers of a run: the user's first, and W&B as configured."""

from __future__ import annotations

import pickle
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

from launcher.config.lightning_cli import translate_lightning_cli
from launcher.config.validation import parse_config
from launcher.loggers.selection import (
    choose_loggers,
    list_own_loggers,
    logs_to_wandb,
    make_wandb_logger,
    wants_no_logger,
)
from launcher.loggers.wandb_run import QueuedWandbLogger, finish_wandb
from launcher.runs.directory import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path, None, "abcd1234", is_new=True)


def loggers_of(run: RunDirectory, values: dict[str, Any], *own: Any) -> list[Any]:
    config = parse_config(translate_lightning_cli(values)[0])
    ours = make_wandb_logger(config.wandb, run, {}, pytest.fail)
    return choose_loggers(list_own_loggers(config, own, run), ours, run, is_off=wants_no_logger(config))


OFF = {"wandb": {"mode": "disabled"}}


@pytest.mark.parametrize("values", [{}, OFF, {"trainer": {"logger": None}}], ids=str)
def test_without_one_of_the_users_the_logger_is_wandbs(run: RunDirectory, values: dict[str, Any]) -> None:
    (logger,) = loggers_of(run, values)
    assert isinstance(logger, QueuedWandbLogger)
    assert logs_to_wandb([logger]) is (values != OFF)


@pytest.mark.parametrize("values", [{}, OFF], ids=str)
@pytest.mark.parametrize("has_board", [True, False])
def test_true_is_lightnings_default_logger_in_the_runs_directory(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], has_board: bool
) -> None:
    if not has_board:
        for name in ("_TENSORBOARD_AVAILABLE", "_TENSORBOARDX_AVAILABLE"):
            monkeypatch.setattr(f"launcher.loggers.selection.{name}", False)
    elif find_spec("tensorboard") is None:
        pytest.skip("tensorboard is not installed")
    first, *others = loggers_of(run, {**values, "trainer": {"logger": True}})
    assert isinstance(first, TensorBoardLogger if has_board else CSVLogger)
    assert Path(first.log_dir) == run.path / "lightning_logs" / "version_0"
    assert [isinstance(each, QueuedWandbLogger) for each in others] == ([] if values == OFF else [True])
    first.log_hyperparams({"lr": 0.1, "api_key": "canary"})
    first.log_metrics({"loss": 1.0}, 0)
    first.finalize("success")
    written = [each.read_bytes() for each in run.path.rglob("*") if each.is_file()]
    assert len(written) >= 2
    assert not [each for each in written if b"canary" in each]


def test_the_error_of_a_wandb_run_explains_how_to_get_tensorboards_methods(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    (logger,) = loggers_of(run, {})
    assert logger.log_dir == logger.save_dir == str(run.path)
    experiment = logger.experiment
    try:
        with pytest.raises(AttributeError, match=r"no 'add_scalar'.*set trainer\.logger to true"):
            experiment.add_scalar("loss", 1.0, 0)
        wandb = pytest.importorskip("wandb")
        assert experiment is wandb.run
        assert isinstance(experiment, wandb.sdk.wandb_run.Run)
        assert not hasattr(experiment, "add_histogram")
        assert b"wandb_run" in pickle.dumps(experiment), "of W&B's own class in another process"
        experiment.log({"loss": 1.0})
    finally:
        finish_wandb(logger, 0, pytest.fail)


def test_a_disabled_wandb_logger_has_the_runs_directory(run: RunDirectory) -> None:
    (logger,) = loggers_of(run, OFF)
    assert logger.log_dir == logger.save_dir == str(run.path)


def test_false_is_no_logger_as_for_lightning(run: RunDirectory) -> None:
    assert loggers_of(run, {"trainer": {"logger": False}}) == []


def test_the_users_logger_is_first_and_the_only_one_without_wandb(run: RunDirectory, tmp_path: Path) -> None:
    own = CSVLogger(tmp_path)
    first, second = loggers_of(run, {}, own)
    assert first is own, "self.logger is the first one"
    assert isinstance(second, QueuedWandbLogger)
    assert loggers_of(run, OFF, own) == [own]
    assert not logs_to_wandb([own])


@pytest.mark.parametrize("values", [{}, OFF], ids=str)
def test_a_users_wandb_logger_replaces_the_launchers(run: RunDirectory, values: dict[str, Any]) -> None:
    own = WandbLogger(project="theirs")
    assert loggers_of(run, values, own) == [own]
    assert logs_to_wandb([own])
    assert own.version == "abcd1234", "each attempt continues the W&B run"


@pytest.mark.parametrize("options", [{"id": "mine"}, {"version": "mine"}, {"resume": "never"}, {"resume": "must"}])
def test_the_run_id_of_the_users_logger_is_kept(run: RunDirectory, options: dict[str, Any]) -> None:
    own = WandbLogger(project="theirs", **options)
    before = own.version
    loggers_of(run, {}, own)
    assert own.version == before


@pytest.mark.parametrize("variable", ["WANDB_RUN_ID", "WANDB_SWEEP_ID"])
def test_the_run_id_of_a_variable_is_kept(run: RunDirectory, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "mine")
    own = WandbLogger(project="theirs")
    loggers_of(run, {}, own)
    assert own.version is None


def test_without_wandb_a_csv_file_is_kept(run: RunDirectory, tmp_path: Path) -> None:
    (logger,) = choose_loggers([], None, run, is_off=False)
    assert isinstance(logger, CSVLogger)
    assert Path(logger.log_dir).is_relative_to(tmp_path)
    assert choose_loggers([logger], None, run, is_off=False) == [logger]
