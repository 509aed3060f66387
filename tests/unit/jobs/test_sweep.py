"""A sweep's sets of settings and its members' configs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from launcher.core.errors import ConfigError, SubmitError
from launcher.jobs.sweep import describe, make_members, read_sweep

LR, WIDTH = "model.init_args.lr", "model.init_args.width"


def problems(texts: Sequence[str], given: Sequence[str] = ()) -> list[str]:
    with pytest.raises(SubmitError) as caught:
        read_sweep(texts, given)
    return [f"{problem.path}: {problem.message}" for problem in caught.value.problems]


def test_a_grid_changes_its_last_key_fastest() -> None:
    assert read_sweep([f"{LR}=1e-3,3e-4", f"{WIDTH}=64,128"]) == [
        {LR: 1e-3, WIDTH: 64}, {LR: 1e-3, WIDTH: 128}, {LR: 3e-4, WIDTH: 64}, {LR: 3e-4, WIDTH: 128},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("model.init_args.x=1,true,null,text", [1, True, None, "text"]),
        ("model.init_args.x='a,b',c", ["a,b", "c"]),
        ("model.init_args.x=[1, 2],[3]", [[1, 2], [3]]),
        ("model.init_args.x=[1, 2]", [1, 2]),
        ("model.init_args.x={a: 1},{a: 2}", [{"a": 1}, {"a": 2}]),
        ("precision=16,bf16", [16, "bf16"]),
        ("wandb.project=7,8", ["7", "8"]),
        ("global-batch-size=8,16", [8, 16]),
    ],
)
def test_values_are_read_as_on_the_command_line(text: str, values: list[Any]) -> None:
    assert [value for each in read_sweep([text]) for value in each.values()] == values


def test_a_file_lists_the_members(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text("- {model.lr: 1.0e-3}\n- {trainer: {max_epochs: 3}, precision: bf16}\n")
    first, second = read_sweep([str(file)])
    assert first == {LR: 1e-3}
    assert second == {"trainer.max_epochs": 3, "precision": "bf16"}


def test_all_problems_are_reported_at_once() -> None:
    found = problems(
        [
            "trainer.max_epoch=1,2",
            "precision=17,bf16",
            f"{LR}=1,2",
            f"{LR}=3,4",
            "devices=1,2",
            "name=a,b",
            "seed",
            "x=",
        ],
        given=["precision"],
    )
    assert any("trainer.max_epoch" in text and "did you mean" in text for text in found)
    assert any("precision" in text and "17" in text for text in found)
    assert any(text.startswith(f"--sweep {LR}: given twice") for text in found)
    assert any(text.startswith("--sweep devices: cannot differ") for text in found)
    assert any(text.startswith("--sweep name: cannot differ") for text in found)
    assert any("--precision is given for all members too" in text for text in found)
    assert any("no such file" in text.lower() or "does not exist" in text for text in found if "seed" in text)
    assert any("expected KEY=VALUE" in text for text in found if text.startswith("--sweep x="))


def test_equal_members_are_reported() -> None:
    assert problems([f"{LR}=1,1"]) == ["--sweep: two members are equal; remove one: lr=1"]


@pytest.mark.parametrize("text", ["1", "{a: 1}", "[]", "- 3", "- {}"])
def test_a_file_without_a_list_of_settings_is_rejected(tmp_path: Path, text: str) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(text)
    (problem,) = problems([str(file)])
    assert "expected a " in problem


def test_members_are_named_after_the_sweep_and_grouped_in_wandb() -> None:
    base = {"model": {"class_path": "a.B", "init_args": {"lr": 1.0, "width": 8}}, "wandb": {"project": "p"}}
    one, two = make_members(base, [{LR: 1e-3}, {LR: 3e-4}], "grid")
    assert [(m.index, m.name, m.config.wandb.group, m.config.wandb.project) for m in (one, two)] == [
        (0, "grid-0", "grid", "p"), (1, "grid-1", "grid", "p"),
    ]  # fmt: skip
    assert one.config.model == {"class_path": "a.B", "init_args": {"lr": 1e-3, "width": 8}}
    assert two.config.model == {"class_path": "a.B", "init_args": {"lr": 3e-4, "width": 8}}
    assert base["model"]["init_args"]["lr"] == 1.0, "nothing of the caller's is changed"
    (own,) = make_members({**base, "wandb": {"group": "mine"}}, [{LR: 1}], "grid")
    assert own.config.wandb.group == "mine"


def test_a_problem_of_all_members_is_reported_once_and_one_of_a_member_with_its_number() -> None:
    base = {"model": {"class_path": "a.B"}, "trainer": {"max_epochs": -5}}
    with pytest.raises(ConfigError) as caught:
        make_members(base, [{LR: 1}, {LR: 2, "global_batch_size": 0}], "grid")
    paths = [problem.path for problem in caught.value.problems]
    assert paths == ["trainer.max_epochs", "member 1: global_batch_size"]


def test_settings_are_described_by_the_shortest_unique_names() -> None:
    assert describe({LR: 1e-3, "trainer.max_epochs": 3}) == "lr=0.001, max_epochs=3"
    assert describe({"model.init_args.size": 1, "data.init_args.size": 2}) == (
        "model.init_args.size=1, data.init_args.size=2"
    )
