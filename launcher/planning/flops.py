"""The work of a training step, and the share of the devices' peak that it reaches (MFU). Pure.

Model FLOPs utilization as in "PaLM: Scaling Language Modeling with Pathways" (arXiv 2204.02311, appendix B): the
operations of the model's forward and backward pass, without those that activation checkpointing does again, divided by
the devices' peak in this time. The peaks are those of `strategies.gpus`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from launcher.planning.plan import Plan
from strategies.gpus import recognize_gpu

_HALF = ("16-mixed", "bf16-mixed", "16-true", "bf16-true")


@dataclass(frozen=True, slots=True)
class ModelWork:
    """What a sample costs, and what the ranks could do.

    Attributes:
        flops_per_sample: floating point operations of a sample, forward and backward; None if no step was traced.
        peak_flops: FLOP/s of all ranks together; None for a CPU, an unknown GPU, or a precision without a number.
    """

    flops_per_sample: float | None = None
    peak_flops: float | None = None

    @classmethod
    def of(cls, plan: Plan) -> ModelWork:
        """The work of a plan."""
        return cls(plan.flops_per_sample, find_peak_flops(plan.device_kind, plan.devices, plan.precision))

    def find_speed(self, samples_per_second: float) -> float | None:
        """The FLOP/s of the model at this speed of all ranks; None if no step was traced."""
        return None if self.flops_per_sample is None else self.flops_per_sample * samples_per_second


def find_peak_flops(device_kind: str, devices: Mapping[str, int], precision: str) -> float | None:
    """The peak FLOP/s of these devices together; `devices` is the number of ranks by name of their device."""
    if device_kind != "cuda" or precision not in (*_HALF, "32-true"):
        return None
    total = 0.0
    for name, count in devices.items():
        gpu = recognize_gpu(name)
        if gpu is None:
            return None
        total += count * (gpu.half_flops if precision in _HALF else gpu.fp32_flops)
    return total or None


def format_flops(flops: float) -> str:
    """'1.23 TFLOP', '45 MFLOP'."""
    for unit, scale in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6)):
        if flops >= scale:
            return f"{flops / scale:.3g} {unit}"
    return f"{flops:.3g} FLOP"
