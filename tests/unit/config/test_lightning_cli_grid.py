# ruff: noqa: ISC004 -- a YAML text in two lines is one text
"""The same files and arguments give the same objects through LightningCLI and through the launcher."""

from __future__ import annotations

import enum
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from torch import nn

from launcher.config.loading import load_config
from launcher.config.schema import RunConfig, TrainerOptions
from launcher.user_code.classes import (
    import_classes,
    make_callbacks,
    make_ddp_options,
    make_loggers,
    make_objects,
    make_profiler,
)
from strategies.base import BuildOptions, RankLocation
from strategies.build import build_strategy
from strategies.choice import choose_strategy

_ZOO = "tests.support.cli_zoo"
_NET = f"model: {{class_path: {_ZOO}.Net}}\ndata: {{class_path: {_ZOO}.Data}}\n"
_PLAIN = f"model: {{class_path: {_ZOO}.Plain}}\ndata: {{class_path: {_ZOO}.Data}}\n"
_HERE = "trainer: {accelerator: cpu, devices: 1, logger: false}\n"
_STOPPING = "{class_path: EarlyStopping, init_args: {monitor: loss}}"
_HOOKS = "torch.distributed.algorithms.ddp_comm_hooks.default_hooks"


def _of_net(arguments: str) -> str:
    return f"model: {{class_path: {_ZOO}.Net, init_args: {{{arguments}}}}}\ndata: {{class_path: {_ZOO}.Data}}\n"


