"""Warnings about a valid config: effects of this hardware, or of Lightning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from launcher.core.errors import Problem
from strategies.batch import BatchSplitError, split_batch
from strategies.precision import AUTO, Precision, PrecisionError, RankCapability, normalize_precision, reconcile
from strategies.registry import find_requested

if TYPE_CHECKING:
    from launcher.hardware.devices import Hardware

_ONE_RANK = "single_device"
_FULL = (Precision.FP32_TRUE, Precision.FP64_TRUE)


def find_notes(answers: Mapping[str, Any], hardware: Hardware | None = None) -> tuple[Problem, ...]:
    """Warnings about answers without errors.

    Args:
        answers: name to value, as in `WizardConfig`.
        hardware: of the run; if not given, that of this machine, where an answer depends on it.
    """
    notes = [*_check_contradiction(answers), *_check_length(answers)]
    depends_on_hardware = (
        answers["use_mixed_precision"]
        or answers["precision"] not in (None, AUTO)
        or answers["accelerator"] not in (None, AUTO, "cpu")
        or answers["devices"] not in (None, AUTO, 1)
    )
    if depends_on_hardware:
        if hardware is None:
            from launcher.hardware.devices import detect_hardware

            hardware = detect_hardware("auto" if answers["accelerator"] != "cpu" else "cpu", 0)
        notes += [*_check_precision(answers, hardware), *_check_devices(answers, hardware)]
    return tuple(notes)


def find_split_problems(answers: Mapping[str, Any]) -> list[Problem]:
    """Problems of the batch size or the strategy with the number of ranks, which no machine solves."""
    devices, nodes, samples = answers["devices"], answers["num_nodes"], answers["global_batch_size"]
    if not isinstance(devices, int):
        return []
    # With an unknown number of nodes, one has to work at least.
    ranks = devices * (nodes if isinstance(nodes, int) else 1)
    problems: list[Problem] = []
    given = answers["settings"].get("trainer.accumulate_grad_batches")
    accumulate = given if isinstance(given, int) and given > 1 else None
    if isinstance(samples, int) and samples > 0:
        try:
            split_batch(
                samples, ranks, accumulate=accumulate if isinstance(accumulate, int) and accumulate > 1 else None
            )
        except BatchSplitError as error:
            problems.append(Problem("global_batch_size", str(error)))
    if answers["strategy"] == _ONE_RANK and ranks > 1:
        message = f"given {_ONE_RANK}, but there are {ranks} ranks; choose another strategy, or one rank"
        problems.append(Problem("strategy", message))
    strategy = find_requested(answers["strategy"])
    if strategy is not None and strategy.is_sharded and strategy.offload is None and (devices, nodes) == (1, 1):
        message = f"given {strategy.name}, which shards over the ranks, but there is one; choose several ranks, or auto"
        problems.append(Problem("strategy", message))
    return problems


def _check_contradiction(answers: Mapping[str, Any]) -> list[Problem]:
    """Warn that `use_amp` overrides `precision` (`strategies.precision.reconcile`)."""
    is_mixed, precision = answers["use_mixed_precision"], answers["precision"]
    if is_mixed is None or precision in (None, AUTO) or is_mixed != (normalize_precision(precision) in _FULL):
        return []
    effect = "mixed precision if the hardware supports it" if is_mixed else "the run trains in 32-true"
    return [Problem("use_mixed_precision", f"{str(is_mixed).lower()} overrides precision {precision}: {effect}")]


def _check_length(answers: Mapping[str, Any]) -> list[Problem]:
    steps = answers["max_steps"]
    is_limited = answers["max_epochs"] is not None or (steps is not None and steps >= 0)
    if answers["model"] is None or is_limited or answers["settings"].get("trainer.max_time") is not None:
        return []
    return [Problem("max_epochs", "neither max_epochs nor max_steps is set: Lightning trains for 1000 epochs")]


def _check_precision(answers: Mapping[str, Any], hardware: Hardware) -> list[Problem]:
    """Apply the rule of `fit` to the device of this machine."""
    device, use_amp = hardware.device, answers["use_mixed_precision"]
    capability = RankCapability(0, "this machine", device.kind, device.name, frozenset(device.native_dtypes))
    where = "use_mixed_precision" if use_amp else "precision"
    fallback = bool(answers["settings"].get("precision_fallback"))
    try:
        agreed = reconcile(answers["precision"] or AUTO, [capability], use_amp=use_amp, fallback=fallback)
    except PrecisionError as error:
        return [Problem(where, str(error))]
    return [Problem(where, notice) for notice in agreed.notices]


def _check_devices(answers: Mapping[str, Any], hardware: Hardware) -> list[Problem]:
    accelerator, devices = answers["accelerator"], answers["devices"]
    kind, count = hardware.device.kind, hardware.local_device_count
    wanted = {"gpu": ("cuda", "mps"), "cuda": ("cuda",), "mps": ("mps",)}.get(accelerator or AUTO)
    if wanted is not None and kind not in wanted:
        message = f"given {accelerator}, but this machine has none: `fit` works only on a machine that has one"
        return [Problem("accelerator", message)]
    if kind != "cpu" and isinstance(devices, int) and devices > count:
        message = f"given {devices}, but this machine has {count}: `fit` needs a machine with at least as many"
        return [Problem("devices", message)]
    return []
