"""What the user should know of a valid config: what this hardware, or Lightning, makes of it."""

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
        hardware: what the run will have; looked up on this machine if an answer asks for it and it is not given.
    """
    notes = [*_on_contradiction(config), *_on_length(config)]
    if _asks_for_hardware(config):
        if hardware is None:
            from launcher.hardware.devices import detect_hardware

            hardware = detect_hardware("auto" if config.accelerator != "cpu" else "cpu", 0)
        notes += [*_on_precision(config, hardware), *_on_devices(config, hardware)]
    return tuple(notes)


def _asks_for_hardware(config: WizardConfig) -> bool:
    return bool(
        config.use_mixed_precision
        or config.precision not in (None, AUTO)
        or config.accelerator not in (None, AUTO, "cpu")
        or config.devices not in (None, AUTO, 1)  # there is always one
    )


def _on_contradiction(config: WizardConfig) -> list[Problem]:
    """`use_amp` outweighs `precision` (`strategies.precision.reconcile`): nobody should be surprised by it."""
    if config.use_mixed_precision is None or config.precision in (None, AUTO):
        return []
    full = normalize_precision(config.precision) in _FULL
    if config.use_mixed_precision is False and not full:
        return [Problem("use_mixed_precision", f"false outweighs precision {config.precision}: training in 32-true")]
    if config.use_mixed_precision and full:
        message = f"true outweighs precision {config.precision}: mixed precision where the hardware has it"
        return [Problem("use_mixed_precision", message)]
    return []


def _on_length(config: WizardConfig) -> list[Problem]:
    steps, time = config.max_steps, config.settings.get("trainer.max_time")
    if config.model is None or config.max_epochs is not None or time is not None or (steps is not None and steps >= 0):
        return []
    return [Problem("max_epochs", "neither max_epochs nor max_steps is set: Lightning trains 1000 epochs")]


def _on_precision(config: WizardConfig, hardware: Hardware) -> list[Problem]:
    """The rule that `fit` goes by, asked on this machine's device alone."""
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


def _on_devices(config: WizardConfig, hardware: Hardware) -> list[Problem]:
    kind, count = hardware.device.kind, hardware.local_device_count
    wanted = {"gpu": ("cuda", "mps"), "cuda": ("cuda",), "mps": ("mps",)}.get(config.accelerator or AUTO)
    if wanted is not None and kind not in wanted:
        message = f"{config.accelerator} was asked for, and this machine has none: `fit` works only where there is one"
        return [Problem("accelerator", message)]
    if kind != "cpu" and isinstance(config.devices, int) and config.devices > count:
        message = (
            f"{config.devices} were asked for, and this machine has {count}: `fit` works only where there are as many"
        )
        return [Problem("devices", message)]
    return []
