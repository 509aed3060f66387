"""A config of LightningCLI's: what the launcher takes over, what it moves and what it refuses."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import Trainer

from launcher.config.lightning_cli import _REMOVED, translate_lightning_cli
from launcher.config.loading import load_config
from launcher.config.schema import RunConfig
from launcher.core.errors import ConfigError, Problem
from tests.support.processes import run_warm

_WRITE_BOTH = """
import contextlib, pathlib, sys
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule, DemoModel

def write(file, argv, **modes):
    sys.argv = ["cli", *argv, "--print_config"]
    with pathlib.Path(file).open("w") as out, contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        LightningCLI(DemoModel, BoringDataModule, **modes)

write("fixed.yaml", ["fit", "--model.learning_rate", "0.5", "--trainer.max_epochs", "4", "--trainer.devices", "2"])
argv = ["fit", "--model", "DemoModel", "--data", "BoringDataModule", "--model.learning_rate", "0.5"]
write("subclass.yaml", [*argv, "--trainer.max_epochs", "4", "--trainer.devices", "2"],
      subclass_mode_model=True, subclass_mode_data=True)
"""
_DEMOS = "lightning.pytorch.demos.boring_classes"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what LightningCLI's `--print_config` writes, with fixed classes and in subclass mode."""
    folder = tmp_path_factory.mktemp("lightning_cli")
    run_warm([sys.executable, "-c", _WRITE_BOTH], folder).check()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "argv"),
    [
        ("fixed.yaml", ["--model", f"{_DEMOS}.DemoModel", "--data", f"{_DEMOS}.BoringDataModule"]),
        ("subclass.yaml", []),
    ],
)
def test_a_config_that_lightning_cli_wrote_is_accepted(written: Path, file: str, argv: list[str]) -> None:
    assert yaml.safe_load((written / file).read_text())["trainer"]["devices"] == "2", "text, as it came"

    config = load_config([written / file], argv)

    assert (config.devices, config.trainer.max_epochs, config.seed) == (2, 4, 0)
    assert config.model is not None
    assert config.model["class_path"].endswith(".DemoModel")
    assert config.model["init_args"] == {"out_dim": 10, "learning_rate": 0.5}
    assert config.data is not None
    assert config.data["class_path"].endswith(".BoringDataModule")
    untouched = RunConfig(devices=2, seed=0, model=config.model, data=config.data)
    assert config.to_dict() | {"trainer": None} == untouched.to_dict() | {"trainer": None}


def translated(values: dict[str, Any]) -> dict[str, Any]:
    result, problems = translate_lightning_cli(values)
    assert problems == []
    return result


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("accelerator", "cpu"),
        ("strategy", "ddp"),
        ("devices", 2),
        ("num_nodes", 3),
        ("precision", "16-mixed"),
    ],
)
def test_settings_of_the_launcher_move_from_trainer_to_the_top_level(key: str, value: str | int) -> None:
    assert translated({"trainer": {key: value, "max_epochs": 1}}) == {key: value, "trainer": {"max_epochs": 1}}


@pytest.mark.parametrize(
    ("key", "default"),
    [("accelerator", "auto"), ("strategy", "auto"), ("devices", "auto"), ("num_nodes", 1), ("precision", None)],
)
def test_lightnings_default_contradicts_nothing(key: str, default: str | int | None) -> None:
    assert translated({"trainer": {key: default}, key: 7}) == {"trainer": {}, key: 7}


@pytest.mark.parametrize("key", ["accelerator", "strategy", "devices", "num_nodes", "precision"])
def test_one_key_with_two_values_in_one_source_is_a_contradiction(key: str) -> None:
    _, (problem,) = translate_lightning_cli({"trainer": {key: 2}, key: 4})
    assert (problem.path, problem.message) == (f"trainer.{key}", f"given 2, but {key} is 4; remove one of them")


def test_one_key_with_the_same_value_twice_is_fine() -> None:
    assert translated({"trainer": {"devices": 2}, "devices": 2}) == {"trainer": {}, "devices": 2}


