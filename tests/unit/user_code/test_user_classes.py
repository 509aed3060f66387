"""The user's classes: all problems are reported at once, before an object is created."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from signal import SIGINT
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger

from launcher.config.schema import RunConfig
from launcher.config.validation import parse_config
from launcher.core.errors import ConfigError, Problem
from launcher.user_code import arguments as class_arguments
from launcher.user_code.classes import import_classes, known_classes, make_callbacks, make_loggers, make_objects
from launcher.user_code.imports import import_class
from launcher.user_code.objects import UserObjects, make_user_objects
from tests.support import cli_zoo

_SOURCE = """
import lightning.pytorch as pl
from dataclasses import dataclass

class Model(pl.LightningModule):
    static_graph = True
    def __init__(self, width: int, lr: float = 0.1, name: str = "m", sizes: list[int] = [1]):
        super().__init__()
        self.given = (width, lr, name, sizes)

class Alone(pl.LightningModule):
    def __init__(self, batch_size: int = 4):
        super().__init__()
        self.batch_size = batch_size

class Data(pl.LightningDataModule):
    def __init__(self, batch_size: int = 8, root=None):
        super().__init__()
        self.batch_size, self.root = batch_size, root

@dataclass
class Shape:
    width: int

class Rooted(pl.LightningDataModule):
    def __init__(self, folder: str, sizes: Shape, d: int = 1, old: int = 2, batch_size: int = 8):
        super().__init__()
        self.given = folder, sizes.width, d, old, batch_size

class Counter(pl.Callback):
    def __init__(self, every: int = 1):
        self.every = every

class OfThisTestAlone(pl.Callback):
    pass

class Failing(pl.LightningModule):
    def __init__(self):
        raise RuntimeError("its own words")

class Bare:
    pass

number = 3
"""


@pytest.fixture(autouse=True)
def _modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules of a user, importable in this test only."""
    (tmp_path / "theirs.py").write_text(_SOURCE)
    (tmp_path / "broken.py").write_text("\nraise RuntimeError('first\\nthe last line')\n")
    (tmp_path / "needy.py").write_text("import no_such_dependency\n")
    (tmp_path / "half.py").write_text("x = (\n")
    (tmp_path / "leaving.py").write_text("import sys\nsys.exit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    names = ("theirs", "broken", "needy", "half", "leaving")
    for name in names:
        # From another test.
        sys.modules.pop(name, None)
    yield
    for name in names:
        sys.modules.pop(name, None)


def config(model: Any = None, data: Any = None, **trainer: Any) -> RunConfig:
    return parse_config({"model": model, "data": data, "trainer": trainer})


def model(path: str = "theirs.Model", **init_args: Any) -> dict[str, Any]:
    return {"class_path": path, "init_args": init_args}


def problems_of(given: RunConfig) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        import_classes(given)
    return list(caught.value.problems)


def only_message(given: RunConfig, path: str) -> str:
    (problem,) = problems_of(given)
    assert problem.path == path
    return problem.message


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("nowhere.Model", "nowhere.Model does not import: ModuleNotFoundError: No module named 'nowhere'"),
        ("needy.Model", "ModuleNotFoundError: No module named 'no_such_dependency' ({folder}/needy.py, line 1)"),
        ("broken.Model", "the last line ({folder}/broken.py, line 2)"),
        ("leaving.Model", "leaving.Model does not import: SystemExit: 3 ({folder}/leaving.py, line 2)"),
        ("half.Model", "half.Model does not import: SyntaxError: '(' was never closed"),
        ("theirs.Modle", "module theirs has no Modle; the module is {folder}/theirs.py: did you mean Model?"),
        ("theirs.Dat", "module theirs has no Dat; the module is {folder}/theirs.py: correct the name"),
        ("theirs.number", "theirs.number is not a LightningModule; it is of type int"),
        ("theirs.Bare", "theirs.Bare is not a LightningModule; it is a class without a base class"),
        ("theirs.Data", "theirs.Data is not a LightningModule; it is a subclass of LightningDataModule"),
        ("os.path", "os.path is not a LightningModule; it is of type module"),
    ],
)
def test_missing_or_wrong_class_is_reported(tmp_path: Path, path: str, expected: str) -> None:
    message = only_message(config({"class_path": path}), "model.class_path")
    assert expected.format(folder=tmp_path) in message
    assert "Traceback" not in message


