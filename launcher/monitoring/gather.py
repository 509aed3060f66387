"""One packed collective carries every rank's sample; it is started at one interval and read at the next."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from launcher.monitoring.samples import ABSENT, FIELDS, RankSample, unpack_sample

# Seconds between two checks of a transfer.
_POLL_INTERVAL = 0.001


@dataclass(frozen=True, slots=True)
class Gathered:
    """All ranks' samples of one moment.

    Attributes:
        step: optimizer steps done when they were taken.
        samples: by rank; empty on ranks other than zero, which need none.
        batch: the step at which Lightning logs this moment; see `launcher.loggers.base.LogStep`.
    """

    step: int
    epoch: int | None
    samples: tuple[RankSample, ...]
    batch: int = 0


@dataclass(frozen=True, slots=True)
class _Transfer:
    """Samples that are being gathered; `moment` has none yet."""

    moment: Gathered
    vectors: Sequence[Tensor]
    ready: Callable[[], bool]
    wait: Callable[[], object]


class SampleExchange:
    """Sends the ranks' samples to rank zero. Every rank sends equally often, at the same steps."""

    def __init__(self, group: Any = None) -> None:
        self._group = group
        self._transfers: deque[_Transfer] = deque()

    @property
    def world_size(self) -> int:
        """Number of ranks that take part."""
        return dist.get_world_size(self._group) if _is_distributed() else 1

    @property
    def rank(self) -> int:
        """This rank."""
        return dist.get_rank(self._group) if _is_distributed() else 0

    def send(self, step: int, epoch: int | None, values: Mapping[str, float | Tensor], batch: int = 0) -> None:
        """Start to gather this rank's sample with the others'; does not wait.

        `values` has names of `FIELDS`; missing ones count as absent. Tensors have one element and may be on the device.
        """
        moment = Gathered(step, epoch, (), batch)
        vector = _pack(values, self._device(values))
        if self.world_size == 1:
            self._transfers.append(_to_host(moment, [vector], None))
            return
        vectors = [torch.empty_like(vector) for _ in range(self.world_size)]
        work = dist.all_gather(vectors, vector, group=self._group, async_op=True)
        if work is None:  # this rank is not in the group
            return
        self._transfers.append(_to_host(moment, vectors if self.rank == 0 else vectors[:0], work))

    def take(self, *, wait: bool = False) -> list[Gathered]:
        """Return what has arrived, oldest first; `wait` for everything, at most for the process group's timeout."""
        arrived: list[Gathered] = []
        while self._transfers and (wait or self._transfers[0].ready()):
            sent = self._transfers.popleft()
            sent.wait()
            samples = tuple(unpack_sample(rank, vector.tolist()) for rank, vector in enumerate(sent.vectors))
            arrived.append(replace(sent.moment, samples=samples))
        return arrived

    def wait(self, timeout: float) -> None:
        """Wait until everything that was sent has arrived, at most `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not all(sent.ready() for sent in self._transfers) and time.monotonic() < deadline:
            time.sleep(_POLL_INTERVAL)

    def drop(self) -> None:
        """Discard transfers that have not finished: a rank has failed, and they never will."""
        self._transfers.clear()

    def _device(self, values: Mapping[str, Any]) -> torch.device:
        """Device of the collective; without one, the device of the tensors."""
        if self.world_size > 1:
            on_gpu = "nccl" in dist.get_backend(self._group)
            return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        return next((v.device for v in values.values() if isinstance(v, Tensor)), torch.device("cpu"))


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _pack(values: Mapping[str, float | Tensor], device: torch.device) -> Tensor:
    """The vector, in the order of FIELDS. float64 holds any count; Apple's GPUs do not support it."""
    known = [ABSENT if isinstance(v, Tensor) else v for v in (values.get(name, ABSENT) for name in FIELDS)]
    dtype = torch.float32 if device.type == "mps" else torch.float64
    vector = torch.tensor(known, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    for index, name in enumerate(FIELDS):
        value = values.get(name)
        if isinstance(value, Tensor):
            vector[index : index + 1].copy_(value.detach().reshape(1), non_blocking=True)
    return vector


def _to_host(moment: Gathered, vectors: Sequence[Tensor], work: Any) -> _Transfer:
    """Copy the gathered vectors to the host without making it wait."""
    if not vectors or vectors[0].device.type != "cuda":
        if work is None:
            return _Transfer(moment, vectors, lambda: True, lambda: None)
        return _Transfer(moment, vectors, work.is_completed, work.wait)
    # A separate stream: the training's must not wait for the slowest rank here.
    stream = torch.cuda.Stream(vectors[0].device)
    stream.wait_stream(torch.cuda.current_stream(vectors[0].device))
    event = torch.cuda.Event()
    with torch.cuda.stream(stream):
        if work is not None:
            work.wait()
        host: list[Tensor] = []
        for vector in vectors:
            vector.record_stream(stream)
            host.append(torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True).copy_(vector, non_blocking=True))
        event.record(stream)
    return _Transfer(moment, host, event.query, event.synchronize)
