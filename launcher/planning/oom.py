"""Recognizes out-of-memory errors, and reports them with what the plan expected."""

from __future__ import annotations

import errno
from typing import Any

from launcher.core.errors import OutOfMemoryError, first_line
from launcher.planning.plan import Plan
from strategies.sharding import describe_strategy
from strategies.units import format_bytes

# Messages of allocators without an exception class like that of CUDA's caching allocator.
_SIGNS = (
    # torch's allocators for CPUs and Apple's GPU, and C++ exceptions.
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "MPS backend out of memory",
    "std::bad_alloc",
    "CUDA out of memory",
    # cudaMalloc outside the caching allocator, and cudaHostAlloc, by which DeepSpeed's offload pins host memory.
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "cuda runtime error (2) : out of memory",
    # NCCL's own buffers, with the error's number since 2.19.
    "Cuda failure 'out of memory'",
    "Cuda failure 2 'out of memory'",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one of its causes, is an out-of-memory error."""
    import torch

    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, MemoryError | torch.OutOfMemoryError):
            return True
        # From mmap and fork.
        if isinstance(seen, OSError) and seen.errno == errno.ENOMEM:
            return True
        if isinstance(seen, RuntimeError) and any(sign in str(seen) for sign in _SIGNS):
            return True
        seen = seen.__cause__
    return False


def out_of_memory(
    error: BaseException, plan: Plan, *, rank: int, host: str, allocated_bytes: int | None, on_oom: str
) -> OutOfMemoryError:
    """The error that ends the run: what the plan expected, what was allocated, and what to do.

    `allocated_bytes` is the peak of the rank's device allocator; None if not known.
    """
    own = planned_memory(plan, plan.strategy.name)
    name = describe_strategy(plan.strategy.name, plan.activation_checkpointing)
    lines = [f"rank {rank} ({host}) is out of memory with {name}: {first_line(error)}"]
    if own is None:
        lines.append("the plan has no memory estimate; `launcher plan` shows it for this config")
    else:
        limit = plan.memory["limit_bytes"] if plan.memory else 0
        parts = ", ".join(f"{format_bytes(own[part])} {label}" for part, label in _PARTS.items() if own.get(part))
        lines.append(f"the plan expected {format_bytes(own['total'])} of {format_bytes(limit)}: {parts}")
    if allocated_bytes is not None:
        lines.append(f"at most {format_bytes(allocated_bytes)} were allocated")
    following = plan.memory["next"] if plan.memory else None
    is_checkpointed = bool(plan.memory and plan.memory.get("next_checkpointed"))
    if following and is_checkpointed:
        lines.append(f"next: `activation_checkpointing: true` with `strategy: {following}`")
    elif following:
        needs = planned_memory(plan, following) or {"total": 0}
        lines.append(f"next: `strategy: {following}`, which is expected to need {format_bytes(needs['total'])}")
    elif plan.memory and plan.memory["next_obstacle"]:
        lines.append(plan.memory["next_obstacle"])
    elif (plan.batch.micro_batch_size or 2) > 1:
        lines.append("next: a smaller micro batch (the data's batch_size; global_batch_size keeps the step the same)")
    elif plan.activation_checkpointing:
        lines.append("next: a device with more memory")
    else:
        lines.append("next: `activation_checkpointing: true`, or a device with more memory")
    found = OutOfMemoryError(
        "\n  ".join(lines),
        expected_bytes=None if own is None else own["total"],
        allocated_bytes=allocated_bytes,
        next_strategy=following,
        restarts=on_oom == "next" and following is not None,
    )
    found.next_checkpointed = is_checkpointed
    return found


_PARTS = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer_states": "optimizer states",
    "activations": "activations",
    "temporaries": "temporaries of the optimizer's step",
    "buffers": "buffers of the strategy",
}


def planned_memory(plan: Plan, name: str) -> dict[str, Any] | None:
    """The plan's bytes by part for a strategy; None if they are not in the plan."""
    if plan.memory is None:
        return None
    return next((entry["memory"] for entry in plan.memory["assessments"] if entry["name"] == name), None)


def device_peak(device_kind: str) -> int | None:
    """Peak bytes of torch's allocator on this rank's device; None on a CPU, where torch does not count."""
    if device_kind != "cuda":
        return None
    import torch

    return torch.cuda.max_memory_allocated()