def test_module_that_exits_is_found_through_a_wrapped_exit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrapped(inner: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def exit(code: object = 0) -> None:  # noqa: A001 -- the name that W&B's has
            inner(code)

        return exit

    # Twice: W&B may have replaced it too.
    monkeypatch.setattr(sys, "exit", wrapped(wrapped(sys.exit)))
    message = only_message(config({"class_path": "leaving.Model"}), "model.class_path")
    assert f"SystemExit: 3 ({tmp_path}/leaving.py, line 2)" in message


def test_model_instead_of_data_is_reported() -> None:
    given = config(model(width=1), {"class_path": "theirs.Alone"})
    assert only_message(given, "data.class_path").startswith("theirs.Alone is not a LightningDataModule")


def test_wrong_argument_name_suggests_the_right_one() -> None:
    given = config(model(width=1, nmae="x"))
    assert only_message(given, "model.init_args.nmae") == "Model takes no nmae; did you mean name?"
    given = config(model(width=1, learning_rate=2))
    assert only_message(given, "model.init_args.learning_rate") == "Model takes no learning_rate; did you mean lr?"


def test_unknown_argument_lists_all() -> None:
    given = config(model(width=1, zzz="x"))
    assert only_message(given, "model.init_args.zzz") == "Model takes no zzz; it takes lr, name, sizes, width"


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("width", "wide", "int"),
        ("lr", "fast", "float"),
        ("name", 3, "str"),
        ("sizes", 3, "list"),
        ("sizes", ["a"], "int"),
    ],
)
def test_wrong_argument_type_shows_given_and_expected(name: str, value: Any, wanted: str) -> None:
    message = only_message(config(model(**{"width": 1, name: value})), f"model.init_args.{name}")
    assert message.startswith(f"given {value!r}; ")
    assert f"<class '{wanted}'>" in message


@pytest.mark.parametrize(
    ("path", "name"), [("theirs.Model", "width"), ("theirs.Model", "lr"), ("theirs.Alone", "batch_size")]
)
def test_null_for_an_argument_that_needs_a_value_is_reported(path: str, name: str) -> None:
    spec = model(path, **({"width": 1} if path == "theirs.Model" else {}) | {name: None})
    message = only_message(config(spec), f"model.init_args.{name}")
    assert message == f"given null; {path.partition('.')[2]} expects a value, so give one"


def test_missing_model_is_reported() -> None:
    assert only_message(RunConfig(), "model").startswith("no model was given; ")


def test_missing_required_argument_is_reported() -> None:
    assert only_message(config(model()), "model.init_args.width") == "Model needs it, and it was not given; add it"


def test_arguments_that_are_not_a_mapping_are_reported() -> None:
    given = config({"class_path": "theirs.Model", "init_args": [1]})
    assert only_message(given, "model.init_args") == "given [1]; expected a mapping of arguments"


@pytest.mark.parametrize("size", [0, -4])
def test_batch_size_zero_is_refused(size: int) -> None:
    given = config(model(width=1), {"class_path": "theirs.Data", "init_args": {"batch_size": size}})
    assert only_message(given, "data.init_args.batch_size") == f"given {size}; expected at least 1"


def test_problems_of_all_classes_are_reported_at_once() -> None:
    callbacks = [
        model("theirs.Counter", every="x"),
        {"class_path": "theirs.Model"},
        {},
        {"class_path": "nowhere.C"},
    ]
    given = config(
        model(lr="x", zzz=1), {"class_path": "theirs.Nope"}, callbacks=callbacks, logger={"class_path": "theirs.Bare"}
    )
    assert [problem.path for problem in problems_of(given)] == [
        "model.init_args.lr",
        "model.init_args.zzz",
        "model.init_args.width",
        "data.class_path",
        "trainer.callbacks[0].init_args.every",
        "trainer.callbacks[1].class_path",
        "trainer.callbacks[2].class_path",
        "trainer.callbacks[3].class_path",
        "trainer.logger[0].class_path",
    ]


@pytest.mark.parametrize(
    ("model_spec", "data_spec", "owner", "size"),
    [
        (model(width=1), {"class_path": "theirs.Data"}, "data", 8),
        (model(width=1), model("theirs.Data", batch_size=16), "data", 16),
        (model("theirs.Alone"), None, "model", 4),
        (model("theirs.Alone", batch_size=2), None, "model", 2),
        # The data's loaders are used if there is a data module.
        (model("theirs.Alone", batch_size=2), {"class_path": "theirs.Data"}, "data", 8),
        (model(width=1), None, None, None),
    ],
)
def test_batch_size_is_found_in_the_class_that_takes_it(
    model_spec: dict[str, Any], data_spec: dict[str, Any] | None, owner: str | None, size: int | None
) -> None:
    found = import_classes(config(model_spec, data_spec))
    assert (found.batch_size_of, found.batch_size) == (owner, size)


