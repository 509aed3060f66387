"""Warnings about a valid config: how this hardware, or Lightning, will treat it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher.core.errors import Problem
from strategies.precision import AUTO, Precision, PrecisionError, RankCapability, normalize_precision, reconcile

if TYPE_CHECKING:
    from launcher.hardware.devices import Hardware
    from launcher.wizard.answers import WizardConfig

_FULL = (Precision.FP32_TRUE, Precision.FP64_TRUE)


def find_notes(config: WizardConfig, hardware: Hardware | None = None) -> tuple[Problem, ...]:
    """Warnings on a config without errors.

    Args:
        config: the answers.
        hardware: of the run; if not given, that of this machine, where an answer depends on it.
    """
    notes = [*_check_contradiction(config), *_check_length(config)]
    if _depends_on_hardware(config):
        if hardware is None:
            from launcher.hardware.devices import detect_hardware

            hardware = detect_hardware("auto" if config.accelerator != "cpu" else "cpu", 0)
        notes += [*_check_precision(config, hardware), *_check_devices(config, hardware)]
    return tuple(notes)


def _depends_on_hardware(config: WizardConfig) -> bool:
    return bool(
        config.use_mixed_precision
        or config.precision not in (None, AUTO)
        or config.accelerator not in (None, AUTO, "cpu")
        or config.devices not in (None, AUTO, 1)
    )


def _check_contradiction(config: WizardConfig) -> list[Problem]:
    """Warn that `use_amp` overrides `precision` (`strategies.precision.reconcile`)."""
    if config.use_mixed_precision is None or config.precision in (None, AUTO):
        return []
    full = normalize_precision(config.precision) in _FULL
    if config.use_mixed_precision is False and not full:
        return [
            Problem("use_mixed_precision", f"false overrides precision {config.precision}: the run trains in 32-true")
        ]
    if config.use_mixed_precision and full:
        message = f"true overrides precision {config.precision}: mixed precision if the hardware supports it"
        return [Problem("use_mixed_precision", message)]
    return []


def _check_length(config: WizardConfig) -> list[Problem]:
    steps, time = config.max_steps, config.settings.get("trainer.max_time")
    if config.model is None or config.max_epochs is not None or time is not None or (steps is not None and steps >= 0):
        return []
    return [Problem("max_epochs", "neither max_epochs nor max_steps is set: Lightning trains for 1000 epochs")]


def _check_precision(config: WizardConfig, hardware: Hardware) -> list[Problem]:
    """Apply the rule of `fit` to the device of this machine."""
    device = hardware.device
    capability = RankCapability(0, "this machine", device.kind, device.name, frozenset(device.native_dtypes))
    where = "use_mixed_precision" if config.use_mixed_precision else "precision"
    fallback = bool(config.settings.get("precision_fallback"))
    try:
        agreed = reconcile(
            config.precision or AUTO, [capability], use_amp=config.use_mixed_precision, fallback=fallback
        )
    except PrecisionError as error:
        return [Problem(where, str(error))]
    return [Problem(where, notice) for notice in agreed.notices]


def _check_devices(config: WizardConfig, hardware: Hardware) -> list[Problem]:
    kind, count = hardware.device.kind, hardware.local_device_count
    wanted = {"gpu": ("cuda", "mps"), "cuda": ("cuda",), "mps": ("mps",)}.get(config.accelerator or AUTO)
    if wanted is not None and kind not in wanted:
        message = f"given {config.accelerator}, but this machine has none: `fit` works only on a machine that has one"
        return [Problem("accelerator", message)]
    if kind != "cpu" and isinstance(config.devices, int) and config.devices > count:
        message = f"given {config.devices}, but this machine has {count}: `fit` needs a machine with as many"
        return [Problem("devices", message)]
    return []
