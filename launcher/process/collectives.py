"""The process groups of this rank, and the collectives that it has entered, as torch counts and records them."""

from __future__ import annotations

import functools
import os
import sys
from typing import Any

# Destroyed groups.
_kept: list[Any] = []


def keep_process_groups() -> None:
    """Keep destroyed process groups in memory until this process ends, if torch is imported already.

    A thread of gloo may hold the last reference to a tensor, and needs Python's lock (GIL) to release it. The main
    thread holds that lock while it frees a group and joins the group's threads: they would wait for each other.
    """
    c10d: Any = sys.modules.get("torch.distributed.distributed_c10d")
    if c10d is None:
        return
    destroy: Any = c10d.destroy_process_group

    @functools.wraps(destroy)
    def destroy_and_keep(group: Any = None) -> None:
        _kept.extend(each for each in c10d._world.pg_map if each not in _kept)
        destroy(group)

    for module in (c10d, sys.modules["torch.distributed"]):
        vars(module)["destroy_process_group"] = destroy_and_keep


def count_default_group() -> int:
    """The number of collectives of the default process group.

    Raises:
        ValueError: there is none.
    """
    from torch.distributed import distributed_c10d

    group: Any = distributed_c10d._get_default_group()  # pyright: ignore[reportPrivateUsage]
    return group._get_sequence_number_for_group()


def enable_flight_recorder() -> None:
    """Let torch record collectives, before the first process group: by default 2.10 does not; the size is 2.13's."""
    if "TORCH_NCCL_TRACE_BUFFER_SIZE" not in os.environ:
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")


def dump_flight_record() -> str:
    """The collectives in torch's flight recorder, as JSON."""
    import torch
    import torch.distributed as dist

    c10d: Any = vars(torch._C)["_distributed_c10d"]
    # A build with NCCL has a separate recorder for it.
    nccl = dist.get_backend() == "nccl" and hasattr(c10d, "_dump_nccl_trace_json")
    text: bytes | str = c10d._dump_nccl_trace_json() if nccl else c10d._dump_fr_trace_json()
    return text.decode("utf-8", errors="replace") if isinstance(text, bytes) else text
