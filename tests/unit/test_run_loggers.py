"""Which loggers a run has: the user's first, and W&B as the user wants it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from launcher.config_check import parse_config
from launcher.lightning_cli_keys import translate_lightning_cli
from launcher.run_directory import RunDirectory
from launcher.run_loggers import logs_to_wandb, make_wandb_logger, run_loggers, wants_no_logger
from launcher.wandb_run import QueuedWandbLogger


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path, None, "abcd1234", is_new=True)


def loggers_of(run: RunDirectory, values: dict[str, Any], *own: Any) -> list[Any]:
    config = parse_config(translate_lightning_cli(values)[0])
    ours = make_wandb_logger(config.wandb, run, {}, pytest.fail)
    return run_loggers(own, ours, run, is_off=wants_no_logger(config))


OFF = {"wandb": {"mode": "disabled"}}


@pytest.mark.parametrize("values", [{}, OFF, {"trainer": {"logger": True}}], ids=str)
def test_without_one_of_the_users_the_logger_is_wandbs(run: RunDirectory, values: dict[str, Any]) -> None:
    (logger,) = loggers_of(run, values)
    assert isinstance(logger, QueuedWandbLogger)
    assert logs_to_wandb([logger]) is (values != OFF)


def test_false_is_no_logger_as_for_lightning(run: RunDirectory) -> None:
    assert loggers_of(run, {"trainer": {"logger": False}}) == []


def test_the_users_own_comes_first_and_alone_where_wandb_is_off(run: RunDirectory, tmp_path: Path) -> None:
    own = CSVLogger(tmp_path)
    first, second = loggers_of(run, {}, own)
    assert first is own, "self.logger is the first one"
    assert isinstance(second, QueuedWandbLogger)
    assert loggers_of(run, OFF, own) == [own]
    assert not logs_to_wandb([own])


@pytest.mark.parametrize("values", [{}, OFF], ids=str)
def test_a_wandb_logger_of_the_users_takes_the_place_of_ours(run: RunDirectory, values: dict[str, Any]) -> None:
    own = WandbLogger(project="theirs")
    assert loggers_of(run, values, own) == [own]
    assert logs_to_wandb([own])
    assert own.version == "abcd1234", "an attempt goes on with the run of the one before"


@pytest.mark.parametrize("options", [{"id": "mine"}, {"version": "mine"}, {"resume": "never"}, {"resume": "must"}])
def test_a_run_that_the_users_logger_names_stays(run: RunDirectory, options: dict[str, Any]) -> None:
    own = WandbLogger(project="theirs", **options)
    before = own.version
    loggers_of(run, {}, own)
    assert own.version == before


@pytest.mark.parametrize("variable", ["WANDB_RUN_ID", "WANDB_SWEEP_ID"])
def test_a_run_that_a_variable_names_stays(run: RunDirectory, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "mine")
    own = WandbLogger(project="theirs")
    loggers_of(run, {}, own)
    assert own.version is None


def test_without_wandb_a_csv_file_is_kept(run: RunDirectory, tmp_path: Path) -> None:
    (logger,) = run_loggers([], None, run, is_off=False)
    assert isinstance(logger, CSVLogger)
    assert Path(logger.log_dir).is_relative_to(tmp_path)
    assert run_loggers([logger], None, run, is_off=False) == [logger]
