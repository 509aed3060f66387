"""Lightning's `PL_TRAINER_*` variables are defaults of a config, overridden by its files and arguments."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.utilities.argparse import _parse_env_variables

from launcher.config.loading import load_config
from launcher.config.schema import RunConfig, TrainerOptions
from launcher.config.trainer_variables import NAMES, read_variables, with_variables
from launcher.core.errors import ConfigError


def test_the_names_are_the_trainers_parameters() -> None:
    assert {*NAMES} == {*inspect.signature(pl.Trainer).parameters}


@pytest.mark.parametrize(
    "texts",
    [
        {"LIMIT_TRAIN_BATCHES": "3", "MAX_EPOCHS": "2"},
        {"LIMIT_TRAIN_BATCHES": "0.5", "BENCHMARK": "True", "GRADIENT_CLIP_VAL": "1"},
        {"MAX_TIME": "00:01:00:00", "DETERMINISTIC": "warn", "PROFILER": "simple", "MAX_STEPS": "-1"},
        {"MAX_TIME": "{'hours': 2}", "VAL_CHECK_INTERVAL": "None", "MAX_EPOCHS": ""},
        {"NO_SUCH": "1", "max_epochs": "3"},
    ],
)
def test_values_are_parsed_as_by_lightning(texts: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in texts.items():
        monkeypatch.setenv(f"PL_TRAINER_{name}", text)
    theirs = vars(_parse_env_variables(pl.Trainer))
    assert read_variables(os.environ).get("trainer", {}) == theirs
    config = load_config()
    assert {name: getattr(config.trainer, name) for name in theirs} == theirs


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("DEVICES", "2", {"devices": 2}),
        ("DEVICES", "-1", {"devices": "auto"}),
        ("DEVICES", "[0, 1]", {"devices": 2}),
        ("ACCELERATOR", "cpu", {"accelerator": "cpu"}),
        ("STRATEGY", "ddp", {"strategy": "ddp"}),
        ("PRECISION", "bf16-mixed", {"precision": "bf16-mixed"}),
        ("PRECISION", "32", {"precision": 32}),
        ("NUM_NODES", "2", {"num_nodes": 2}),
    ],
)
def test_variables_of_top_level_settings_set_those(name: str, text: str, expected: dict[str, Any]) -> None:
    values = read_variables({f"PL_TRAINER_{name}": text})
    assert {key: value for key, value in values.items() if key != "trainer" or value} == expected


def test_files_and_arguments_take_precedence_and_ranks_agree_on_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c.yaml").write_text("trainer: {max_epochs: 5}\ndevices: 1")
    without = load_config([tmp_path / "c.yaml"])
    for name, text in {"MAX_EPOCHS": "2", "LIMIT_VAL_BATCHES": "3", "LOG_EVERY_N_STEPS": "7", "DEVICES": "4"}.items():
        monkeypatch.setenv(f"PL_TRAINER_{name}", text)
    config = load_config([tmp_path / "c.yaml"], ["--trainer.log_every_n_steps=1"])
    options = config.trainer
    assert (options.max_epochs, options.limit_val_batches, options.log_every_n_steps) == (5, 3, 1)
    assert config.devices == 1
    assert config.digest() != without.digest()
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    monkeypatch.setenv("PL_TRAINER_LIMIT_VAL_BATCHES", "9")
    assert load_config([tmp_path / "again.yaml"]) == config


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("MAX_EPOCHS", "many", "given 'many'; expected"),
        ("LIMIT_TRAIN_BATCHES", "-2", "given -2; expected at least 0"),
        ("STRATEGY", "no_such", "given 'no_such'"),
        ("DEFAULT_ROOT_DIR", "/tmp/x", "a run's files are in its run directory; set `runs_dir` and `name`"),
        ("DEVICES", "[1, 3]", "write `devices: 2`, and CUDA_VISIBLE_DEVICES=1,3 before the command"),
    ],
)
def test_a_wrong_variable_is_named(name: str, text: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"PL_TRAINER_{name}", text)
    with pytest.raises(ConfigError) as caught:
        load_config()
    (problem,) = [each for each in caught.value.problems if each.path.startswith("PL_")]
    assert problem.path == f"PL_TRAINER_{name}"
    assert expected in problem.message


def test_a_script_uses_variables_for_settings_at_their_defaults() -> None:
    env = {f"PL_TRAINER_{name}": text for name, text in
           {"MAX_EPOCHS": "3", "GRADIENT_CLIP_VAL": "2", "LIMIT_TRAIN_BATCHES": "4", "PRECISION": "32-true",
            "DEVICES": "2", "LOGGER": "False"}.items()}  # fmt: skip
    usual = RunConfig(precision="16", trainer=TrainerOptions(max_epochs=1, gradient_clip_val=1.0))
    config, options = with_variables(usual, {"max_epochs": 1, "gradient_clip_val": 1.0}, usual, env)
    assert (config.precision, config.devices, config.wandb.mode) == ("32-true", 2, "disabled")
    assert options == {"max_epochs": 3, "gradient_clip_val": 2, "limit_train_batches": 4, "logger": []}
    asked = RunConfig(precision="bf16", devices=1)
    config, options = with_variables(asked, {"max_epochs": 7, "gradient_clip_val": None}, usual, env)
    assert (config.precision, config.devices) == ("bf16", 1)
    assert (options["max_epochs"], options["gradient_clip_val"]) == (7, None)
