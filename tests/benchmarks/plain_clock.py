"""A small DDP script of torch alone, which writes the time of each step like `launch_clock.Marks`."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def main() -> None:
    """Train until STEPS."""
    marks = Path(os.environ["MARKS"])
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = DistributedDataParallel(
        torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    Path(f"{marks}-pid-{rank}").write_text(str(os.getpid()))
    for step in range(1, int(os.environ["STEPS"]) + 1):
        optimizer.zero_grad()
        model(torch.randn(8, 32)).square().mean().backward()
        optimizer.step()
        if rank == 0:
            with marks.open("a") as file:
                file.write(f"{time.time()} {step} {os.getpid()}\n")
        time.sleep(float(os.environ["PAUSE"]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