def test_a_later_source_with_the_other_key_is_no_contradiction(tmp_path: Path) -> None:
    file = tmp_path / "lightning.yaml"
    file.write_text("trainer: {devices: 2}\nseed_everything: 1\nmodel: pkg.X\n")
    config = load_config([file], ["--devices", "3", "--seed", "5"])
    assert (config.devices, config.seed) == (3, 5)
    assert load_config([file], ["--trainer.devices", "4"]).devices == 4


@pytest.mark.parametrize("everything", [-1, "-1"])
def test_minus_one_devices_are_all_devices(everything: int | str) -> None:
    assert translated({"trainer": {"devices": everything}}) == {"trainer": {}, "devices": "auto"}
    assert translated({"devices": everything}) == {"devices": "auto"}


def test_two_spellings_of_all_devices_are_no_contradiction() -> None:
    assert translated({"trainer": {"devices": -1}, "devices": "auto"}) == {"trainer": {}, "devices": "auto"}


@pytest.mark.parametrize(
    ("path", "advice"),
    [
        ("trainer.default_root_dir", "set `runs_dir` and `name`"),
        ("trainer.model_registry", "in the run directory"),
        ("weights_only", "always loaded with weights_only"),
    ],
)
def test_an_unsupported_key_is_rejected_with_advice_unless_it_is_null(path: str, advice: str) -> None:
    group, _, key = path.rpartition(".")

    def values(value: Any) -> dict[str, Any]:
        return {group: {key: value}} if group else {key: value}

    _, (problem,) = translate_lightning_cli(values({"class_path": "a.B"}))
    assert problem.path == path
    assert problem.message.startswith("not supported here; ")
    assert advice in problem.message
    assert translated(values(None)) == ({"trainer": {}} if group else {})


def test_every_contradiction_and_unsupported_key_is_listed_at_once() -> None:
    values = {
        "trainer": {"devices": 2, "model_registry": "a"},
        "devices": 3,
        "weights_only": True,
        "seed_everything": False,
    }
    _, problems = translate_lightning_cli(values)
    assert [p.path for p in problems] == [
        "trainer.model_registry",
        "weights_only",
        "trainer.devices",
        "seed_everything",
    ]


def test_logger_false_turns_wandb_off_and_keeps_its_other_settings() -> None:
    assert translated({"trainer": {"logger": False}}) == {
        "trainer": {"logger": []},
        "wandb": {"mode": "disabled"},
    }
    assert translated({"trainer": {"logger": False}, "wandb": {"project": "p"}})["wandb"] == {
        "mode": "disabled",
        "project": "p",
    }


def test_the_default_logger_is_wandb_and_true_is_lightnings_default() -> None:
    assert translated({"trainer": {"logger": None}}) == {"trainer": {}}
    assert translated({"trainer": {"logger": True}}) == {"trainer": {"logger": True}}


def test_a_logger_of_the_users_own_stays() -> None:
    own = {"class_path": "lightning.pytorch.loggers.CSVLogger"}
    assert translated({"trainer": {"logger": own}}) == {"trainer": {"logger": own}}


@pytest.mark.parametrize(("given", "seed"), [(3, 3), (0, 0), (1, 1), ("x", "x")])
def test_seed_everything_is_the_seed(given: int | str, seed: int | str) -> None:
    assert translated({"seed_everything": given}) == {"seed": seed}


def test_seed_everything_without_a_number_is_lightnings_seed() -> None:
    assert translated({"seed_everything": True}) == {"seed": 0}
    assert translated({"seed_everything": True, "seed": 3}) == {"seed": 3}
    assert translated({"seed_everything": None}) == {}


def test_seed_everything_false_is_rejected() -> None:
    _, (problem,) = translate_lightning_cli({"seed_everything": False})
    assert problem.path == "seed_everything"
    assert "give a number" in problem.message


def test_seed_everything_may_not_contradict_the_seed() -> None:
    _, (problem,) = translate_lightning_cli({"seed_everything": 3, "seed": 4})
    assert problem.message == "given 3, but seed is 4; remove one of them"


