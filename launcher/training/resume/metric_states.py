"""Read and write the states of a module's torchmetrics, including those that some keep in plain attributes."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from typing import Any

from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, equal, nn
from torchmetrics import Metric, SumMetric
from torchmetrics.wrappers import MetricTracker


def plain_attributes(module: nn.Module) -> dict[str, dict[str, Any]]:
    """Copies of the plain attributes and tensors of each metric other than its declared states, by metric name.

    These are settings, and the counters of wrappers such as `MinMaxMetric` and `Running`.
    """
    return {
        name: _copied({key: value for key, value in vars(metric).items() if _is_own(metric, key) and _is_plain(value)})
        for name, metric in module.named_modules()
        if isinstance(metric, Metric)
    }


def capture_metrics(
    module: nn.Module, made: Mapping[str, Mapping[str, Any]], skip: Collection[str] = ()
) -> dict[str, dict[str, Any]]:
    """The accumulated values of the metrics, by metric name.

    Args:
        module: has the metrics.
        made: their `plain_attributes` before the training; attributes with these values are settings.
        skip: names of metrics that are reset before they continue, and of those that they wrap.
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


def _is_own(metric: Metric, key: str) -> bool:
    return key not in _common_attributes() and key not in metric._defaults


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
