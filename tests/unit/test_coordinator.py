"""The arguments of `TrainingCoordinator`. The trainings themselves are in tests/distributed."""

from __future__ import annotations

import dataclasses
import inspect
import os
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.plugins.precision import DoublePrecision
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch.utils.data import DataLoader

import launcher.coordinator as module
from launcher import TrainingCoordinator
from launcher.config.coordinator_arguments import NO_ARGUMENT, CoordinatorSettings
from launcher.config.schema import CheckpointOptions, RunConfig, TrainerOptions, WandbOptions, WatchOptions
from launcher.config.validation import parse_config
from launcher.core.errors import ConfigError, Interrupted, Problem, TrainingError, UsageError
from launcher.core.python_terms import ARGUMENT_NAMES
from launcher.process.rank_status import RankStatusWriter
from launcher.training import script_end
from launcher.training.result import FitResult
from launcher.user_code.objects import UserObjects
from strategies.precision import PrecisionError
from tests.support.toy import Numbers, Toy, ToyData


class Fits:
    """Replaces `fit`; keeps the arguments that it receives."""

    def __init__(self) -> None:
        self.configs: list[RunConfig] = []
        self.given: list[UserObjects] = []
        self.env: Any = None

    def __call__(self, config: RunConfig, *, env: Any = None, given: UserObjects) -> FitResult:
        self.configs.append(config)
        self.given.append(given)
        self.env = env
        best = Path("best.ckpt") if config.name != "unsaved" else None
        return FitResult(Path("runs/x"), "the plan", {"loss": 1.0}, 3, best, best, "the trainer")  # type: ignore[arg-type]


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> Fits:
    made = Fits()
    monkeypatch.setattr(module, "fit", made)
    monkeypatch.setattr(module, "in_notebook", lambda: False)
    # The script of this process is pytest: another rank would run the whole suite again.
    monkeypatch.setattr(module, "script_rank", lambda count: {"RANK": "0", "COUNT": str(count)})
    return made


def coordinator(**options: Any) -> TrainingCoordinator:
    return TrainingCoordinator(**{"use_gpu": False, **options})


def loader() -> DataLoader[Any]:
    return DataLoader(Numbers(8), batch_size=4)


def test_the_defaults_are_those_of_the_config(fits: Fits) -> None:
    TrainingCoordinator(use_gpu=False).train(Toy(), loader())
    (config,) = fits.configs
    assert (config.runs_dir, config.precision, config.strategy) == ("runs", "auto", "auto")
    assert (config.devices, config.num_nodes, config.accelerator) == ("auto", "auto", "cpu")
    changed = {name for name, value in config.to_dict().items() if value != RunConfig().to_dict()[name]}
    assert changed == {"accelerator", "trainer", "model"}
    assert config.trainer == TrainerOptions(max_epochs=1)
    assert config.model == {"class_path": "tests.support.toy.Toy"}, "for whoever reads the run's config"


def test_what_is_given_is_in_the_config(fits: Fits, tmp_path: Path) -> None:
    made = coordinator(
        output_dir=tmp_path, precision="bf16", gradient_clip_val=None, strategy="ddp", devices=1, num_nodes=2,
        wandb=WandbOptions("disabled"), on_precision_change="error",
    )  # fmt: skip
    checkpoint = tmp_path / "a.ckpt"
    made.train(Toy(), loader(), max_epochs=7, use_amp=True, resume_from_checkpoint=checkpoint, seed=3, name="mine",
               log_every_n_steps=2)  # fmt: skip
    (config,) = fits.configs
    assert (config.runs_dir, config.precision, config.strategy) == (str(tmp_path), "bf16", "ddp")
    assert (config.devices, config.num_nodes, config.wandb.mode) == (1, 2, "disabled")
    assert (config.trainer.gradient_clip_val, config.trainer.max_epochs) == (None, 7)
    assert config.trainer.log_every_n_steps == 2
    assert (config.use_amp, config.resume, config.seed, config.name) == (True, str(checkpoint), 3, "mine")
    assert config.on_precision_change == "error"
    assert parse_config(config.to_dict()) == config, "a config file could say it too"


