"""Names and meanings of the metrics and alerts, for the documentation; a test compares them with the code."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

METRICS: Mapping[str, str] = MappingProxyType({
    "amp/enabled": "true while the callback is active",
    "amp/precision": "precision of the Trainer",
    "amp/loss_scale": "loss scale of rank 0",
    "amp/loss_scale_min": "smallest loss scale of all ranks",
    "amp/loss_scale_max": "largest loss scale of all ranks",
    "amp/growth_tracker": "steps since the loss scale last changed (smallest value of all ranks)",
    "amp/skipped_steps": "optimizer steps skipped since the start of training",
    "amp/skip_rate": "share of the steps of the last interval that were skipped",
    "amp/floor_steps": "consecutive steps with the loss scale at its floor",
    "amp/ranks_diverged": "1 if the ranks have different loss scales, else 0",
    "amp/overflow": "true if a loss scale is infinite or NaN",
    "amp/underflow": "true if a loss scale is 0",
    "amp/dropped_rows": "rows that W&B did not accept; only present if there are any",
    "perf/step_seconds": "mean time of an optimizer step (slowest rank)",
    "perf/data_seconds": "mean time spent waiting for data per step (slowest rank)",
    "perf/samples_per_second": "samples that all ranks train in a second, without validations and checkpoints",
    "perf/tokens_per_second": "tokens likewise, padding included; only if the batch has a 2-D tensor of integers",
    "perf/flops_per_second": "floating point operations of the model likewise; only if planning traced a step",
    "perf/mfu": "that divided by the peak of all devices (model FLOPs utilization); only on GPUs with a known peak",
    "perf/peak_memory_bytes": "peak memory (largest of all ranks); resident memory on a CPU",
    "perf/slowest_rank": "rank with the most time for data and forward pass; with two ranks or more",
    "perf/slowest_factor": "that time divided by the median of the other ranks",
})  # fmt: skip

ALERTS: Mapping[str, str] = MappingProxyType({
    "scale_not_finite": "A loss scale is infinite or NaN.",
    "scale_underflow": "A loss scale is 0.",
    "scale_at_floor": "A loss scale has stayed at or below `watch.floor` for `watch.floor_steps` steps.",
    "steps_skipped": "Too many optimizer steps are skipped: 10 % of the last 50 or more with a loss scale below "
    "`watch.floor`, or 20 % in each of two such windows.",
    "ranks_diverged": "The ranks have different loss scales, so they no longer step together.",
    "loss_not_finite": "The loss of a rank is infinite or NaN.",
    "slow_rank": "One rank delays the others: `watch.slow_factor`, `watch.slow_share` and `watch.slow_steps`.",
    "buffers_not_finite": "A skipped fp16 step has left NaN or infinity in running statistics, as of a batch norm.",
})  # fmt: skip
