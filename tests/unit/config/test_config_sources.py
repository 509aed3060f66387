"""Where a config comes from: files, overrides, the demo; and what is wrong with each of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.config.command_line import read_overrides
from launcher.config.config_file import read_config_file
from launcher.config.loading import load_config, load_values, read_preset
from launcher.config.schema import RunConfig
from launcher.config.validation import parse_config
from launcher.core.errors import ConfigError, Problem

MODEL = "model: {class_path: pkg.Model, init_args: {lr: 0.1, width: 8}}\n"


def write(folder: Path, text: str | bytes, name: str = "config.yaml") -> Path:
    file = folder / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def problem_of(file: Path) -> Problem:
    with pytest.raises(ConfigError) as caught:
        load_config([file])
    (problem,) = caught.value.problems
    return problem


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    problem = problem_of(tmp_path / "none.yaml")
    assert problem.path == str(tmp_path / "none.yaml")
    assert problem.message.startswith("no such file")


def test_a_similar_file_is_suggested_for_a_missing_one(tmp_path: Path) -> None:
    write(tmp_path, "seed: 1", "run.yaml")
    assert problem_of(tmp_path / "rum.yaml").message == f"no such file; did you mean {tmp_path / 'run.yaml'}?"


def test_a_folder_in_place_of_a_file_is_named_with_files_in_it(tmp_path: Path) -> None:
    assert problem_of(tmp_path) == Problem(str(tmp_path), "is a folder; give a file in it")
    file = write(tmp_path, "seed: 1")
    assert problem_of(tmp_path).message == f"is a folder; give a file in it, such as {file}"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("config.yaml", text) for text in ("", "# only a comment\n", "{}", "null", "---\n")),
        ("config.json", "{}"),
        ("config.json", "null"),
    ],
)
def test_a_file_without_settings_is_an_error_and_not_the_demo(tmp_path: Path, name: str, text: str) -> None:
    file = write(tmp_path, text, name)
    assert problem_of(file) == Problem(str(file), "the file has no settings; write some, or do not give this file")
    parent = write(tmp_path, f"model: {name}", "parts.yaml")
    assert problem_of(parent).path == str(file), "a part of the config in a file of its own, too"
    assert problem_of(write(tmp_path, "", "cut.json")).path == f"{tmp_path / 'cut.json'}, line 1"


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        ("seed: 1\ntrainer: [1\n", 3, "expected ',' or ']'"),
        ("seed: 1\nwandb:\n\tmode: offline\n", 3, "cannot start any token"),
        ("seed: 1\nname: x\nseed: 2\n", 3, "key 'seed' is given twice"),
        ("trainer:\n  max_epochs: 1\n  max_epochs: 1\n", 3, "key 'max_epochs' is given twice"),
        ("seed: 1\nname: !!python/name:os.system\n", 2, "could not determine a constructor"),
    ],
)
def test_invalid_yaml_is_reported_with_its_line(tmp_path: Path, text: str, line: int, expected: str) -> None:
    file = write(tmp_path, text)
    problem = problem_of(file)
    assert problem.path.startswith(f"{file}, line {line}, column ")
    assert problem.message.startswith("invalid YAML: ")
    assert expected in problem.message


def test_invalid_json_is_reported_with_its_line(tmp_path: Path) -> None:
    file = write(tmp_path, '{"seed": 1,\n "name" "x"}', "config.json")
    assert problem_of(file) == Problem(f"{file}, line 2", "invalid JSON: Expecting ':' delimiter; correct this line")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: 0x_", "invalid literal for int()"),
    ],
)
def test_an_impossible_yaml_value_is_reported_with_its_file(tmp_path: Path, text: str, expected: str) -> None:
    file = write(tmp_path, text)
    problem = problem_of(file)
    assert problem.path == str(file)
    assert problem.message.startswith(f"invalid YAML: {expected}")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "model: {class_path: a.B, init_args: [1], lr: 2}",
            Problem("model.init_args", "given [1]; expected a mapping of arguments"),
        ),
        ("model: {init_args: 3}", Problem("model.init_args", "given 3; expected a mapping of arguments")),
        (
            "model: {init_args: {1: 2}}",
            Problem(
                "model",
                "given arguments 1 without a class; add --model my_pkg.MyClass, or model.class_path in the file",
            ),
        ),
        (
            "wandb: disabled\ntrainer: {logger: false}",
            Problem("wandb", "given 'disabled'; expected a mapping of settings; did you mean wandb.mode: disabled?"),
        ),
    ],
)
def test_a_value_of_another_shape_is_reported_with_its_field(tmp_path: Path, text: str, problem: Problem) -> None:
    assert problem_of(write(tmp_path, text)) == problem


@pytest.mark.parametrize("text", [b"\xff\xfe", b"name: caf\xe9\n"])
def test_a_file_that_is_not_utf8_cannot_be_read(tmp_path: Path, text: bytes) -> None:
    assert "utf-8" in problem_of(write(tmp_path, text)).message


@pytest.mark.parametrize(("text", "found"), [("- a\n", "list"), ("3\n", "int"), ("text\n", "str")])
def test_a_file_without_a_mapping_is_rejected(tmp_path: Path, text: str, found: str) -> None:
    assert problem_of(write(tmp_path, text)).message == f"found {found}; expected a mapping of settings"


def test_the_problems_of_all_sources_are_listed_at_once(tmp_path: Path) -> None:
    broken = write(tmp_path, "a: [", "broken.yaml")
    wrong = write(tmp_path, "seeed: 1\nmodel: nodots\n", "wrong.yaml")

    with pytest.raises(ConfigError) as caught:
        load_config([tmp_path / "none.yaml", broken, wrong], ["stray", "--devices", "0"])

    paths = [problem.path for problem in caught.value.problems]
    assert paths == [str(tmp_path / "none.yaml"), f"{broken}, line 1, column 5", "stray", "seeed", "devices",
                     "model.class_path"]  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "values"),
    [
        (["--trainer.max_epochs", "3"], {"trainer": {"max_epochs": 3}}),
        (["--trainer.max_epochs=3"], {"trainer": {"max_epochs": 3}}),
        (["--trainer.max_epochs", "-1"], {"trainer": {"max_epochs": -1}}),
        (["--use_amp"], {"use_amp": True}),
        (["--use-amp", "--seed", "1"], {"use_amp": True, "seed": 1}),
        (["--use_amp", "false"], {"use_amp": False}),
        (["--global-batch-size", "8"], {"global_batch_size": 8}),
        (["--model.init_args.lr", "1e-4"], {"model": {"init_args": {"lr": 1e-4}}}),
        (["--model.lr=-2.5E-3"], {"model": {"lr": -2.5e-3}}),
        (["--global_batch_size", "null"], {"global_batch_size": None}),
        (["--wandb.tags", "[a, b]"], {"wandb": {"tags": ["a", "b"]}}),
        (["--model.sizes", "[1, 2e3]"], {"model": {"sizes": [1, 2000.0]}}),
        (["--seed", "1", "--seed", "2"], {"seed": 2}),
        (["--model", "pkg.X", "--model.lr", "1"], {"model": {"class_path": "pkg.X", "lr": 1}}),
        (["--model.lr", "1", "--model", "pkg.X"], {"model": {"class_path": "pkg.X", "lr": 1}}),
        # What is text stays text.
        (["--name", "123"], {"name": "123"}),
        (["--name", "true"], {"name": "true"}),
        (["--wandb.project", "a: b"], {"wandb": {"project": "a: b"}}),
        (["--name", "null"], {"name": None}),
        (["--runs_dir", ""], {"runs_dir": ""}),
        (["--trainer.profiler=a=b"], {"trainer": {"profiler": "a=b"}}),
        # No YAML: left for the check of types, which names the field.
        (["--trainer.max_epochs", "[1"], {"trainer": {"max_epochs": "[1"}}),
        (["--model.since", "2024-13-45"], {"model": {"since": "2024-13-45"}}),
    ],
)
def test_overrides_become_nested_values(argv: list[str], values: dict[str, Any]) -> None:
    assert read_overrides(argv) == (values, [])


def test_every_argument_that_is_no_option_is_reported() -> None:
    _, problems = read_overrides(["stray", "--seed", "1", "-x", "--"])
    assert [problem.path for problem in problems] == ["stray", "-x", "--"]


@settings(max_examples=50)
@given(st.lists(st.from_regex(r"(--)?[a-z]{1,3}(\.[a-z-]{0,2})?(=[\[\]{}:a-z1]{0,3})?", fullmatch=True), max_size=4))
def test_any_arguments_give_values_or_problems(argv: list[str]) -> None:
    strays = [word for word in argv if not word.startswith("--")]
    # A word after a bare flag is that flag's value.
    values, problems = read_overrides(argv)
    if argv and strays == argv:
        assert problems
    elif not strays:
        assert not problems
        assert bool(values) == bool(argv)


def test_a_dashed_override_reaches_the_config() -> None:
    assert load_config([], ["--model", "pkg.X", "--model.lr", "1", "--global-batch-size", "8"]) == parse_config(
        {"global_batch_size": 8, "model": {"class_path": "pkg.X", "init_args": {"lr": 1}}}
    )


def test_a_later_source_overrides_an_earlier_one_key_by_key(tmp_path: Path) -> None:
    first = write(
        tmp_path, MODEL + "seed: 1\ntrainer: {max_epochs: 1, max_steps: 5}\nwandb: {tags: [a, b]}\n", "1.yaml"
    )
    second = write(tmp_path, '{"trainer": {"max_epochs": 2}, "wandb": {"tags": ["c"]}}', "2.json")

    config = load_config([first, second], ["--trainer.max_epochs", "3"])

    assert (config.seed, config.trainer.max_epochs, config.trainer.max_steps) == (1, 3, 5)
    assert config.wandb.tags == ["c"], "a list is replaced, not joined"
    assert load_config([second, first]).trainer.max_epochs == 1


@pytest.mark.parametrize(
    ("argv", "init_args"),
    [
        (["--model", "pkg.Other"], None),
        (["--model.class_path", "pkg.Other", "--model.depth", "2"], {"depth": 2}),
        (["--model", "pkg.Model"], {"lr": 0.1, "width": 8}),
        (["--model.lr", "1e-3"], {"lr": 1e-3, "width": 8}),
        (["--model.init_args.lr", "1e-3"], {"lr": 1e-3, "width": 8}),
    ],
)
def test_only_another_class_drops_the_earlier_arguments(
    tmp_path: Path, argv: list[str], init_args: dict[str, Any] | None
) -> None:
    model = load_config([write(tmp_path, MODEL)], argv).model
    assert model is not None
    assert model.get("init_args") == init_args
    # Which of them the other class takes, too, shows when it is imported.
    assert model.get("former_args") == (None if model["class_path"] == "pkg.Model" else {"lr": 0.1, "width": 8})


def test_a_file_in_place_of_a_class_is_reported_with_its_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "net.py").write_text("class A: pass\nclass B: pass\n")
    with pytest.raises(ConfigError, match=r"this is a file; give a class in it: pkg\.net\.A or pkg\.net\.B"):
        load_config([], ["--model", "pkg/net.py"])
    with pytest.raises(ConfigError, match=r"expected an import path like my_pkg\.MyClass, not a file"):
        load_config([], ["--model", "pkg/none.py"])


def test_callbacks_are_set_added_and_changed_by_arguments() -> None:
    def callbacks(*argv: str) -> Any:
        return load_config([], ["--model", "a.B", *argv]).trainer.callbacks

    added = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=train_loss"]
    stopping = {"class_path": "EarlyStopping", "init_args": {"monitor": "train_loss"}}
    assert callbacks(*added) == [stopping]
    assert callbacks(
        "--trainer.callbacks+=a.C", *added, "--trainer.callbacks.part=b.D", "--trainer.callbacks.part.n=1"
    ) == [
        {"class_path": "a.C"},
        {**stopping, "init_args": {"monitor": "train_loss", "part": {"class_path": "b.D", "init_args": {"n": 1}}}},
    ]
    assert callbacks(*added, "--trainer.callbacks=a.C") == {"class_path": "a.C"}


def test_classes_of_pytorch_lightning_are_read_from_lightning() -> None:
    argv = [
        "--model",
        "a.B",
        "--model.note=pytorch_lightning is old",
        "--trainer.logger=pytorch_lightning.loggers.CSVLogger",
    ]
    config = load_config([], argv)
    assert config.trainer.logger == {"class_path": "lightning.pytorch.loggers.CSVLogger"}
    assert config.model == {"class_path": "a.B", "init_args": {"note": "pytorch_lightning is old"}}


@pytest.mark.parametrize("text", ["model: pkg.Model\n", "model: {class_path: pkg.Model}\n"])
def test_a_class_may_be_given_by_its_path_alone(tmp_path: Path, text: str) -> None:
    assert load_config([write(tmp_path, text)]).model == {"class_path": "pkg.Model"}


@pytest.mark.parametrize("path", ["nodots", "pkg.", ".Model", "pkg..Model", "pkg.Model()", "1pkg.Model", 3])
def test_a_class_path_that_cannot_be_imported_is_reported(tmp_path: Path, path: str | int) -> None:
    problem = problem_of(write(tmp_path, f"model: {{class_path: {path}}}\n"))
    assert problem == Problem("model.class_path", f"given {path!r}; expected an import path like my_pkg.MyClass")


def test_arguments_without_a_class_are_reported() -> None:
    with pytest.raises(ConfigError, match=r"model: given arguments lr, width without a class"):
        load_config([], ["--model.lr", "1", "--model.width", "2"])


def test_data_without_a_model_is_reported() -> None:
    with pytest.raises(ConfigError, match="model: not given, but data is"):
        load_config([], ["--data", "pkg.Data"])


def test_without_model_and_data_the_given_settings_apply_to_the_demo(tmp_path: Path) -> None:
    demo = parse_config(read_preset("demo"))
    assert demo.model is not None
    assert load_config() == load_config([write(tmp_path, "model: null\n")]) == demo

    config = load_config([], ["--trainer.max_epochs", "7"])

    assert (config.model, config.global_batch_size) == (demo.model, demo.global_batch_size)
    assert config.trainer.max_epochs == 7


@pytest.mark.parametrize("text", [RunConfig().to_yaml(), "model: null\n"], ids=["all defaults", "null"])
def test_a_null_model_trains_the_demo_too(tmp_path: Path, text: str) -> None:
    assert load_config([write(tmp_path, text)]).model == read_preset("demo")["model"]


def test_with_a_model_no_setting_of_the_demo_applies() -> None:
    assert load_config([], ["--model", "pkg.X"]) == RunConfig(model={"class_path": "pkg.X"})


def test_a_written_config_loads_as_the_same_config(tmp_path: Path) -> None:
    argv = ["--data", "pkg.D", "--model", "pkg.X", "--model.lr=1e-5", "--model.note=1e-4 of ü", "--wandb.tags=[x]"]
    for config in (load_config([], argv), load_config()):
        again = load_config([write(tmp_path, config.to_yaml())])
        assert again == config
        assert again.digest() == config.digest()


def test_json_values_are_read_unchanged(tmp_path: Path) -> None:
    assert read_config_file(write(tmp_path, '{"seed": 7, "name": null}', "c.json")) == {"seed": 7, "name": None}


@pytest.mark.parametrize(
    ("file", "argv", "arguments"),
    [
        ({}, ["--model.tags+=z"], {"tags": ["z"]}),
        ({}, ["--model.tags+=z", "--model.init_args.tags+=[x, y]"], {"tags": ["z", "x", "y"]}),
        ({"tags": ["a"]}, ["--model.tags+", "z"], {"tags": ["a", "z"]}),
        ({"tags": "a"}, ["--model.tags+=z"], {"tags": ["a", "z"]}),
        ({"tags": None}, ["--model.tags+=z"], {"tags": ["z"]}),
        ({"tags+": ["a"]}, ["--model.tags+=z"], {"tags": ["a", "z"]}),
        ({"tags+": "a"}, ["--model.tags=[b]", "--model.tags+=z"], {"tags": ["b", "z"]}),
        ({"tags": ["a"]}, ["--model=b.Other", "--model.tags+=z"], {"tags": ["z"]}),
        ({"part": {"class_path": "b.Part", "init_args": {"tags": [1]}}}, ["--model.part.tags+=2"],
         {"part": {"class_path": "b.Part", "init_args": {"tags": [1, 2]}}}),
        # Not a list of the class's, but its own keys.
        ({"counts": {"c+": 1}}, ["--model.counts.d=2"], {"counts": {"c+": 1, "d": 2}}),
    ],
)  # fmt: skip
def test_arguments_and_files_append_to_a_classs_lists(
    tmp_path: Path, file: dict[str, Any], argv: list[str], arguments: dict[str, Any]
) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"model": {"class_path": "b.Model", "init_args": file}}))
    config = load_config([tmp_path / "c.yaml"], argv)
    assert config.model is not None
    assert config.model["init_args"] == arguments
    assert load_values(config.to_dict()) == config
