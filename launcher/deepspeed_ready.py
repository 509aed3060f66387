"""Whether this rank, and the model, are such that DeepSpeed can train: looked at before the training begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from launcher.config import RunConfig
from launcher.errors import PlanError
from strategies.deepspeed_config import VARIANTS
from strategies.deepspeed_precision import ordered_precision
from strategies.precision import AUTO, Precision, PrecisionError, normalize_precision

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from launcher.plan import Plan

_PRETEND_FP16 = "LAUNCHER_TEST_DEEPSPEED_CPU_FP16"


def pretends_cpu_fp16(env: Mapping[str, str]) -> bool:
    """Whether a test wants DeepSpeed to take fp16 on a CPU, where it lacks the instructions for it."""
    return env.get(_PRETEND_FP16) == "1"


def check_cpu_fp16(config: RunConfig, device_kind: str, env: Mapping[str, str]) -> None:
    """DeepSpeed trains in fp16 on such CPUs alone that compute in it.

    Raises:
        PlanError: it was asked for, and this CPU does not.
    """
    if config.strategy not in VARIANTS or device_kind != "cpu" or pretends_cpu_fp16(env):
        return
    try:
        order = None if config.precision == AUTO else normalize_precision(config.precision)
    except PrecisionError:
        return  # told by the plan
    if order is None and isinstance(config.deepspeed_config, Mapping):
        order = ordered_precision(config.deepspeed_config)
    if order in (Precision.FP16_MIXED, Precision.FP16_TRUE) and not _has_fp16():
        raise PlanError(
            f"precision {order} was asked for, but DeepSpeed trains in fp16 on a CPU only where that has "
            "AVX512-FP16; use bf16-mixed, or debug fp16 with `strategy: ddp`"
        )


def _has_fp16() -> bool:
    import torch

    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def check_model(model: pl.LightningModule, plan: Plan, notice: Callable[[str], None]) -> None:
    """What DeepSpeed cannot train, or would leave out without a word.

    Args:
        model: as its constructor made it.
        plan: what it is to be trained with.
        notice: told of hooks that DeepSpeed does not call.

    Raises:
        PlanError: the model optimizes by hand.
    """
    if plan.strategy.name not in VARIANTS:
        return
    import lightning.pytorch as pl
    from lightning.pytorch.utilities.model_helpers import is_overridden

    name = type(model).__name__
    if not model.automatic_optimization:
        raise PlanError(
            f"{name} optimizes by hand (automatic_optimization is False), which {plan.strategy.name} cannot: ZeRO "
            "steps by itself after the last backward of a batch; use `strategy: ddp`, or automatic optimization"
        )
    for hook, instead in (
        ("backward", "its engine runs the backward pass"),
        ("configure_gradient_clipping", "it clips by itself, by trainer.gradient_clip_val"),
    ):
        if is_overridden(hook, model, pl.LightningModule):
            notice(f"{name}.{hook} has no effect under DeepSpeed: {instead}")
