"""The collectives that this rank has entered, as torch counts and records them; torch is imported by then."""

from __future__ import annotations

from typing import Any


def count_default_group() -> int:
    """The number of collectives of the default process group.

    Raises:
        ValueError: there is none.
    """
    from torch.distributed import distributed_c10d

    group: Any = distributed_c10d._get_default_group()  # pyright: ignore[reportPrivateUsage]
    return group._get_sequence_number_for_group()


def dump_flight_record() -> str:
    """The collectives in torch's flight recorder, as JSON."""
    import torch
    import torch.distributed as dist

    c10d: Any = vars(torch._C)["_distributed_c10d"]
    # A build with NCCL has a separate recorder for it.
    nccl = dist.get_backend() == "nccl" and hasattr(c10d, "_dump_nccl_trace_json")
    text: bytes | str = c10d._dump_nccl_trace_json() if nccl else c10d._dump_fr_trace_json()
    return text.decode("utf-8", errors="replace") if isinstance(text, bytes) else text