# Files, each beside the model's, and command line arguments.
CASES: dict[str, tuple[list[str], list[str]]] = {
    "defaults": ([_NET], []),
    "numbers": ([_of_net('width: 16, lr: 1e-3, name: "x", flag: true, sizes: [1, 2], pair: [2, 1]')], []),
    "quoted numbers": ([_of_net('width: "16", lr: "1e-3", flag: "true", sizes: ["1", "2"], weights: {a: "0.5"}')], []),
    "mode, kind and path": ([_of_net("mode: SLOW, kind: b, path: a/b")], []),
    "a dataclass": ([_of_net("shape: {width: 3, depth: 4}")], []),
    "a date is text": ([_of_net("name: 2024-01-02")], []),
    "no interpolation": ([_of_net('name: "${oc.env:HOME}"')], []),
    "untyped": ([_of_net("untyped: {a: [1, x]}")], []),
    "a nested class": ([_of_net(f"encoder: {{class_path: {_ZOO}.ZooEncoder, init_args: {{width: 3}}}}")], []),
    "a nested class by its path alone": ([_of_net(f"encoder: {_ZOO}.ZooEncoder")], []),
    "a nested class by a short name": ([_of_net("encoder: {class_path: DeepZooEncoder, init_args: {depth: 3}}")], []),
    "a nested class in a nested class": (
        [_of_net(f"encoder: {{class_path: {_ZOO}.ZooEncoder, init_args: {{act: torch.nn.GELU, inner: "
                 f"{{class_path: {_ZOO}.DeepZooEncoder, init_args: {{depth: 5, width: 2}}}}}}}}")], []),
    "a list of classes": (
        [_of_net("blocks: [{class_path: torch.nn.Linear, init_args: {in_features: 4, out_features: 2}}, "
                 "{class_path: torch.nn.ReLU}]")], []),
    "callables": ([_of_net("act: torch.nn.GELU, optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.5}}, "
                           "scheduler: {class_path: torch.optim.lr_scheduler.StepLR, init_args: {step_size: 3}}")], []),
    "argv": ([_NET], ["--model.init_args.lr=0.3", "--model.width=5", "--data.batch_size=2"]),
    "arguments for a nested class": (
        [_of_net(f"encoder: {{class_path: {_ZOO}.ZooEncoder, init_args: {{width: 3}}}}")],
        ["--model.init_args.encoder.init_args.width=9"]),
    "arguments for a nested class in short": (
        [_of_net(f"encoder: {{class_path: {_ZOO}.ZooEncoder, init_args: {{width: 3}}}}")], ["--model.encoder.width=9"]),
    "a nested class by arguments": ([_NET], [f"--model.encoder={_ZOO}.DeepZooEncoder", "--model.encoder.depth=7"]),
    "arguments for an optimizer": (
        [_of_net("optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.5}}")],
        ["--model.optimizer.lr=0.25", "--model.optimizer.momentum=0.5"]),
    "another optimizer": (
        [_of_net("optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.5, betas: [0.5, 0.6]}}")],
        ["--model.optimizer=torch.optim.SGD"]),
    "another nested class": (
        [_of_net(f"encoder: {{class_path: {_ZOO}.DeepZooEncoder, init_args: {{width: 3, depth: 4}}}}")],
        [f"--model.encoder={_ZOO}.ZooEncoder"]),
    "another model": ([_of_net("width: 3, lr: 0.5")], [f"--model={_ZOO}.Wide"]),
    "several files": ([_of_net("width: 3, lr: 0.5"), "model: {init_args: {lr: 0.25}}\ntrainer: {max_epochs: 3}",
                       "trainer: {max_epochs: 4, min_epochs: 2}"], []),
    "model by arguments": ([], [f"--model={_ZOO}.Net", "--model.lr=0.3", f"--data={_ZOO}.Data", "--data.batch_size=4"]),
    "flat arguments": (["model: {lr: 0.3, width: 2}\ndata: {batch_size: 4}\n"],
                       [f"--model={_ZOO}.Net", f"--data={_ZOO}.Data"]),
    "more arguments than the signature has": (
        [f"model: {{class_path: {_ZOO}.Net}}\ndata: {{class_path: {_ZOO}.Data, dict_kwargs: {{colour: red}}}}"], []),
    "another name for self": ([_PLAIN], []),
    "a list's items by arguments": ([_NET], ["--model.sizes+=3", "--model.init_args.sizes+=[4, 5]"]),
    "items for a list of a file": ([_of_net("sizes: [1]")], ["--model.sizes+=2"]),
    "items for a list of a file that is null": ([_of_net("sizes: null")], ["--model.init_args.sizes+=2"]),
    "items in files": ([_of_net("sizes+: [1]"), "model: {init_args: {sizes+: 2}}"], ["--model.sizes+=3"]),
    "a list after its items": ([_of_net("sizes+: [1]")], ["--model.sizes+=3", "--model.sizes=[7]", "--model.sizes+=8"]),
    "classes for a list": ([_of_net("blocks: [torch.nn.ReLU]")], ["--model.blocks+=torch.nn.GELU"]),
    "items for a nested class": ([_of_net(f"encoder: {{class_path: {_ZOO}.ZooEncoder}}")],
                                 ["--model.encoder.names+=x", "--model.encoder.names+=[y, z]"]),
    "items for a dataclass of a file": ([_of_net("shape: {marks: [v]}")], ["--model.shape.marks+=x"]),
    "items for a callback": ([_NET, f"trainer: {{callbacks: [{{class_path: {_ZOO}.Own}}]}}"],
                             ["--trainer.callbacks.names+=x", "--trainer.callbacks.init_args.names+=y"]),
    "an optimizer and a schedule": (
        [_PLAIN + "optimizer: {class_path: torch.optim.Adam, init_args: {lr: 0.1}}\n"
         "lr_scheduler: {class_path: torch.optim.lr_scheduler.StepLR, init_args: {step_size: 3}}"], []),
    "an optimizer by arguments": ([_PLAIN], ["--optimizer=Adam", "--optimizer.lr=0.25", "--lr_scheduler=ExponentialLR",
                                         "--lr_scheduler.gamma=0.5"]),
    "a plateau": ([_PLAIN], ["--optimizer=SGD", "--optimizer.lr=0.25", "--lr_scheduler=ReduceLROnPlateau",
                             "--lr_scheduler.monitor=loss"]),
    "an optimizer over the model's own": ([_NET], ["--optimizer=RMSprop", "--optimizer.alpha=0.5"]),
    "a callback": ([_NET, f"trainer: {{callbacks: {_STOPPING}}}"], []),
    "callbacks": ([_NET, f"trainer: {{callbacks: [{_STOPPING}, LearningRateMonitor, {{class_path: {_ZOO}.Own, "
                         f"init_args: {{every: 3, part: {{class_path: {_ZOO}.ZooEncoder}}}}}}]}}"], []),
    "a callback's other arguments": (
        [_NET, "trainer: {callbacks: [{class_path: lightning.pytorch.callbacks.EarlyStopping, "
               "dict_kwargs: {monitor: loss, patience: 7}}]}"], []),
    "a callback by arguments": ([_NET], ["--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=loss",
                                     "--trainer.callbacks.patience=9"]),
    "callbacks added by arguments": (
        [_NET, f"trainer: {{callbacks: [{_STOPPING}]}}"],
        ["--trainer.callbacks+=LearningRateMonitor", "--trainer.callbacks.logging_interval=epoch",
         "--trainer.callbacks+=RichModelSummary", "--trainer.callbacks.max_depth=2"]),
    "the last callback by arguments": ([_NET, f"trainer: {{callbacks: [LearningRateMonitor, {_STOPPING}]}}"],
                                   ["--trainer.callbacks.patience=4"]),
    "no callbacks": ([_NET, "trainer: {callbacks: null, plugins: null, profiler: null, model_registry: null}"], []),
    "a logger": ([_NET, "trainer: {logger: {class_path: CSVLogger, init_args: {save_dir: csv, name: x}}}"], []),
    "loggers": ([_NET, "trainer: {logger: [{class_path: lightning.pytorch.loggers.CSVLogger, "
                       "init_args: {save_dir: csv}}, {class_path: CSVLogger, init_args: {save_dir: other}}]}"], []),
    "a logger by arguments": ([_NET], ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=csv"]),
    "a profiler": ([_NET, "trainer: {profiler: {class_path: SimpleProfiler, init_args: {extended: false}}}"], []),
    "a profiler's path": ([_NET, "trainer: {profiler: {class_path: lightning.pytorch.profilers.AdvancedProfiler}}"],
                          []),
    "a profiler's name": ([_NET, "trainer: {profiler: simple}"], []),
    "limits": ([_NET, "trainer: {max_steps: 5, limit_train_batches: 0.5, limit_val_batches: 2, overfit_batches: 0.0, "
                      "val_check_interval: 0.25, num_sanity_val_steps: 0}"], []),
    "quoted limits": ([_NET, 'trainer: {max_steps: "5", limit_train_batches: "0.5", gradient_clip_val: "0.5", '
                             'deterministic: "true", benchmark: "false", accumulate_grad_batches: "2"}'], []),
    "a time": ([_NET, 'trainer: {max_time: "00:01:00:00"}'], []),
    "a time without quotes": ([_NET, "trainer: {max_time: 00:01:00:00}"], []),
    "a time in parts": ([_NET, "trainer: {max_time: {days: 1, hours: 2}}"], []),
    "fast_dev_run": ([_NET, "trainer: {fast_dev_run: true}"], []),
    "barebones": ([_NET, "trainer: {barebones: true, fast_dev_run: false}"], []),
    "devices as text": ([_NET, 'trainer: {devices: "1", num_nodes: "1"}'], []),
    "a strategy's name": ([_NET, "trainer: {strategy: ddp}"], []),
    "a strategy that looks for unused parameters": ([_NET, "trainer: {strategy: ddp_find_unused_parameters_true}"], []),
    "a strategy's class": (
        [_NET, "trainer: {strategy: {class_path: lightning.pytorch.strategies.DDPStrategy, init_args: "
               "{find_unused_parameters: true, bucket_cap_mb: 3, gradient_as_bucket_view: false}}}"], []),
    "a static graph": ([_NET, "trainer: {strategy: {class_path: DDPStrategy, init_args: {static_graph: true}}}"], []),
    "a strategy's hook": (
        [_NET, f"trainer: {{strategy: {{class_path: DDPStrategy, init_args: {{ddp_comm_hook: {_HOOKS}."
               f"fp16_compress_hook, ddp_comm_wrapper: {_HOOKS}.bf16_compress_wrapper}}}}}}"], []),
    "a strategy's arguments by arguments": (
        [_NET, "trainer: {strategy: {class_path: DDPStrategy, init_args: {bucket_cap_mb: 3}}}"],
        ["--trainer.strategy.init_args.bucket_cap_mb=5", "--trainer.strategy.init_args.find_unused_parameters=true"]),
    "a single device": ([_NET, "trainer: {strategy: {class_path: SingleDeviceStrategy, init_args: {device: cpu}}}"],
                        []),
    "a seed": ([_NET + "seed_everything: 5"], []),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)


def _by_lightning(files: list[str], argv: list[str]) -> LightningCLI:
    """What LightningCLI creates from them; it receives the class as an argument, as its own scripts do."""
    given = [word for file in files for word in ("--config", file)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LightningCLI(pl.LightningModule, pl.LightningDataModule, subclass_mode_model=True,
                            subclass_mode_data=True, run=False, save_config_callback=None,
                            parser_kwargs={"exit_on_error": False}, args=[*given, *argv])  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_launcher_and_lightning_cli_create_the_same_objects(case: str, tmp_path: Path) -> None:
    texts, argv = CASES[case]
    # Class arguments come first: LightningCLI must know the class of a file's arguments.
    first = [word for word in argv if word.startswith(("--model=", "--data="))] if "flat" in case else []
    files = []
    for number, text in enumerate([_HERE, *texts]):
        (tmp_path / f"{number}.yaml").write_text(text)
        files.append(f"{number}.yaml")
    theirs = _by_lightning_first(first, files, [word for word in argv if word not in first])
    config = load_config(files, argv)
    again = load_config([_written(config, tmp_path)])
    assert again == config
    classes = import_classes(config)
    model, data = make_objects(config, classes, None)

    assert _picture(model) == _picture(theirs.model)
    assert _picture(data) == _picture(theirs.datamodule)
    for ours, cli in ((model.hparams, theirs.model.hparams), (data.hparams, theirs.datamodule.hparams)):
        if "_class_path" in ours:
            assert dict(ours) == dict(cli)
        else:
            # LightningCLI saves the arguments of the class that was named, a script those of its bases, too.
            settings = {name: value for name, value in cli.items() if name not in ("_class_path", "_instantiator")}
            assert {**ours, **settings} == dict(ours)
    assert _optimizers(model) == _optimizers(theirs.model)
    settings = theirs.config.trainer
    callbacks = settings.callbacks if isinstance(settings.callbacks, list) else [settings.callbacks or ()]
    callbacks = [each for each in callbacks if each]
    assert len(make_callbacks(config)) == len(callbacks)
    assert [_picture(each) for each in make_callbacks(config)] == [
        _picture(each) for each in theirs.trainer.callbacks[: len(callbacks)]
    ]
    if isinstance(settings.logger, list) or settings.logger not in (True, False, None):
        assert [_picture(each) for each in make_loggers(config)] == [_picture(each) for each in theirs.trainer.loggers]
    if settings.profiler is None:
        assert make_profiler(config) is None
    else:
        assert _profiler(make_profiler(config)) is type(theirs.trainer.profiler)
    _compare_settings(config, settings)
    if settings.strategy != "auto":
        _compare_strategy(config, theirs.trainer.strategy)
    if "seed" in case:
        assert config.seed == theirs.config.seed_everything


def _by_lightning_first(first: list[str], files: list[str], argv: list[str]) -> LightningCLI:
    given = [word for file in files for word in ("--config", file)]
    return _by_lightning([], [*first, *given, *argv])


def _written(config: RunConfig, folder: Path) -> Path:
    file = folder / "written.yaml"
    file.write_text(config.to_yaml())
    return file


def _compare_settings(config: RunConfig, settings: Any) -> None:
    """Every Trainer argument that is a plain value."""
    for name in vars(TrainerOptions()):
        if name not in ("callbacks", "logger", "plugins", "profiler"):
            assert getattr(config.trainer, name) == settings.get(name), name
    assert (config.devices, config.accelerator) == (1, "cpu")


def _compare_strategy(config: RunConfig, theirs: Any) -> None:
    choice = choose_strategy(config.strategy, world_size=1, device_kind="cpu", accumulate=1,
                             model_has_static_graph=config.static_graph is True)  # fmt: skip
    ours = build_strategy(
        choice, BuildOptions("cpu", RankLocation(0, 1, 0, 1, 0, "", 0), 60.0, ddp=make_ddp_options(config))
    )
    assert isinstance(ours, type(theirs))
    for name in ("_ddp_comm_state", "_ddp_comm_hook", "_ddp_comm_wrapper", "_model_averaging_period"):
        assert getattr(ours, name, None) == getattr(theirs, name, None)
    ours, theirs = vars(ours).get("_ddp_kwargs", {}), vars(theirs).get("_ddp_kwargs", {})
    for name in ("find_unused_parameters", "static_graph", "bucket_cap_mb", "broadcast_buffers", *(config.ddp or {})):
        assert (ours.get(name) or None) == (theirs.get(name) or None), name


def _profiler(given: Any) -> Any:
    """A name's class is Lightning's to find."""
    return type(pl.Trainer(profiler=given, logger=False, accelerator="cpu").profiler)


def _optimizers(model: pl.LightningModule) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _picture(model.configure_optimizers())


def _picture(value: Any, depth: int = 0) -> Any:
    """Everything plain in an object, by its attributes."""
    if isinstance(value, list | tuple | set):
        return [_picture(each, depth + 1) for each in value]
    if isinstance(value, Mapping):
        return {key: _picture(each, depth + 1) for key, each in value.items() if key not in ("_hparams", "_trainer")}
    if isinstance(value, type | enum.Enum | Path) or not hasattr(value, "__dict__"):
        return value
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    if isinstance(value, torch.optim.Optimizer):
        return type(value), {k: v for k, v in value.param_groups[0].items() if k != "params"}
    if isinstance(value, torch.optim.lr_scheduler.LRScheduler):
        return type(value), {k: _picture(v, depth + 1) for k, v in value.state_dict().items()}
    if callable(value) and not isinstance(value, nn.Module):
        return "callable"
    if depth > 6:
        return type(value)
    skipped = ("_hparams", "_hparams_initial", "_hparams_name", "_log_hyperparams", "configure_optimizers", "MADE")
    return type(value), {k: _picture(v, depth + 1) for k, v in vars(value).items() if k not in skipped}