def test_lightnings_variables_stand_in_for_defaults(fits: Fits, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"MAX_EPOCHS": "3", "LIMIT_VAL_BATCHES": "2", "PRECISION": "bf16-mixed", "LOGGER": "False"}
    for name, text in variables.items():
        monkeypatch.setenv(f"PL_TRAINER_{name}", text)
    coordinator().train(Toy(), loader())
    coordinator(precision="32").train(Toy(), loader(), max_epochs=7, limit_val_batches=5)
    usual, asked = fits.configs
    assert (usual.trainer.max_epochs, usual.trainer.limit_val_batches, usual.precision) == (3, 2, "bf16-mixed")
    assert (asked.trainer.max_epochs, asked.trainer.limit_val_batches, asked.precision) == (7, 5, "32")
    assert (usual.wandb.mode, usual.trainer.gradient_clip_val) == ("disabled", None)


def test_with_a_gpu_wanted_the_launcher_looks_for_one() -> None:
    assert TrainingCoordinator()._config.accelerator == "auto"
    assert TrainingCoordinator(use_gpu=False)._config.accelerator == "cpu"


def test_the_result_is_the_contracts(fits: Fits) -> None:
    model = Toy()
    found = coordinator().train(model, loader())
    assert set(found) == {"trainer", "model", "best_model_path", "final_metrics", "plan", "run_directory"}
    assert (found["trainer"], found["plan"], found["final_metrics"]) == ("the trainer", "the plan", {"loss": 1.0})
    assert found["model"] is model
    assert (found["best_model_path"], found["run_directory"]) == ("best.ckpt", "runs/x")
    assert coordinator().train(model, loader(), name="unsaved")["best_model_path"] is None


def test_each_argument_is_an_attribute_as_it_was_given(tmp_path: Path) -> None:
    callback, logger, plugin = pl.Callback(), CSVLogger(tmp_path), DoublePrecision()
    given: dict[str, Any] = {
        "output_dir": tmp_path, "use_gpu": False, "precision": "BF16", "gradient_clip_val": 0.5, "strategy": "ddp",
        "devices": "2", "num_nodes": 3, "notebook_processes": True, "callbacks": callback, "loggers": [logger],
        "plugins": plugin, "wandb": WandbOptions("disabled"), "on_precision_change": "error",
    }  # fmt: skip
    assert {*given, "settings"} == set(inspect.signature(TrainingCoordinator).parameters)
    made = TrainingCoordinator(**given)
    assert {name: getattr(made, name) for name in given} == given
    defaults = TrainingCoordinator()
    for name, parameter in inspect.signature(TrainingCoordinator).parameters.items():
        if name != "settings":
            assert getattr(defaults, name) == parameter.default, name


def test_two_trainings_of_one_coordinator_are_independent(fits: Fits) -> None:
    made = coordinator()
    made.train(Toy(), loader(), name="a", max_epochs=5, use_amp=True, max_steps=3)
    made.train(Toy(), loader(), name="b")
    second = fits.configs[1]
    assert (second.name, second.trainer.max_epochs, second.use_amp, second.trainer.max_steps) == ("b", 1, None, -1)


def test_loaders_are_taken_as_they_are(fits: Fits) -> None:
    train, validation = loader(), loader()
    coordinator().train(Toy(), train, validation)
    data = fits.given[0].data
    assert data is not None
    assert data.train_dataloader() is train
    assert data.val_dataloader() is validation
    assert fits.given[0].traits()["batch_size"] == 4
    coordinator().train(Toy(), [train, loader()])
    several = fits.given[1].data
    assert several is not None
    assert several.val_dataloader() == []
    assert fits.given[1].traits()["batch_size"] is None


@pytest.mark.parametrize("by_name", [True, False])
def test_a_datamodule_is_taken_in_either_place(fits: Fits, by_name: bool) -> None:
    data = ToyData(batch_size=2)
    if by_name:
        coordinator().train(Toy(), datamodule=data)
    else:
        coordinator().train(Toy(), data)
    assert fits.given[0].data is data
    assert fits.given[0].traits()["batch_size"] == 2
    coordinator().train(Toy())
    assert fits.given[1].data is None, "the model is asked"


