"""Whether this rank, and the model, are such that DeepSpeed can train: looked at before the training begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from launcher.config.schema import RunConfig
from launcher.core.errors import PlanError
from launcher.hardware.nvme import find_offload_folders, inspect_folders
from strategies.deepspeed_config import VARIANTS

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from launcher.planning.plan import Plan

_PRETEND_FP16 = "LAUNCHER_TEST_DEEPSPEED_CPU_FP16"


def pretends_cpu_fp16(env: Mapping[str, str]) -> bool:
    """Whether a test wants DeepSpeed to take fp16 on a CPU, where it lacks the instructions for it."""
    return env.get(_PRETEND_FP16) == "1"


def deepspeed_facts(config: RunConfig, device_kind: str, env: Mapping[str, str]) -> dict[str, Any]:
    """What this rank tells the others of its node for DeepSpeed, by the names of `RankFacts`.

    Args:
        config: a file of DeepSpeed's settings is read in already.
        device_kind: 'cpu', 'cuda' or 'mps'.
        env: this process's variables.
    """
    fp16 = device_kind != "cpu" or pretends_cpu_fp16(env) or _has_fp16()
    return {"deepspeed_fp16": fp16, "nvme": inspect_folders(find_offload_folders(config))}


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
