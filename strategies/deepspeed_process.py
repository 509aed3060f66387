"""What DeepSpeed decides once for a whole process, and a later training in it must not find."""

from __future__ import annotations

import os
import sys
from typing import Any

from strategies.base import StrategyError


def forget_earlier_groups() -> None:
    """Let DeepSpeed take the process group that is there now.

    It keeps the first one of a process for good, also after that has been destroyed.
    """
    from deepspeed.comm import comm
    from deepspeed.utils import groups

    comm.cdb = None
    groups._release_process_group_references(group=None)


def use_deepspeeds_cpu_accelerator(pretend_fp16: bool) -> None:
    """DeepSpeed decides for one kind of device when it is imported, and takes a GPU where it sees one.

    Args:
        pretend_fp16: for tests, see `strategies.deepspeed_strategy.CpuDeepSpeed`.

    Raises:
        StrategyError: it was imported for another kind before.
    """
    if "deepspeed" not in sys.modules:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    accelerator: Any = get_accelerator()
    if accelerator.device_name() != "cpu":
        raise StrategyError(
            f"DeepSpeed was imported in this process for {accelerator.device_name()} and cannot train on a CPU any "
            "more; set DS_ACCELERATOR=cpu before the first import, or use `accelerator: gpu`"
        )
    # Its all-reduce over shared memory would be compiled first, under a lock that a killed rank leaves behind.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if pretend_fp16:
        accelerator.is_fp16_supported = lambda: True