def test_traits_are_properties_of_the_classes() -> None:
    traits = import_classes(config(model(width=1), {"class_path": "theirs.Data"})).traits()
    assert traits == {"model": "theirs.Model", "batch_size": 8, "static_graph": True, "precision_plugin": None,
                      "weight_callbacks": []}  # fmt: skip
    assert import_classes(config(model("theirs.Alone"))).traits()["static_graph"] is False


def test_micro_batch_is_passed_to_the_class_that_takes_batch_size() -> None:
    given = config(model(width=1, lr="1e-3"), model("theirs.Data", batch_size=16, root="/r"))
    made, data = make_objects(given, import_classes(given), 4)
    assert vars(made)["given"] == (1, 1e-3, "m", [1])
    assert data is not None
    assert (vars(data)["batch_size"], vars(data)["root"]) == (4, "/r")
    assert given.data == model("theirs.Data", batch_size=16, root="/r"), "the config stays as it was"


def test_batch_size_is_kept_without_a_planned_micro_batch() -> None:
    given = config(model("theirs.Alone", batch_size=6))
    made, data = make_objects(given, import_classes(given), None)
    assert (vars(made)["batch_size"], data) == (6, None)


def test_a_model_that_has_its_own_loaders_gets_the_micro_batch() -> None:
    given = config({"class_path": "theirs.Alone"})
    made, _ = make_objects(given, import_classes(given), 2)
    assert vars(made)["batch_size"] == 2


def test_error_of_a_constructor_is_not_changed() -> None:
    given = config({"class_path": "theirs.Failing"})
    with pytest.raises(RuntimeError, match=r"^its own words$"):
        make_objects(given, import_classes(given), None)


def test_callbacks_and_loggers_are_created_in_order(tmp_path: Path) -> None:
    callbacks = [model("theirs.Counter", every=2), {"class_path": "lightning.pytorch.callbacks.Timer"}]
    logger = model("lightning.pytorch.loggers.CSVLogger", save_dir=str(tmp_path))
    given = config(model(width=1), callbacks=callbacks, logger=logger)
    import_classes(given)

    first, second = make_callbacks(given)
    (made,) = make_loggers(given)

    assert (type(first).__name__, vars(first)["every"]) == ("Counter", 2)
    assert isinstance(second, pl.callbacks.Timer)
    assert isinstance(made, CSVLogger)


def test_one_callback_needs_no_list() -> None:
    (made,) = make_callbacks(config(callbacks=model("theirs.Counter", every=5)))
    assert vars(made)["every"] == 5


def test_missing_callbacks_and_loggers_are_empty() -> None:
    assert make_callbacks(RunConfig()) == []
    assert make_loggers(RunConfig()) == []


def test_self_is_not_an_argument_under_any_name() -> None:
    given = config({"class_path": "tests.support.cli_zoo.Plain"})
    made, _ = make_objects(given, import_classes(given), None)
    assert vars(made)["d"] == 8
    problem = only_message(config(model("tests.support.cli_zoo.Plain", s=1)), "model.init_args.s")
    assert problem == "Plain takes no s; it takes d"


def test_argument_of_a_dataclass_type_is_created() -> None:
    given = config(model("tests.support.cli_zoo.Net", shape={"width": "3"}))
    made, _ = make_objects(given, import_classes(given), None)
    assert cli_zoo.Sizes(3, 1) in vars(made)["given"]


def test_dict_kwargs_are_arguments_or_go_to_kwargs() -> None:
    spec = {"class_path": "tests.support.cli_zoo.Data", "dict_kwargs": {"batch_size": "4", "colour": "red"}}
    given = config(model(width=1), spec)
    classes = import_classes(given)
    _, data = make_objects(given, classes, None)
    assert (classes.batch_size, vars(data)["batch_size"], vars(data)["more"]) == (4, 4, {"colour": "red"})
    misplaced = config(model(width=1), model("tests.support.cli_zoo.Data", colour="red"))
    message = only_message(misplaced, "data.init_args.colour")
    assert message == "Data takes no colour; it takes batch_size, folder; for its **kwargs, give it under dict_kwargs"
    wrong = {"class_path": "theirs.Counter", "dict_kwargs": {"evry": 3}}
    message = only_message(config(model(width=1), callbacks=[wrong]), "trainer.callbacks[0].dict_kwargs.evry")
    assert message == "Counter takes no evry; did you mean every?"


def test_a_quoted_batch_size_is_the_batch_size() -> None:
    assert import_classes(config(model("theirs.Alone", batch_size="6"))).batch_size == 6


