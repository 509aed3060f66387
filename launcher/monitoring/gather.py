"""One packed collective carries every rank's sample; it is started at one interval and read at the next."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from launcher.monitoring.samples import ABSENT, FIELDS, RankSample, sample_of


@dataclass(frozen=True, slots=True)
class Gathered:
    """All ranks' samples of one moment.

    Attributes:
        step: optimizer steps done when they were taken.
        epoch: the epoch then, None if unknown.
        samples: by rank; empty on ranks other than zero, which need none.
    """

    step: int
    epoch: int | None
    samples: tuple[RankSample, ...]


@dataclass(frozen=True, slots=True)
class _Underway:
    step: int
    epoch: int | None
    vectors: Sequence[Tensor]
    ready: Callable[[], bool]
    wait: Callable[[], object]


class SampleExchange:
    """The ranks' samples on their way to rank zero. Every rank sends equally often, at the same steps.

    Args:
        group: the ranks; None for all.
    """

    def __init__(self, group: Any = None) -> None:
        self._group = group
        self._underway: deque[_Underway] = deque()

    @property
    def world_size(self) -> int:
        """Number of ranks that take part."""
        return dist.get_world_size(self._group) if _is_distributed() else 1

    @property
    def rank(self) -> int:
        """This rank."""
        return dist.get_rank(self._group) if _is_distributed() else 0

    def send(self, step: int, epoch: int | None, values: Mapping[str, float | Tensor]) -> None:
        """Start to gather this rank's sample with the others'; does not wait.

        Args:
            step: optimizer steps done.
            epoch: the epoch, None if unknown.
            values: by the names of `FIELDS`; what is missing counts as absent. Tensors have one element and may be on
                the device.
        """
        vector = _pack(values, self._device(values))
        if self.world_size == 1:
            self._underway.append(_to_host(step, epoch, [vector], None))
            return
        vectors = [torch.empty_like(vector) for _ in range(self.world_size)]
        work = dist.all_gather(vectors, vector, group=self._group, async_op=True)
        if work is None:  # this rank is not in the group
            return
        self._underway.append(_to_host(step, epoch, vectors if self.rank == 0 else vectors[:0], work))

    def take(self, *, wait: bool = False) -> list[Gathered]:
        """What has arrived, oldest first.

        Args:
            wait: for all that was sent, as long as the process group's timeout allows.
        """
        arrived: list[Gathered] = []
        while self._underway and (wait or self._underway[0].ready()):
            sent = self._underway.popleft()
            sent.wait()
            samples = tuple(sample_of(rank, vector.tolist()) for rank, vector in enumerate(sent.vectors))
            arrived.append(Gathered(sent.step, sent.epoch, samples))
        return arrived

    def drop(self) -> None:
        """Forget what is underway: the ranks will not come together any more."""
        self._underway.clear()

    def _device(self, values: Mapping[str, Any]) -> torch.device:
        """Where the collective works; without one, where the tensors are."""
        if self.world_size > 1:
            on_gpu = "nccl" in dist.get_backend(self._group)
            return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        return next((v.device for v in values.values() if isinstance(v, Tensor)), torch.device("cpu"))


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _pack(values: Mapping[str, float | Tensor], device: torch.device) -> Tensor:
    """The vector, in the order of FIELDS. Doubles hold any count; Apple's GPUs have none."""
    known = [ABSENT if isinstance(v, Tensor) else v for v in (values.get(name, ABSENT) for name in FIELDS)]
    dtype = torch.float32 if device.type == "mps" else torch.float64
    vector = torch.tensor(known, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    for index, name in enumerate(FIELDS):
        value = values.get(name)
        if isinstance(value, Tensor):
            vector[index : index + 1].copy_(value.detach().reshape(1), non_blocking=True)
    return vector


def _to_host(step: int, epoch: int | None, vectors: Sequence[Tensor], work: Any) -> _Underway:
    """Bring the gathered vectors to the host without making it wait."""
    if not vectors or vectors[0].device.type != "cuda":
        if work is None:
            return _Underway(step, epoch, vectors, lambda: True, lambda: None)
        return _Underway(step, epoch, vectors, work.is_completed, work.wait)
    # A stream of its own: the training's must not wait for the slowest rank here.
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
    return _Underway(step, epoch, host, event.query, event.synchronize)
