"""The training under nvidia-resiliency-ext's in-process restart: `inprocess_script.py STEPS EVERY ACTIVE RESERVE`.

Without RANK in the environment it starts ACTIVE + RESERVE ranks as plain processes, which the tool needs, and ends when
they have ended; ranks that are killed are not replaced. The tool's defaults hold.
"""

import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import nvidia_resiliency_ext.inprocess as inprocess

# The tool reads the annotation of `call_wrapper`, so annotations of this file must not be texts.


def train(steps: int, every: int, shares: int, call_wrapper: inprocess.CallWrapper | None = None) -> None:
    """One attempt of a rank, in a new process group."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from tests.benchmarks.recovery.plain_loop import Loop

    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    assert call_wrapper is not None
    attempt = call_wrapper.iteration + 1
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["GROUP_PORT"]) + attempt, ranks, rank == 0, timedelta(seconds=60)
    )
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    loop, path, first = Loop(rank, ranks, shares), Path("last.pt"), 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        loop.load(state)
        first = state["step"]
    model = DistributedDataParallel(loop.net)
    for step in range(first, steps):
        losses = loop.losses(model, step)
        loop.adam.zero_grad()
        loop.total(losses).backward()
        loop.adam.step()
        loop.schedule.step()
        loop.record(attempt, step, losses)
        if rank == 0 and (step + 1) % every == 0:
            loop.save(path, step + 1)
    loop.finish()
    dist.destroy_process_group()


def run_rank(steps: int, every: int, active: int) -> None:
    """Wrap the training as the tool's guide does."""
    inprocess.Wrapper(
        rank_assignment=inprocess.Compose(
            inprocess.rank_assignment.MaxActiveWorldSize(active), inprocess.rank_assignment.ShiftRanks()
        ),
    )(train)(steps, every, active)


def main() -> int:
    steps, every, active, reserve = map(int, sys.argv[1:])
    if "RANK" in os.environ:
        run_rank(steps, every, active)
        return 0
    ranks = active + reserve
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, *sys.argv],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank),
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GROUP_PORT": str(port + 20)},
        )
        for rank in range(ranks)
    ]  # fmt: skip
    codes = [process.wait() for process in processes]
    return 0 if sum(code == 0 for code in codes) >= ranks - 1 else 1


if __name__ == "__main__":
    sys.exit(main())