@pytest.mark.parametrize("name", ["batch_size", "d", "old", "sizes"])
def test_argument_next_to_required_ones_is_checked_by_itself(name: str) -> None:
    """A name that is part of another, such as `d` in `folder`, does not relate an error to it."""
    given = {"folder": "here", "sizes": {"width": 3}, "d": "5", "old": 6, "batch_size": "4"}
    complete = config(model(width=1), model("theirs.Rooted", **given))
    classes = import_classes(complete)
    _, data = make_objects(complete, classes, None)
    assert (classes.batch_size, vars(data)["given"]) == (4, ("here", 3, 5, 6, 4))
    without = config(model(width=1), model("theirs.Rooted", **{name: given[name]}))
    reported = {problem.path for problem in problems_of(without)}
    assert reported == {f"data.init_args.{other}" for other in ("folder", "sizes") if other != name}
    wrong = config(model(width=1), model("theirs.Rooted", **{**given, name: "x"}))
    assert all(problem.path == f"data.init_args.{name}" for problem in problems_of(wrong))


def test_error_of_an_argument_excludes_other_missing_ones() -> None:
    spec = model("theirs.Rooted", sizes={})
    reported = {problem.path: problem.message for problem in problems_of(config(model(width=1), spec))}
    assert reported["data.init_args.sizes"] == "given {}; sizes.width is required and was not given; add it"


def test_short_name_finds_an_imported_class() -> None:
    callbacks = [{"class_path": "EarlyStopping", "init_args": {"monitor": "loss"}}, {"class_path": "OfThisTestAlone"}]
    given = config(model(width=1), callbacks=callbacks)
    import_classes(given)
    stopping, own = make_callbacks(given)
    assert (type(stopping), type(own).__name__) == (pl.callbacks.EarlyStopping, "OfThisTestAlone")
    message = only_message(
        config(model(width=1), callbacks=[{"class_path": "Nope"}]), "trainer.callbacks[0].class_path"
    )
    assert message == "given 'Nope', and no imported Callback has that name; give its import path, such as my_pkg.Nope"


@pytest.mark.parametrize(
    ("base", "given", "meant"),
    [
        (pl.Callback, "EarlyStoping", "EarlyStopping"),
        (pl.Callback, "early_stopping", "EarlyStopping"),
        (pl.Callback, "learningratemonitor", "LearningRateMonitor"),
        (pl.Callback, "Nope", None),
        (Logger, "csv", "CSVLogger"),
        (Logger, "tensorboard", "TensorBoardLogger"),
        (Logger, "WandBLogger", "WandbLogger"),
        (Logger, "x", None),
        (torch.optim.Optimizer, "AdamWW", "AdamW"),
    ],
)
def test_a_similar_short_name_is_suggested(base: type[Any], given: str, meant: str | None) -> None:
    with pytest.raises(ConfigError) as raised:
        import_class(given, base, "trainer.x")
    (problem,) = raised.value.problems
    assert (f"; did you mean {meant}? Or give its import path" in problem.message) == (meant is not None)
    assert f"import path, such as my_pkg.{given}" in problem.message