@pytest.mark.parametrize(("given", "result"), [("a.ckpt", {"resume": "a.ckpt"}), (None, {})])
def test_ckpt_path_is_what_to_resume(given: str | None, result: dict[str, str]) -> None:
    assert translated({"ckpt_path": given}) == result


def test_the_given_values_are_not_changed() -> None:
    values = {"trainer": {"devices": 2, "logger": False}, "seed_everything": 3}
    translate_lightning_cli(values)
    assert values == {"trainer": {"devices": 2, "logger": False}, "seed_everything": 3}


@pytest.mark.parametrize(
    ("given", "devices"),
    [
        ([0], 1),
        ([0, 1], 2),
        ("0,", 1),
        ("0,1", 2),
        ("0, 1,", 2),
        ("2", "2"),
        (3, 3),
        ("auto", "auto"),
        ("x,", "x,"),
        ([], []),
    ],
)
@pytest.mark.parametrize("place", ["trainer", "top"])
def test_the_first_gpu_indices_become_a_number(given: Any, devices: Any, place: str) -> None:
    values = {"devices": given}
    result = translated({"trainer": values} if place == "trainer" else values)
    assert result.get("devices", "auto") == devices


@pytest.mark.parametrize(("given", "numbers"), [([1], "1"), ([2, 3], "2,3"), ([1, 0], "1,0"), ("3,", "3")])
def test_other_gpus_are_chosen_by_their_variable(given: Any, numbers: str) -> None:
    _, (problem,) = translate_lightning_cli({"trainer": {"devices": given}})
    assert problem.path == "trainer.devices"
    assert f"CUDA_VISIBLE_DEVICES={numbers} before the command" in problem.message


@pytest.mark.parametrize("key", sorted(_REMOVED))
def test_a_setting_of_lightning_1_is_rejected_with_its_replacement(key: str) -> None:
    assert key not in inspect.signature(Trainer).parameters
    _, (problem,) = translate_lightning_cli({"trainer": {key: True}})
    assert problem == Problem(f"trainer.{key}", f"Lightning 2 has no such setting; remove it, and {_REMOVED[key]}")
    assert translated({"trainer": {key: None}}) == {"trainer": {}}, "a file of Lightning 1 has them all"


def test_a_file_for_several_subcommands_is_read_for_fit() -> None:
    values = {"fit": {"seed_everything": 3, "trainer": {"devices": 2}}, "test": {"verbose": True}, "name": "it"}
    assert translated(values) == {"name": "it", "seed": 3, "devices": 2, "trainer": {}}


def test_a_part_of_the_config_may_be_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "model.yaml").write_text("class_path: pkg.Net\ninit_args: {lr: 0.5}\n")
    (parts / "trainer.yaml").write_text("{max_epochs: 3, callbacks: callbacks.json}\n")
    (parts / "callbacks.json").write_text('[{"class_path": "EarlyStopping", "init_args": {"monitor": "loss"}}]')
    (parts / "run.yaml").write_text("model: model.yaml\ntrainer: trainer.yaml\n")
    monkeypatch.chdir(tmp_path)
    by_file = load_config(["parts/run.yaml"])
    assert by_file.model == {"class_path": "pkg.Net", "init_args": {"lr": 0.5}}
    assert by_file.trainer.callbacks == [{"class_path": "EarlyStopping", "init_args": {"monitor": "loss"}}]
    argv = ["--model", "parts/model.yaml", "--model.lr", "0.25", "--trainer=parts/trainer.yaml"]
    by_arguments = load_config([], argv)
    assert by_arguments.model == {"class_path": "pkg.Net", "init_args": {"lr": 0.25}}
    assert by_arguments.trainer == by_file.trainer
    with pytest.raises(ConfigError, match=r"callbacks\.yaml: no such file"):
        load_config([], ["--model", "a.B", "--trainer.callbacks", "callbacks.yaml"])
