"""A value in place of a group of settings is reported where another source sets one of the group's settings."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from launcher.config.loading import load_config
from launcher.core.errors import ConfigError

SETTINGS = {"trainer": "max_steps", "checkpoint": "every_n_steps", "wandb": "project", "watch": "floor_steps",
            "slurm": "partition", "model": "lr", "data": "batch_size", "optimizer": "lr"}  # fmt: skip
DEMO = {"model": {"class_path": "launcher.demo.DemoGPT"}}


def _problems(files: list[Path], *arguments: str) -> list[tuple[str, str]]:
    with pytest.raises(ConfigError) as caught:
        load_config(files, [*arguments])
    return [(problem.path, problem.message) for problem in caught.value.problems]


@pytest.mark.parametrize("group", SETTINGS)
@pytest.mark.parametrize("value", [5, True, [1], 1.5])
def test_a_value_in_place_of_a_group_is_reported_once(tmp_path: Path, group: str, value: object) -> None:
    wrong, right = tmp_path / "wrong.yaml", tmp_path / "right.yaml"
    wrong.write_text(yaml.safe_dump({group: value}))
    right.write_text(yaml.safe_dump({group: {SETTINGS[group]: 3}}))
    expected = (group, f"given {value!r}; expected a mapping of settings")
    argument = (f"--{group}.{SETTINGS[group]}", "3")
    for files, arguments in (([wrong], argument), ([wrong, right], ()),
                             ([], (f"--{group}", yaml.safe_dump(value).splitlines()[0], *argument))):  # fmt: skip
        if isinstance(value, list) and not files:
            arguments = (f"--{group}", "[1]", *argument)
        assert _problems(files, *arguments).count(expected) == 1


def test_arguments_that_are_no_mapping_are_reported(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"model": {**DEMO["model"], "init_args": 5}}))
    assert _problems([file], "--model.lr", "3") == [("model.init_args", "given 5; expected a mapping of settings")]


@pytest.mark.parametrize("text", ["trainer:\nmodel: a.B\n", "trainer: {}\nmodel: a.B\n", "model: a.B\n"])
def test_nothing_an_empty_group_or_a_class_is_no_such_value(tmp_path: Path, text: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert load_config([file], ["--trainer.max_steps", "3", "--model.lr", "0.1"]).trainer.max_steps == 3
