"""State that DeepSpeed keeps for a whole process, reset so that several runs can train in one."""

from __future__ import annotations

import os
import sys
from typing import Any

from strategies.base import StrategyError


def forget_earlier_groups() -> None:
    """Make DeepSpeed use the current process group.

    It keeps the first one of a process, even after that was destroyed.
    """
    from deepspeed.comm import comm
    from deepspeed.utils import groups

    comm.cdb = None
    groups._release_process_group_references(group=None)


def use_deepspeeds_cpu_accelerator(pretend_fp16: bool) -> None:
    """Import DeepSpeed for CPUs. It selects one kind of device at import, and prefers a GPU.

    Args:
        pretend_fp16: for tests, see `strategies.deepspeed_strategy.CpuDeepSpeed`.

    Raises:
        StrategyError: it was already imported for another kind of device.
    """
    if "deepspeed" not in sys.modules:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    accelerator: Any = get_accelerator()
    if accelerator.device_name() != "cpu":
        raise StrategyError(
            f"DeepSpeed was already imported in this process for {accelerator.device_name()} and cannot train on a CPU; "
            "set DS_ACCELERATOR=cpu before the first import, or use `accelerator: gpu`"
        )
    # Its all-reduce over shared memory would be compiled first, and a killed rank leaves the lock of that behind.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if pretend_fp16:
        accelerator.is_fp16_supported = lambda: True
