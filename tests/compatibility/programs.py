"""The programs: each a module, data, Trainer settings, callbacks and loggers that users combine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

_HERE = "tests.compatibility"
_CALLBACKS = "lightning.pytorch.callbacks"
_LOGGERS = "lightning.pytorch.loggers"


@dataclass(frozen=True)
class Program:
    """One user program.

    Attributes:
        name: name of the test and of the table row.
        model: class of `modules` or `nets`, and its arguments.
        data: class of `data`, and its arguments; None without a data module.
        trainer: Lightning's arguments.
        same: `exact`: batches, weights, rates, metrics and hooks; `order`: the same samples in each epoch in another
            order, so no weights; `metrics`: draws random numbers, so only steps, hooks and names; `fails`: both fail.
        ranks: numbers of ranks to run it on.
        by_agent: the launcher's agent starts several ranks, which takes a second; else torchrun's variables do.
    """

    name: str
    model: tuple[str, Mapping[str, Any]]
    data: tuple[str, Mapping[str, Any]] | None
    trainer: Mapping[str, Any]
    same: Literal["exact", "order", "metrics", "fails"] = "exact"
    ranks: Sequence[int] = (1, 2)
    by_agent: bool = False

    def settings(self) -> dict[str, Any]:
        """As a LightningCLI config."""
        trainer = {"max_epochs": 2, "log_every_n_steps": 1, **self.trainer}
        own = [*trainer.get("callbacks", []), {"class_path": f"{_HERE}.record.Record"}]
        values: dict[str, Any] = {"model": _spec(self.model), "trainer": {**trainer, "callbacks": own}}
        if self.data is not None:
            values["data"] = _spec(self.data)
        return values


def _spec(named: tuple[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {"class_path": f"{_HERE}.{named[0]}", "init_args": dict(named[1])}


def _callback(name: str, /, **arguments: Any) -> dict[str, Any]:
    path = name if name.startswith("tests.") else f"{_CALLBACKS}.{name}"
    return {"class_path": path, "init_args": arguments}


def _program(
    name: str, model: str = "modules.Plain", data: str | None = "data.Table", *callbacks: Any,
    m: Mapping[str, Any] | None = None, d: Mapping[str, Any] | None = None, same: Any = "exact",
    ranks: Sequence[int] = (1, 2), by_agent: bool = False, **trainer: Any,
) -> Program:  # fmt: skip
    if callbacks:
        trainer["callbacks"] = list(callbacks)
    return Program(name, (model, m or {}), None if data is None else (data, d or {}), trainer, same, ranks,
                   by_agent)  # fmt: skip


_CSV = {"class_path": f"{_LOGGERS}.CSVLogger", "init_args": {"save_dir": "csv", "flush_logs_every_n_steps": 1}}
_BOARD = {"class_path": f"{_LOGGERS}.TensorBoardLogger", "init_args": {"save_dir": "board"}}

PROGRAMS: tuple[Program, ...] = (
    # Modules: how they optimize, schedule and log.
    _program("plain", by_agent=True),
    _program("adam-with-groups", "modules.Adam"),
    _program("one-cycle", "modules.OneCycle"),
    _program("one-cycle-of-max-steps", "modules.OneCycle", max_steps=11, max_epochs=-1),
    _program("plateau", "modules.Plateau", max_epochs=3),
    _program("two-schedules", "modules.TwoSchedules"),
    _program("own-schedule-step", "modules.OwnScheduleStep"),
    _program("gan", "modules.Gan", "data.NoValidation", ranks=(1,)),
    _program("gan-without-toggle", "modules.Gan", "data.NoValidation", m={"toggle": False}, ranks=(1,)),
    _program("manual-accumulation", "modules.ManualAccumulation"),
    _program("lbfgs", "modules.Lbfgs"),
    _program("own-optimizer-hooks", "modules.OwnSteps"),
    _program("skips-batches", "modules.Skips", ranks=(1,)),
    _program("dict-output", "modules.DictOutput"),
    _program("logs", "modules.Logs"),
    _program("configure-callbacks", "modules.Monitored", logger=[_CSV]),
    _program("uses-the-trainer", "modules.UsesTrainer", max_epochs=4, logger=[_CSV], by_agent=True),
    _program("dataloader-iter", "modules.ByIterator", "data.NoValidation"),
    _program("batch-alone", "modules.OnlyBatch"),
    _program("fails", "modules.Fails", same="fails", by_agent=True),
    _program("stops-itself", "modules.StopsItself", max_epochs=4),
    _program("skips-an-epoch", "modules.SkipsEpoch"),
    # Modules: their layers and inputs.
    _program("batch-norm", "nets.BatchNorm"),
    _program("batch-norm-in-step", "nets.BatchNorm", sync_batchnorm=True, ranks=(1,)),
    _program("convolution", "nets.Conv"),
    _program("attention", "nets.Attention"),
    _program("dropout", "nets.Dropout", same="metrics"),
    _program("torchmetrics", "nets.Classifier"),
    _program("two-validation-loaders", "nets.TwoLoaders", "data.TwoValidations"),
    _program("lstm-with-tied-embeddings", "nets.TiedLstm", "data.Text"),
    _program("sparse-embedding", "nets.SparseEmbedding", "data.Text", ranks=(1,)),
    _program("frozen", "nets.Frozen"),
    _program("made-in-setup", "nets.MadeInSetup", by_agent=True),
    _program("configure-model", "nets.Configured"),
    _program("lazy", "nets.Lazy"),
    _program("ema", "nets.Ema"),
    _program("activation-checkpointing", "nets.Checkpointed"),
    _program("weight-norm", "nets.WeightNorm"),
    _program("extra-state", "nets.ExtraState"),
    _program("drops-frozen", "nets.DropsFrozen"),
    _program("own-loaders", "nets.OwnData", None),
    _program("odd-self", "nets.Odd"),
    _program("unused-parameters", "nets.Unused", ranks=(1,)),
    # Data.
    _program("shuffled", d={"shuffle": True}, same="order"),
    _program("workers", d={"workers": 2}, by_agent=True),
    _program("drop-last", d={"drop_last": True, "size": 30}),
    _program("uneven", d={"size": 30}),
    _program("random-split", data="data.Split"),
    _program("subset", data="data.Half"),
    _program("weighted-sampler", data="data.Weighted", ranks=(1,), same="metrics"),
    _program("own-batches", data="data.OwnBatches", ranks=(1,)),
    _program("own-batch-sampler", data="data.OwnBatchSampler"),
    _program("text", "nets.TiedLstm", "data.Text", d={"workers": 2}),
    _program("dataclass-batch", "nets.OfPairs", "data.Pairs"),
    _program("iterable", data="data.Streamed"),
    _program("iterable-with-length", data="data.Streamed", d={"sized": True}, ranks=(1,)),
    _program("combined-min-size", "nets.Several", "data.Combined"),
    _program("combined-max-size-cycle", "nets.Several", "data.Combined", d={"mode": "max_size_cycle"}),
    _program("combined-max-size", "nets.Several", "data.Combined", d={"mode": "max_size"}),
    _program("list-of-loaders", "nets.Several", "data.Combined", d={"mode": "none", "kind": "list"}),
    _program("combined-sequential", "nets.Several", "data.Combined", d={"mode": "sequential"}, same="fails"),
    _program("batches-of-the-data-set", data="data.WholeBatches", ranks=(1,)),
    _program("own-loader-class", data="data.OwnLoader"),
    _program("transfer-hooks", data="data.Moved"),
    _program("reloaded", data="data.Growing", reload_dataloaders_every_n_epochs=1, max_epochs=3),
    _program("data-with-state", data="data.Stateful"),
    _program("sampler-by-hand", data="data.Shuffled", same="order"),
    _program("own-sharding", data="data.Table", use_distributed_sampler=False),
    # Trainer settings.
    _program("max-steps", max_steps=5, max_epochs=-1),
    _program("limited", limit_train_batches=3, limit_val_batches=1),
    _program("limited-share", limit_train_batches=0.5, limit_val_batches=0.5),
    _program("accumulated", accumulate_grad_batches=3),
    _program("clipped-by-norm", gradient_clip_val=0.1),
    _program("clipped-by-value", gradient_clip_val=0.01, gradient_clip_algorithm="value"),
    _program("validated-often", val_check_interval=2),
    _program("validated-by-share", val_check_interval=0.5),
    _program("validated-rarely", check_val_every_n_epoch=2, max_epochs=3),
    _program("validated-by-steps", val_check_interval=3, check_val_every_n_epoch=None),
    _program("no-validation", limit_val_batches=0),
    _program("no-sanity-check", num_sanity_val_steps=0),
    _program("overfit", overfit_batches=2),
    _program("bf16", precision="bf16-mixed"),
    _program("double", precision="64-true"),
    _program("fast-dev-run", fast_dev_run=True),
    _program("min-epochs", "modules.StopsItself", min_epochs=2, max_epochs=4),
    _program("max-time", max_time="00:01:00:00"),
    _program("anomaly-and-grad-in-validation", detect_anomaly=True, inference_mode=False, deterministic=True),
    _program("profiled", profiler="simple"),
    _program("no-checkpoints", enable_checkpointing=False),
    _program("barebones", barebones=True, log_every_n_steps=0, same="metrics", ranks=(1,)),
    # Callbacks.
    _program("early-stopping", "modules.Plain", "data.Table",
             _callback("EarlyStopping", monitor="val_loss", patience=1, min_delta=100.0), max_epochs=6),
    _program("early-stopping-in-training", "modules.Plain", "data.Table",
             _callback("EarlyStopping", monitor="train_loss", stopping_threshold=1e9, check_on_train_epoch_end=True)),
    _program("own-checkpoints", "modules.Plain", "data.Table",
             _callback("ModelCheckpoint", dirpath="kept", monitor="val_loss", save_top_k=2, save_last=True,
                       filename="{epoch}-{val_loss:.2f}"), max_epochs=3),
    _program("two-own-checkpoints", "modules.Plain", "data.Table",
             _callback("ModelCheckpoint", dirpath="kept", every_n_train_steps=3, save_top_k=-1),
             _callback("ModelCheckpoint", dirpath="also", save_on_train_epoch_end=True, save_weights_only=True)),
    _program("learning-rate-monitor", "modules.OneCycle", "data.Table",
             _callback("LearningRateMonitor", logging_interval="step", log_momentum=True), logger=[_CSV]),
    _program("device-stats", "modules.Plain", "data.Table", _callback("DeviceStatsMonitor", cpu_stats=True),
             logger=[_CSV]),
    _program("accumulation-scheduler", "modules.Plain", "data.Table",
             _callback("GradientAccumulationScheduler", scheduling={0: 1, 1: 2, 2: 4}), max_epochs=3),
    _program("weight-averaging", "modules.Plain", "data.Table",
             _callback("StochasticWeightAveraging", swa_lrs=0.01, swa_epoch_start=1), max_epochs=3),
    _program("finetuning", "nets.Unfreezing", "data.Table",
             _callback("BackboneFinetuning", unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.01), max_epochs=3,
             ranks=(1,)),
    _program("progress-bars", "modules.Logs", "data.Table", _callback("TQDMProgressBar", refresh_rate=5)),
    _program("rich-bar-and-summary", "modules.Logs", "data.Table", _callback("RichProgressBar"),
             _callback("RichModelSummary", max_depth=2)),
    _program("throughput", "modules.Plain", "data.Table", _callback("tests.compatibility.callbacks.Counter"),
             _callback("tests.compatibility.callbacks.Changing")),
    _program("pruning", "modules.Plain", "data.Table",
             _callback("ModelPruning", pruning_fn="l1_unstructured", amount=0.2), ranks=(1,)),
    _program("exception-checkpoint", "modules.Plain", "data.Table", _callback("OnExceptionCheckpoint", dirpath="kept")),
    # Loggers.
    _program("csv", "modules.Logs", logger=[_CSV]),
    _program("tensorboard", "modules.Logs", logger=[_BOARD]),
    _program("two-loggers", "modules.UsesTrainer", logger=[_CSV, _BOARD], by_agent=True),
)  # fmt: skip
