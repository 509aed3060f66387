"""Trains with one strategy on real gloo ranks under a limit of memory, as `fit` would: Lightning and our strategies.

A rank enters its own control group right before the model is built, after a small training with the same strategy has
started threads, gloo's connections and libraries. Only pages that it touches from then on count, and above the limit
the kernel kills it. `RLIMIT_DATA` would also count untouched pages, such as most of a thread's stack, and memory that
glibc has freed but kept.

Tensors above a few pages are mapped and unmapped one by one, so that the limit counts live bytes and not the holes of
glibc's heap. The page faults make steps slower, so times are measured without this.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import json
import multiprocessing
import os
import statistics
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from strategies.base import StrategyEntry
from tests.support.memory_group import MemoryGroup, memory_group

WARM_UP = 1
# Elements: DeepSpeed's buckets are as small relative to these models as to large ones.
BUCKET = 4_000_000
# Variables of each rank; the fork server passes them on.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
# mallopt(3), malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_numbers = itertools.count()


@dataclass(frozen=True)
class Case:
    """One training.

    Attributes:
        family: a name in `tests.support.model_families`, of `LARGE` or `HELD_OUT`.
        candidate: the strategy.
        micro_batch_size: samples that a rank takes at once.
        accumulate: micro batches of one optimizer step.
        precision: Lightning's name.
        limit_bytes: limit of each rank on top of its memory before the model; None without a limit.
        steps: optimizer steps.
        timed: keep glibc's usual heap, whose holes count then.
        keeps_order: keep ZeRO 3's module order, as the launcher does; else it is recorded again in each step.
    """

    family: str
    candidate: StrategyEntry
    micro_batch_size: int
    accumulate: int = 1
    precision: str = "32-true"
    limit_bytes: int | None = None
    steps: int = 5
    timed: bool = False
    keeps_order: bool = True


@dataclass(frozen=True)
class Outcome:
    """The result of a case.

    Attributes:
        lives: whether every rank trained to the end.
        reason: error of the first failed rank; '' if all succeeded.
        step_seconds: time of each optimizer step after the first, of the slowest rank; empty after a failure.
        cpu_seconds: processor time of a step, the mean over steps and ranks; least sensitive to other load.
        peak_bytes: memory that training added to a rank, maximum over the ranks.
    """

    lives: bool
    reason: str
    step_seconds: tuple[float, ...]
    cpu_seconds: float
    peak_bytes: int


@contextlib.contextmanager
def ranks_ready() -> Iterator[ForkServerContext]:
    """A fork server that has imported torch, Lightning and DeepSpeed, so that ranks start fast."""
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    context = multiprocessing.get_context("forkserver")
    # The program too, which each child would import again.
    context.set_forkserver_preload(["__main__", "tests.support.limited_rank_imports"])
    try:
        yield context
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def run_case(context: ForkServerContext, case: Case, folder: Path, *, ranks: int = 2, timeout: float = 180) -> Outcome:
    """Train one case; `folder` is empty and used by this case only."""
    with contextlib.ExitStack() as stack:
        number = f"launcher-rank-{os.getpid()}-{next(_numbers)}"
        groups = [stack.enter_context(memory_group(f"{number}-{r}", case.limit_bytes)) for r in range(ranks)]
        codes = _run_ranks(context, case, folder, groups, timeout)
        full = [group.killed() > 0 for group in groups]
        peaks = [group.peak() for group in groups]
    results: list[dict[str, Any]] = []
    for rank, code in enumerate(codes):
        path = folder / f"rank-{rank}"
        results.append(json.loads(path.read_text()) if path.exists() else {"reason": f"exit code {code}"})
    if any(full):
        return Outcome(False, f"out of memory: ranks {[r for r, k in enumerate(full) if k]}", (), 0.0, max(peaks))
    reason = next((entry["reason"] for entry in results if entry.get("reason")), "")
    if reason:
        return Outcome(False, reason, (), 0.0, 0)
    steps = tuple(max(times) for times in zip(*(e["step_seconds"] for e in results), strict=True))
    return Outcome(True, "", steps, statistics.mean(e["cpu_seconds"] for e in results), max(peaks))


def _run_ranks(
    context: ForkServerContext, case: Case, folder: Path, groups: list[MemoryGroup], timeout: float
) -> list[int | None]:
    """The exit codes; after a failure the other ranks have a few seconds to end."""
    ranks = len(groups)
    processes = [
        context.Process(target=train_rank, args=(case, rank, ranks, str(folder), groups[rank])) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    give_up = time.monotonic() + timeout
    while any(p.is_alive() for p in processes) and time.monotonic() < give_up:
        next((p for p in processes if p.is_alive()), processes[0]).join(0.05)
        if any(p.exitcode for p in processes):
            # After a failure the others wait for the failed rank in a collective, or have failed too.
            for process in processes:
                process.join(5)
            break
    for process in processes:
        if process.is_alive():
            process.kill()
        process.join()
    return [process.exitcode for process in processes]


def train_rank(case: Case, rank: int, ranks: int, folder: str, group: MemoryGroup) -> None:
    """Run one rank, write its result, and exit without the interpreter's cleanup."""
    import torch
    import torch.distributed as dist

    from launcher.planning.oom import is_out_of_memory

    torch.set_num_threads(1)
    libc = ctypes.CDLL(None)
    if not case.timed:
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 10)
        libc.mallopt(_M_TRIM_THRESHOLD, 128 << 10)
    if not case.keeps_order:
        import strategies.deepspeed_strategy as ours

        ours.keep_module_order = lambda engine: None
    code = 1
    results: dict[str, Any]
    with (Path(folder) / f"log-{rank}").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            store = dist.FileStore(str(Path(folder) / "store"), ranks)
            dist.init_process_group(
                "gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=120)
            )  # fmt: skip
            results, code = _train(case, rank, ranks, group), 0
        except Exception as error:  # noqa: BLE001 -- whatever the rank dies of is the outcome
            reason = "out of memory" if is_out_of_memory(error) else f"{type(error).__name__}"
            traceback.print_exc()
            results = {"reason": f"{reason}: {str(error)[:200]}"}
    (Path(folder) / f"rank-{rank}").write_text(json.dumps(results))
    os._exit(code)


