"""The strategies that a plan compares, in the order of what they ask of the wire."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Candidate:
    """One strategy.

    Attributes:
        name: Lightning's spelling.
        stage: ZeRO stage, 0 without ZeRO.
        offload: 'cpu' or 'nvme' if the optimizer's states (and with stage 3 the parameters) leave the device.
    """

    name: str
    stage: int = 0
    offload: str | None = None


SINGLE_DEVICE = Candidate("single_device")
DDP = Candidate("ddp")
ZERO_1 = Candidate("deepspeed_stage_1", 1)
ZERO_2 = Candidate("deepspeed_stage_2", 2)
ZERO_3 = Candidate("deepspeed_stage_3", 3)
ZERO_2_OFFLOAD = Candidate("deepspeed_stage_2_offload", 2, "cpu")
ZERO_3_OFFLOAD = Candidate("deepspeed_stage_3_offload", 3, "cpu")
ZERO_3_NVME = Candidate("deepspeed_stage_3_offload_nvme", 3, "nvme")

CANDIDATES = (SINGLE_DEVICE, DDP, ZERO_1, ZERO_2, ZERO_3, ZERO_2_OFFLOAD, ZERO_3_OFFLOAD, ZERO_3_NVME)
