"""Saves and restores the values logged in an epoch, so that a mean covers all its batches after a resume too."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata, _ResultMetric, _Sync
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, equal, nn
from torchmetrics import Metric, SumMetric
from torchmetrics.wrappers import MetricTracker
from typing_extensions import override

from launcher.training.resume.random_states import gather_states

KEY = "launcher_epoch_metrics"
_META = ("fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "enable_graph", "add_dataloader_idx",
         "dataloader_idx", "metric_attribute")  # fmt: skip


class EpochMetrics(pl.Callback):
    """Saves and restores the values accumulated by `self.log(..., on_epoch=True)` and the module's torchmetrics.

    Lightning resets them, so a metric of a resumed epoch would cover its last batches only. If the Trainer ended an
    epoch early, the values and the state of EarlyStopping from before that end are saved. A metric that Lightning does
    not reset, such as the best of all epochs, is also restored at the start of an epoch.
    """

    def __init__(self, notice: Callable[[str], None]) -> None:
        self._notice = notice
        self._saved: Sequence[Mapping[str, Any]] = ()
        self._ended: dict[str, Any] | None = None
        self._made: dict[str, dict[str, Any]] = {}
        self._stopping: dict[str, dict[str, Any]] = {}

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._made = plain_attributes(pl_module)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._ended, self._stopping = None, {}

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning resets them after this, but a resume continues an epoch that the Trainer ended early.
        self._ended = self._capture(trainer, pl_module)
        progress = trainer.fit_loop.epoch_loop.batch_progress
        if not (progress.is_last_batch or progress.current.ready == trainer.num_training_batches):
            # EarlyStopping checks here, and again when the resumed epoch ends.
            self._stopping = {stopping.state_key: copy.deepcopy(stopping.state_dict())
                              for stopping in trainer.early_stopping_callbacks}  # fmt: skip

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[KEY] = gather_states(self.own_state(trainer, pl_module), trainer.strategy.root_device)
        checkpoint.get("callbacks", {}).update(self._stopping)

    @property
    def made(self) -> dict[str, dict[str, Any]]:
        """The plain attributes of the module's metrics before the training, by name; empty without metrics."""
        return self._made

    @property
    def has_ended(self) -> bool:
        """Whether the values are those of an epoch that has ended, which Lightning resets."""
        return self._ended is not None

    def own_state(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
        """The values of this rank, as a checkpoint has them for each rank."""
        own = self._ended or self._capture(trainer, module)
        # For a resume at an epoch's start; None means the same values as in an epoch's middle.
        kept = None
        if self._ended is not None:
            reset = _logged_in_validation(trainer) | _names(trainer.fit_loop.epoch_loop._results)
            kept = capture_metrics(module, self._made, reset)
        return {**own, "kept": kept}

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._saved = checkpoint.get(KEY, ())

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        saved, self._saved = self._saved, ()
        in_epoch = getattr(trainer.fit_loop, "position", None) is not None
        if not any(in_epoch or _kept(each) for each in saved if each is not None):
            return
        if len(saved) != trainer.world_size:
            what = "resumed epoch cover its remaining batches only" if in_epoch else "module are reset"
            self._notice(f"the metrics of the {what}: the checkpoint has {len(saved)} ranks and this run has "
                         f"{trainer.world_size}")  # fmt: skip
            return
        if saved[trainer.global_rank] is None:
            self._notice(f"the metrics of rank {trainer.global_rank} were lost with its node: those of the resumed "
                         "epoch cover its remaining batches only")  # fmt: skip
            return
        values = apply_to_collection(saved[trainer.global_rank], Tensor, torch.Tensor.to, trainer.strategy.root_device)
        restore_metrics(pl_module, values["own"] if in_epoch else _kept(values))
        if not in_epoch:
            return
        modules = dict(pl_module.named_modules())
        for key, state in values["logged"].items():
            restored = _restore_logged(state, trainer, modules)
            if restored is not None:
                trainer.fit_loop.epoch_loop._results[key] = restored
        # Otherwise the first batch resets them.
        trainer._logger_connector._first_loop_iter = False

    def _capture(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
        logged = {key: state_of_logged(metric) for key, metric in trainer.fit_loop.epoch_loop._results.items()
                  if metric.meta.on_epoch and not metric.has_reset}  # fmt: skip
        return {"logged": _copied(logged), "own": capture_metrics(module, self._made, _logged_in_validation(trainer))}


def _kept(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The module's metrics for an epoch's start; empty in a checkpoint of an earlier version."""
    kept = state.get("kept", {})
    return state["own"] if kept is None else kept


def _logged_in_validation(trainer: pl.Trainer) -> set[str]:
    """Metrics that Lightning resets after each validation; a checkpoint may be saved before that."""
    return _names(trainer.fit_loop.epoch_loop.val_loop._results)


def _names(results: Mapping[str, _ResultMetric]) -> set[str]:
    return {metric.meta.metric_attribute for metric in results.values() if metric.meta.metric_attribute}


def state_of_logged(metric: _ResultMetric) -> dict[str, Any]:
    """A logged value of the epoch: its description, and `state` with its tensors; None for a torchmetrics metric."""
    meta = metric.meta
    return {
        "meta": {name: getattr(meta, name) for name in _META},
        "reduce_fx": meta.reduce_fx.__name__,
        "sync": meta.sync.should,
        "rank_zero_only": meta.sync.rank_zero_only,
        "state": dict(metric.metric_state) if metric.is_tensor else None,
    }


def _restore_logged(state: Mapping[str, Any], trainer: pl.Trainer, modules: Mapping[str, Any]) -> _ResultMetric | None:
    meta = _Metadata(**state["meta"], reduce_fx=state["reduce_fx"])
    meta.sync = _Sync(
        fn=trainer.strategy.reduce, _should=state["sync"], rank_zero_only=state["rank_zero_only"], _group=None
    )
    metric = _ResultMetric(meta, state["state"] is not None)
    if state["state"] is not None:
        vars(metric).update(state["state"])
    else:
        own = modules.get(meta.metric_attribute or "")
        if not isinstance(own, Metric):
            return None
        metric.value = own
    metric._update_count = 1
    metric.to(trainer.strategy.root_device)
    return metric


def plain_attributes(module: nn.Module) -> dict[str, dict[str, Any]]:
    """Copies of the plain attributes and tensors of each metric other than its declared states, by metric name.

    These are settings, and the counters of wrappers such as `MinMaxMetric` and `Running`.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, metric in module.named_modules():
        if isinstance(metric, Metric):
            own = vars(metric).keys() - _common_attributes() - metric._defaults.keys()
            found[name] = _copied({k: v for k, v in vars(metric).items() if k in own and _is_plain(v)})
    return found


def capture_metrics(
    module: nn.Module, made: Mapping[str, Mapping[str, Any]], skip: Collection[str] = ()
) -> dict[str, dict[str, Any]]:
    """The accumulated values of the module's metrics, by metric name.

    `made` has the metrics' `plain_attributes` before the training; attributes with these values are settings. Metrics
    in `skip`, and metrics that they wrap, are reset before they continue.
    """
    found: dict[str, dict[str, Any]] = {}
    attributes = plain_attributes(module)
    inside = tuple(f"{name}." for name in skip)
    for name, metric in module.named_modules():
        if isinstance(metric, MetricTracker) and metric.n_steps:
            found[name] = {"steps": metric.n_steps}
        elif isinstance(metric, Metric) and not f"{name}.".startswith(inside):
            before = made.get(name, {})
            more = {k: v for k, v in attributes[name].items() if k not in before or not _same(v, before[k])}
            values = _copied({key: vars(metric)[key] for key in _states(metric)})
            # Wrappers do not count their updates.
            if metric.update_called or more:
                found[name] = {"values": values, "updates": metric._update_count, "more": more}
    return found


def restore_metrics(module: nn.Module, saved: Mapping[str, Mapping[str, Any]]) -> None:
    """The inverse of `capture_metrics`; metrics that the module does not have are ignored."""
    for name, tracker in module.named_modules():
        steps = saved.get(name, {}).get("steps", 0)
        while isinstance(tracker, MetricTracker) and tracker.n_steps < steps:
            tracker.increment()
    metrics = {name: metric for name, metric in module.named_modules() if isinstance(metric, Metric)}
    for name, state in saved.items():
        metric = metrics.get(name)
        if metric is None or "values" not in state or {*state["values"]} != _states(metric):
            continue
        vars(metric).update({**state["values"], **state.get("more", {})})
        metric._update_count = state["updates"]
        metric._computed = None


def _states(metric: Metric) -> set[str]:
    """A wrapper may list states of the metric that it wraps."""
    return {key for key in metric._defaults if key in vars(metric)}


@functools.cache
def _common_attributes() -> frozenset[str]:
    return frozenset(vars(SumMetric()))


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(each) for key, each in value.items())
    return value is None or type(value) in (bool, int, float, str, Tensor)


def _same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.shape == other.shape and equal(one.cpu(), other.cpu())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return bool(one == other)


def _copied(states: dict[str, Any]) -> dict[str, Any]:
    """Copies, as metrics are reset in place."""
    return apply_to_collection(states, Tensor, lambda tensor: tensor.detach().clone())