@pytest.mark.parametrize(
    ("train", "validation", "datamodule", "says"),
    [
        (loader(), None, ToyData(), "train_dataloaders"),
        (None, loader(), ToyData(), "val_dataloaders"),
        (ToyData(), loader(), None, "val_dataloaders"),
        (ToyData(), None, ToyData(), "train_dataloaders"),
        (None, loader(), None, "val_dataloaders"),
    ],
)
def test_data_that_would_be_left_out_is_refused(
    fits: Fits, train: Any, validation: Any, datamodule: Any, says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        coordinator().train(Toy(), train, validation, datamodule=datamodule)
    assert [problem.path for problem in caught.value.problems] == [says]
    assert fits.configs == []


@pytest.mark.parametrize("model", [None, "my_pkg.Model", Toy, object()])
def test_something_that_is_no_lightning_module_is_refused(fits: Fits, model: Any) -> None:
    with pytest.raises(ConfigError, match=r"model: given .*; expected a LightningModule"):
        coordinator().train(model, loader())
    assert fits.configs == []


@pytest.mark.parametrize("precision", ["17", "fp15", "", None, 8.5, "mixed", True])
def test_an_invalid_precision_is_rejected_by_the_constructor(precision: Any) -> None:
    with pytest.raises(PrecisionError):
        TrainingCoordinator(precision=precision)


@pytest.mark.parametrize("precision", ["auto", "AUTO", 16, "bf16-mixed", "64-true"])
def test_every_spelling_of_a_precision_is_taken(precision: Any, fits: Fits) -> None:
    coordinator(precision=precision).train(Toy(), loader())
    assert len(fits.configs) == 1


def test_all_wrong_arguments_of_a_training_are_reported_together_with_suggestions(fits: Fits, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        coordinator(output_dir=tmp_path / "runs").train(Toy(), loader(), name="../elsewhere", max_epochs=-7, max_step=3,
                                                        seed=-1)  # fmt: skip
    reported = {problem.path: problem.message for problem in caught.value.problems}
    assert set(reported) == {"name", "seed", "max_epochs", "max_step"}
    assert reported["max_step"] == "unknown key; did you mean max_steps?"
    assert fits.configs == []
    assert not (tmp_path / "runs").exists()


# Values of a wrong type for every argument; those of ARGUMENTS are right for some.
WRONG: tuple[Any, ...] = (1.25, -7, object(), int, b"x", float("nan"), [1], {"a": 1}, {1: 2}, torch.zeros(2), "", len)
ARGUMENTS = {
    **dict.fromkeys([*inspect.signature(TrainingCoordinator).parameters, *CoordinatorSettings.__annotations__], ()),
    "output_dir": ("",),
    "gradient_clip_val": (1.25,),
    "deepspeed_config": ("", {"a": 1}),
    "memory_share": (),
    "agreement_timeout": (1.25,),
    "process_group_timeout": (1.25,),
}


@pytest.mark.parametrize("name", [name for name in ARGUMENTS if name not in ("settings", "precision")])
def test_each_argument_of_a_wrong_type_is_reported_by_the_constructor(name: str) -> None:
    for value in WRONG:
        if any(type(value) is type(right) and value == right for right in ARGUMENTS[name]):
            continue
        arguments: Any = {name: value}
        with pytest.raises(ConfigError) as caught:
            TrainingCoordinator(**arguments)
        assert {re.split(r"[.[]", problem.path)[0] for problem in caught.value.problems} == {name}
        text = str(caught.value)
        assert "the call has" in text
        assert not re.search(r"expected .*\b(null|true|false|mapping|text)\b", text), text


@pytest.mark.parametrize("name", ["name", "seed", "use_amp", "resume_from_checkpoint", "max_epochs", "max_steps"])
def test_each_argument_of_train_of_a_wrong_type_is_reported(fits: Fits, name: str) -> None:
    for value in (1.25, object(), b"x", [1], {"a": 1}):
        arguments: Any = {name: value}
        with pytest.raises(ConfigError) as caught:
            coordinator().train(Toy(), loader(), **arguments)
        assert [problem.path for problem in caught.value.problems] == [name]
    assert fits.configs == []


def test_all_wrong_arguments_of_the_constructor_are_reported_together() -> None:
    wrong: Any = {"output_dir": None, "use_gpu": "no", "precision": "fp7", "gradient_clip_val": -1.0, "devices": 0,
                  "strategy": "dpp", "callbacks": [1], "loggers": "csv", "plugins": [3], "wandb": {"mode": "on"},
                  "checkpoint": {"every": 3}, "global_batch_size": "many", "nodes": 2}  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        TrainingCoordinator(**wrong)
    reported = {problem.path: problem.message for problem in caught.value.problems}
    nested = {"callbacks": "callbacks[0]", "loggers": "loggers[0]", "plugins": "plugins[0]", "wandb": "wandb.mode",
              "checkpoint": "checkpoint.every"}  # fmt: skip
    assert set(reported) == {nested.get(name, name) for name in wrong}
    assert reported["output_dir"] == "given None; expected a str"
    assert reported["use_gpu"] == "given 'no'; expected True or False"
    assert reported["callbacks[0]"].startswith("given 1; expected an object of one of Lightning's classes")


def test_objects_of_another_kind_are_reported_without_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "lightning.pytorch")
    with pytest.raises(ConfigError, match=r"callbacks\[0\]: given 1; expected an object of one of Lightning's"):
        TrainingCoordinator(callbacks=1)
    assert "lightning.pytorch" not in sys.modules


def test_callbacks_and_loggers_of_one_training_are_added_to_the_coordinators(fits: Fits, tmp_path: Path) -> None:
    first, second = pl.Callback(), pl.Callback()
    loggers = [CSVLogger(tmp_path / name) for name in ("a", "b")]
    owner = coordinator(callbacks=first, loggers=loggers[0])
    owner.train(Toy(), loader(), callbacks=[second], logger=loggers[1])
    owner.train(Toy(), loader(), callbacks=second, logger=loggers[1:])
    owner.train(Toy(), loader(), logger=True)
    assert [given.callbacks for given in fits.given] == [(first, second), (first, second), (first,)]
    assert [given.loggers for given in fits.given] == [tuple(loggers), tuple(loggers), (loggers[0],)]


@pytest.mark.parametrize(
    ("name", "advice"),
    [("callbacks", "give Lightning's callbacks, as objects"), ("logger", "give Lightning's loggers, as objects"),
     ("plugins", "give plugins to TrainingCoordinator, as objects")],
)  # fmt: skip
def test_other_values_of_the_trainers_objects_are_refused(fits: Fits, name: str, advice: str) -> None:
    with pytest.raises(ConfigError, match=f" {name}: {advice}"):
        coordinator().train(Toy(), loader(), **{name: [object()]})


@pytest.mark.parametrize("name", ["accelerator", "ckpt_path", "default_root_dir", "devices", "loggers", "num_nodes",
                                  "output_dir", "precision", "strategy", "wandb"])  # fmt: skip
def test_the_error_for_a_misplaced_option_states_its_place(fits: Fits, name: str) -> None:
    options: Any = {name: "x"}
    with pytest.raises(ConfigError) as caught:
        coordinator().train(Toy(), loader(), **options)
    (problem,) = caught.value.problems
    place = problem.message.replace(",", "").replace(":", "").split()
    arguments = {*inspect.signature(TrainingCoordinator).parameters, *inspect.signature(coordinator().train).parameters}
    assert problem.path == name
    assert arguments & set(place)


@pytest.mark.parametrize("devices", [None, -1, "-1", "auto"])
def test_all_devices_are_spelt_as_in_a_trainer(fits: Fits, devices: Any) -> None:
    coordinator(devices=devices).train(Toy(), loader())
    assert fits.configs[0].devices == "auto"


def test_a_count_of_devices_may_be_a_text(fits: Fits) -> None:
    coordinator(devices="2").train(Toy(), loader())
    assert fits.configs[0].devices == 2
    with pytest.raises(ConfigError, match="devices: given"):
        coordinator(devices="two").train(Toy(), loader())


def test_a_quoted_number_is_a_number(fits: Fits) -> None:
    TrainingCoordinator(use_gpu=False, global_batch_size="8", checkpoint={"every_n_steps": "2"}).train(  # type: ignore[arg-type]
        Toy(), ToyData(), max_epochs="3", max_steps="-1"
    )
    (config,) = fits.configs
    found = (config.global_batch_size, config.checkpoint.every_n_steps, config.trainer.max_epochs)
    assert (*found, config.trainer.max_steps) == (8, 2, 3, -1)
    with pytest.raises(UsageError, match=r"max_epochs: given '-5'; expected at least -1"):
        TrainingCoordinator(use_gpu=False).train(Toy(), ToyData(), max_epochs="-5")


def test_a_group_of_trainer_options_is_refused_with_what_to_do() -> None:
    with pytest.raises(UsageError, match="trainer: give Lightning's options to train, each as an argument"):
        TrainingCoordinator(trainer={"max_epochs": 1})  # type: ignore[call-arg]


def test_one_object_is_a_list_of_one_as_for_a_trainer(fits: Fits, tmp_path: Path) -> None:
    callback, logger, plugin = pl.Callback(), CSVLogger(tmp_path), DoublePrecision()
    coordinator(callbacks=callback, loggers=logger, plugins=plugin).train(Toy(), loader())
    coordinator(callbacks=None, loggers=None, plugins=None).train(Toy(), loader())
    given, none = fits.given
    assert (list(given.callbacks), list(given.loggers), given.precision_plugin) == ([callback], [logger], plugin)
    assert (list(none.callbacks), list(none.loggers), none.precision_plugin) == ([], [], None)


def test_the_users_objects_are_passed_on(fits: Fits, tmp_path: Path) -> None:
    callback, logger, plugin = pl.Callback(), CSVLogger(tmp_path), DoublePrecision()
    coordinator(callbacks=[callback], loggers=[logger], plugins=[plugin]).train(Toy(), loader())
    given = fits.given[0]
    assert (list(given.callbacks), list(given.loggers), given.precision_plugin) == ([callback], [logger], plugin)


@pytest.mark.case(19)
def test_the_plan_knows_the_users_plugin(fits: Fits) -> None:
    coordinator(plugins=[DoublePrecision()]).train(Toy(), loader())
    traits = fits.given[0].traits()
    assert traits["precision_plugin"] == "lightning.pytorch.plugins.precision.double.DoublePrecision"
    coordinator().train(Toy(), loader())
    assert fits.given[1].traits()["precision_plugin"] is None


@pytest.mark.case(19)
def test_two_precision_plugins_or_a_plugin_of_another_kind_are_refused(fits: Fits) -> None:
    two = [DoublePrecision(), MixedPrecision("bf16-mixed", "cpu")]
    with pytest.raises(ConfigError, match="given 2 precision plugins; a run has one precision"):
        coordinator(plugins=two).train(Toy(), loader())
    with pytest.raises(ConfigError, match=r"plugins\[0\]: given a str; expected a precision plugin"):
        coordinator(plugins="ddp").train(Toy(), loader())


@pytest.mark.case(44)
@pytest.mark.parametrize("allowed", [False, True])
def test_a_notebook_trains_on_one_process_with_a_notice_unless_more_are_allowed(
    fits: Fits, allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    forked: list[int] = []

    def fit_in_forks(config: RunConfig, given: UserObjects, count: int) -> FitResult:
        forked.append(count)
        return fits(config, given=given)

    monkeypatch.setattr(module, "in_notebook", lambda: True)
    monkeypatch.setattr("launcher.coordinator._fit_in_forks", fit_in_forks)
    coordinator(devices=2, notebook_processes=allowed).train(Toy(), loader())
    if allowed:
        assert (forked, fits.configs[0].devices, fits.given[0].notices) == ([2], 2, ())
    else:
        assert (forked, fits.configs[0].devices) == ([], 1)
        (notice,) = fits.given[0].notices
        assert notice.startswith("this is a notebook, so one process trains instead of 2: notebook_processes=True")


@pytest.mark.case(44)
def test_one_process_in_a_notebook_gives_no_notice(fits: Fits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "in_notebook", lambda: True)
    coordinator().train(Toy(), loader())
    assert (fits.given[0].notices, fits.configs[0].devices) == ((), "auto")


def test_under_torchrun_it_is_one_of_torchruns_ranks(fits: Fits, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0,
           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}  # fmt: skip
    for name, value in own.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(module, "script_rank", lambda *_: pytest.fail("it made ranks of its own"))
    coordinator(devices=2).train(Toy(), loader())
    assert fits.env is None, "the environment says which rank this is"


def test_only_a_training_without_another_limit_has_one_epoch(fits: Fits) -> None:
    limits: list[dict[str, Any]] = [
        {},
        {"max_steps": 5},
        {"max_time": "00:01:00:00"},
        {"max_steps": 5, "max_epochs": 3},
        {"max_steps": -1},
    ]
    for given in limits:
        coordinator().train(Toy(), loader(), **given)
    assert [config.trainer.max_epochs for config in fits.configs] == [1, None, None, 3, 1]


# A value of each key that is not the default.
_VALUES: dict[str, Any] = {
    "runs_dir": "elsewhere", "accelerator": "cpu", "resume": "auto", "precision": "32-true", "strategy": "ddp",
    "devices": 1, "num_nodes": 2, "wandb": {"mode": "offline", "tags": ["a"]}, "name": "mine",
    "on_precision_change": "error", "seed": 3, "use_amp": False, "global_batch_size": 8,
    "deepspeed_config": {"zero_allow_untested_optimizer": True}, "precision_fallback": True, "memory_share": 0.5,
    "on_oom": "next", "ddp": {"bucket_cap_mb": 5}, "fsdp": {"wrap": ["Block"], "compile": True},
    "keep_last_step": False, "activation_checkpointing": True, "static_graph": True, "resume_trust": True,
    "agreement_timeout": 9.0,
    "process_group_timeout": 60.0, "checkpoint": {"every_n_steps": 5, "save_top_k": 2}, "watch": {"floor_steps": 7},
    "trainer": {"gradient_clip_val": 0.5, "max_epochs": 3, "log_every_n_steps": 2},
}  # fmt: skip
_OF_TRAIN = {"name", "seed", "use_amp", "resume_from_checkpoint"}


@pytest.mark.parametrize("key", [entry.name for entry in dataclasses.fields(RunConfig)])
def test_each_key_of_the_config_is_an_argument_or_the_error_states_what_to_do(
    key: str, fits: Fits, monkeypatch: pytest.MonkeyPatch
) -> None:
    if key in NO_ARGUMENT:
        calls = [lambda: coordinator(**{key: {}}), lambda: coordinator().train(Toy(), loader(), **{key: {}})]
        for call in calls[: 1 if key == "model" else 2]:
            with pytest.raises(ConfigError) as caught:
                call()
            assert caught.value.problems == (Problem(key, NO_ARGUMENT[key]),)
        return
    monkeypatch.setattr(RankStatusWriter, "has_agent", True)
    value = _VALUES[key]
    if key == "trainer":
        coordinator().train(Toy(), loader(), **value)
    else:
        name = ARGUMENT_NAMES.get(key, key)
        given = {name: False if name == "use_gpu" else value}
        of_train = name in _OF_TRAIN
        TrainingCoordinator(**({} if of_train else given)).train(Toy(), loader(), **(given if of_train else {}))
    found = fits.configs[0].to_dict()[key]
    assert (({name: found[name] for name in value}) if isinstance(value, dict) and key != "ddp" else found) == value


def test_settings_may_be_records_too(fits: Fits) -> None:
    coordinator(checkpoint=CheckpointOptions(save_top_k=3), watch=WatchOptions(floor_steps=2)).train(Toy(), loader())
    assert (fits.configs[0].checkpoint.save_top_k, fits.configs[0].watch.floor_steps) == (3, 2)


def test_wrong_names_of_arguments_are_reported_in_the_terms_of_python() -> None:
    with pytest.raises(ConfigError) as caught:
        coordinator(global_batchsize=8, name="x", max_epochs=3, runs_dir="r", resume="auto")
    assert str(caught.value).splitlines() == [
        "the call has 5 problems:",
        "  global_batchsize: unknown key; did you mean global_batch_size?",
        "  name: give it to train, as name",
        "  max_epochs: give it to train, as max_epochs",
        "  runs_dir: give output_dir to TrainingCoordinator",
        "  resume: give it as resume_from_checkpoint",
    ]
    with pytest.raises(ConfigError, match=r"checkpoint\.every_step: unknown key; did you mean checkpoint\.every_n"):
        coordinator(checkpoint={"every_step": 3})
    with pytest.raises(ConfigError, match="watch: given 3; expected WatchOptions"):
        coordinator(watch=3)


@pytest.mark.parametrize(
    ("kind", "name"), [(DDPStrategy, "ddp"), (FSDPStrategy, "fsdp2"), (ModelParallelStrategy, "fsdp2")]
)
def test_an_object_of_lightnings_strategies_is_replaced_by_a_name(kind: type[Any], name: str) -> None:
    with pytest.raises(ConfigError, match=f"given a {kind.__name__}, which the launcher .*; give its name.*'{name}'"):
        coordinator(strategy=kind())


@pytest.mark.parametrize(
    ("given", "meant"), [("fsdp", "fsdp2"), ("full_shard", "fsdp2"), ("zero3", "deepspeed_stage_3")]
)
def test_a_name_of_another_tool_is_replaced_by_the_launchers(given: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=rf"strategy: given '{given}'; .*did you mean {meant}\?"):
        coordinator(strategy=given)


def test_a_restart_that_nothing_would_make_is_an_error(fits: Fits) -> None:
    with pytest.raises(ConfigError, match="on_oom: given 'next', but no agent restarts this script"):
        coordinator(on_oom="next").train(Toy(), loader())


def test_what_torch_compile_made_of_a_module_is_trained_and_given_back(fits: Fits) -> None:
    model = Toy()
    compiled = torch.compile(model, backend="eager")
    found = coordinator().train(compiled, loader())
    assert fits.given[0].model is model
    assert found["model"] is compiled
    with pytest.raises(ConfigError, match="expected a LightningModule"):
        coordinator().train(torch.compile(model.net, backend="eager"), loader())


def test_a_script_with_several_devices_starts_its_ranks(fits: Fits, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []
    monkeypatch.setattr(script_end, "end_script_ranks", lambda: ended.append("ended"))
    coordinator(devices=3).train(Toy(), loader())
    assert (fits.env, ended) == ({"RANK": "0", "COUNT": "3"}, [])


@pytest.mark.parametrize(
    ("error", "ends"),
    [(ValueError("x"), True), (KeyboardInterrupt(), True), (SystemExit(3), True), (UsageError("all refused"), False),
     (Interrupted(15, checkpoint=None, step=3), False)],
)  # fmt: skip
def test_what_one_rank_alone_may_raise_ends_the_others_and_what_all_raise_leaves_them_for_the_next(
    error: BaseException, ends: bool, fits: Fits, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> FitResult:
        raise error

    ended: list[str] = []
    monkeypatch.setattr(script_end, "end_script_ranks", lambda *_: ended.append("ended"))
    monkeypatch.setattr(module, "fit", fails)
    with pytest.raises(type(error)):
        coordinator(devices=2).train(Toy(), loader())
    assert ended == (["ended"] if ends else [])


def test_making_a_coordinator_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ), set(sys.modules)
    TrainingCoordinator()
    assert list(tmp_path.iterdir()) == []
    assert (dict(os.environ), set(sys.modules)) == before


class PrunedError(Exception):
    """As another library's exception: takes more than a message."""

    def __init__(self, trial: int, reason: str) -> None:
        super().__init__(f"trial {trial}: {reason}")
        self.trial = trial


@pytest.mark.parametrize(
    "raised", [ValueError("wrong"), KeyError("missing"), FileNotFoundError(2, "gone", "x.csv"), PrunedError(3, "slow"),
               StopIteration(4), UnicodeDecodeError("utf-8", b"x", 0, 1, "bad")],
    ids=lambda e: type(e).__name__,
)  # fmt: skip
def test_what_the_users_code_raised_is_caught_as_under_lightning(
    fits: Fits, monkeypatch: pytest.MonkeyPatch, raised: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> FitResult:
        raise TrainingError("rank 3 (node0): it failed", rank=3) from raised

    monkeypatch.setattr(module, "fit", fail)
    with pytest.raises(type(raised)) as caught:
        coordinator().train(Toy(), loader())
    error: Any = caught.value
    assert isinstance(error, TrainingError)
    assert (str(error), error.args, error.__cause__) == (str(raised), raised.args, raised)
    for name in ("trial", "errno", "filename", "encoding", "reason", "value"):
        assert getattr(error, name, None) == getattr(raised, name, None)
    assert (error.rank, error.__notes__) == (3, ["rank 3 (node0): it failed"])
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 -- ours
    assert (type(again), str(again)) == (TrainingError, "rank 3 (node0): it failed")


def test_an_error_of_the_launcher_has_no_second_class(fits: Fits, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> FitResult:
        raise TrainingError("rank 1 ended first")

    monkeypatch.setattr(module, "fit", fail)
    with pytest.raises(TrainingError) as caught:
        coordinator().train(Toy(), loader())
    assert type(caught.value) is TrainingError


def test_logger_true_selects_lightnings_default_logger_and_none_the_launchers(fits: Fits) -> None:
    for given in (True, None, False):
        coordinator().train(Toy(), loader(), logger=given)
    assert [config.trainer.logger for config in fits.configs] == [True, None, []]