def test_class_of_pytorch_lightning_is_reported_with_the_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "pytorch_lightning"
    package.mkdir()
    (package / "__init__.py").write_text("class LightningModule: pass\n")
    (tmp_path / "old.py").write_text("import pytorch_lightning as pl\nclass Net(pl.LightningModule): pass\n")
    for name in ("pytorch_lightning", "old"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        message = only_message(config(model("old.Net")), "model.class_path")
    finally:
        sys.modules.pop("pytorch_lightning", None)
        sys.modules.pop("old", None)
    assert message == (
        "old.Net is a LightningModule of the package pytorch_lightning, and the launcher uses the package "
        "lightning, which has the same class: in old, import `lightning.pytorch` instead of `pytorch_lightning`"
    )


@pytest.mark.filterwarnings("ignore")
def test_checkpoint_has_settings_that_create_the_objects_again(tmp_path: Path) -> None:
    """As under LightningCLI, whether one of them names a class or none."""
    arguments = {"mode": "SLOW", "path": "a/b", "shape": {"width": 3}, "pair": [2, 0.25]}
    given = config({"class_path": "tests.support.cli_zoo.Net", "init_args": arguments},
                   {"class_path": "tests.support.cli_zoo.Data", "init_args": {"folder": "c",
                                                                              "batch_size": 2}})  # fmt: skip
    made, data = make_objects(given, import_classes(given), None)
    assert data is not None
    trainer = pl.Trainer(accelerator="cpu", devices=1, max_steps=1, logger=False, enable_checkpointing=False,
                         enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(made, data)
    trainer.save_checkpoint(file := tmp_path / "net.ckpt")
    saved = torch.load(file, weights_only=True)["hyper_parameters"]
    assert {name: saved[name] for name in arguments} == {**arguments, "shape": {"width": 3, "depth": 1, "marks": ["m"]}}
    assert saved["_class_path"] == "tests.support.cli_zoo.Net"
    assert cli_zoo.Net.load_from_checkpoint(file).given == made.given
    again = cli_zoo.Data.load_from_checkpoint(file)
    assert (again.folder, again.batch_size) == (Path("c"), 2)


def test_default_without_a_form_in_a_file_is_saved_unchanged() -> None:
    """LightningCLI raises an error for it."""
    given = config(model("tests.support.toy.Toy", lr="0.5"))
    made, _ = make_objects(given, import_classes(given), None)
    assert made.signal_at == -1
    parser, odd = class_arguments._parser(type(made), frozenset()), {"lr": 0.5, "signal_number": SIGINT}
    assert class_arguments._settings(parser, odd) == odd


def test_hyperparameters_are_settings_if_one_names_a_class() -> None:
    """As under LightningCLI: a checkpoint contains no object, and the model can be created from it again."""
    encoder = {"class_path": "tests.support.cli_zoo.ZooEncoder", "init_args": {"width": 3}}
    given = config(model("tests.support.cli_zoo.Net", encoder=encoder))
    made, _ = make_objects(given, import_classes(given), None)
    assert made.hparams["encoder"]["init_args"]["width"] == 3
    assert made.hparams["_instantiator"] == "lightning.pytorch.cli.instantiate_module"
    plain = config(model("tests.support.cli_zoo.Net", lr="0.5"))
    made, _ = make_objects(plain, import_classes(plain), None)
    assert made.hparams["lr"] == 0.5


def test_optimizer_of_the_config_replaces_the_models_with_a_notice() -> None:
    def objects(name: str) -> UserObjects:
        optimizer = {"class_path": "SGD", "init_args": {"lr": 0.5}}
        values = {"model": {"class_path": f"tests.support.cli_zoo.{name}"}, "optimizer": optimizer}
        return make_user_objects(parse_config(values), None)

    own, none = objects("Net"), objects("Plain")
    assert list(own.notices) == ["`optimizer` in the config replaces Net.configure_optimizers"]
    assert list(none.notices) == []
    for made in (own.model, none.model, copy.deepcopy(own.model)):
        optimizer = made.configure_optimizers()
        assert isinstance(optimizer, torch.optim.SGD)
        assert optimizer.param_groups[0]["lr"] == 0.5
        assert optimizer.param_groups[0]["params"] == list(made.parameters())


@pytest.mark.parametrize(
    ("values", "path", "expected"),
    [
        ({"lr_scheduler": {"class_path": "StepLR"}}, "lr_scheduler", "given without an optimizer"),
        ({"optimizer": {"class_path": "Adma"}}, "optimizer.class_path", "no imported Optimizer has that name"),
        ({"optimizer": {"class_path": "Adam", "init_args": {"lrr": 1}}}, "optimizer.init_args.lrr", "did you mean lr?"),
        ({"optimizer": {"class_path": "Adam", "init_args": {"params": []}}}, "optimizer.init_args.params", "takes no"),
        ({"ddp": {"bucket_cap": 1}}, "ddp", "unknown argument bucket_cap"),
        ({"ddp": {"ddp_comm_hook": "no.such"}}, "ddp.init_args.ddp_comm_hook", "given 'no.such'"),
        ({"ddp": {"bucket_cap_mb": 1}, "strategy": "deepspeed_stage_2"}, "ddp", "or use `strategy: ddp`"),
        (
            {"trainer": {"profiler": {"class_path": "SimpleProfiler", "init_args": {"x": 1}}}},
            "trainer.profiler.init_args.x",
            "SimpleProfiler takes no x",
        ),
    ],
)
def test_problems_of_other_classes_are_reported(values: dict[str, Any], path: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        import_classes(parse_config({"model": {"class_path": "tests.support.cli_zoo.Plain"}, **values}))
    messages = {problem.path: problem.message for problem in caught.value.problems}
    assert expected in messages[path]


def test_classes_are_checked_once_for_a_config_and_again_for_another() -> None:
    first, equal = config(model("theirs.Alone", batch_size=6)), config(model("theirs.Alone", batch_size=6))
    found = import_classes(first)
    assert known_classes(first) is found
    assert known_classes(equal) is not found, "another config, whose classes may have changed"
    assert import_classes(equal) is not found