def _train(case: Case, rank: int, ranks: int, group: MemoryGroup) -> dict[str, Any]:
    from tests.support.model_families import HELD_OUT, LARGE

    tiny = HELD_OUT["mixer"]
    _fit(tiny.make(), _Batches(tiny, 2, 3 * case.accumulate), case, rank, ranks, 3)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    group.enter()
    entry = {**HELD_OUT, **LARGE}[case.family]
    # Created for each micro batch, as by a loader.
    batches = _Batches(entry, case.micro_batch_size, case.steps * case.accumulate)
    times = _fit(entry.make(), batches, case, rank, ranks, case.steps)[WARM_UP:]
    return {
        "step_seconds": [wall for wall, _ in times],
        "cpu_seconds": statistics.mean(cpu for _, cpu in times),
    }


class _Batches:
    def __init__(self, entry: Any, size: int, count: int) -> None:
        self._entry, self._size, self._count = entry, size, count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self._count):
            yield self._entry.batch(self._size)


def _fit(module: Any, batches: Any, case: Case, rank: int, ranks: int, steps: int) -> list[tuple[float, float]]:
    """Seconds and processor seconds of each optimizer step, under Lightning with the strategy as `fit` builds it."""
    import lightning.pytorch as pl

    from strategies.base import BuildOptions, RankLocation
    from strategies.build import build_strategy, precision_plugin
    from strategies.choice import choose_strategy
    from strategies.deepspeed_config import BatchAndClip, zero_config
    from strategies.precision import Precision
    from strategies.zero import Zero

    name = case.candidate.name
    choice = choose_strategy(
        name, world_size=ranks, device_kind="cpu", accumulate=case.accumulate, model_has_static_graph=False
    )
    location = RankLocation(rank, ranks, rank, ranks, 0, "127.0.0.1", 1)
    deepspeed = None
    if isinstance(case.candidate, Zero):
        planned = BatchAndClip(ranks, case.micro_batch_size, case.accumulate, 0.0)
        deepspeed = zero_config(case.candidate.variant, "cpu", planned)
        deepspeed["zero_optimization"].update(reduce_bucket_size=BUCKET, allgather_bucket_size=BUCKET)
        if case.candidate.variant.stage == 3:
            deepspeed["zero_optimization"].update(stage3_prefetch_bucket_size=BUCKET // 4)
        if case.precision.startswith("bf16"):
            deepspeed["bf16"] = {"enabled": True}
    plugin = precision_plugin(Precision(case.precision), "cpu", strategy=name)
    times: list[tuple[float, float]] = []

    class Clock(pl.Callback):
        began = (0.0, 0.0)

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx % case.accumulate == 0:
                self.began = time.perf_counter(), time.process_time()

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if (batch_idx + 1) % case.accumulate == 0:
                times.append((time.perf_counter() - self.began[0], time.process_time() - self.began[1]))

    precision: dict[str, Any] = {"precision": case.precision} if plugin is None else {"plugins": [plugin]}
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=build_strategy(choice, BuildOptions("cpu", location, 120, deepspeed=deepspeed)),
        max_steps=steps,
        accumulate_grad_batches=case.accumulate,
        callbacks=[Clock()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **precision,
    )
    trainer.fit(module, batches)
    return times
