"""Whether this rank has what DeepSpeed needs, looked at before any rank begins to train."""

from __future__ import annotations

from collections.abc import Mapping

_PRETEND_FP16 = "LAUNCHER_TEST_DEEPSPEED_CPU_FP16"


def pretends_cpu_fp16(env: Mapping[str, str]) -> bool:
    """Whether a test wants DeepSpeed to take fp16 on a CPU, where it lacks the instructions for it."""
    return env.get(_PRETEND_FP16) == "1"
