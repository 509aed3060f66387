"""What a rank reports to the others for DeepSpeed, before a strategy is chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.config.schema import RunConfig
from launcher.hardware.nvme import find_offload_folders, inspect_folders

_PRETEND_FP16 = "LAUNCHER_TEST_DEEPSPEED_CPU_FP16"


def pretends_cpu_fp16(env: Mapping[str, str]) -> bool:
    """Whether a test makes DeepSpeed accept fp16 on a CPU without the instructions for it."""
    return env.get(_PRETEND_FP16) == "1"


def deepspeed_facts(config: RunConfig, device_kind: str, env: Mapping[str, str]) -> dict[str, Any]:
    """Facts of this rank and its node that DeepSpeed needs, by the names of `RankFacts`."""
    fp16 = device_kind != "cpu" or pretends_cpu_fp16(env) or _has_fp16()
    return {"deepspeed_fp16": fp16, "nvme": inspect_folders(find_offload_folders(config))}


def _has_fp16() -> bool:
    import torch

    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
