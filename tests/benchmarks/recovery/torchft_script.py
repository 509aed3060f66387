"""The training under torchft, each rank a replica group: `torchft_script.py STEPS RANKS HEARTBEAT_MS MIN_REPLICAS`.

Without a rank in the environment it starts the lighthouse and the ranks, and replaces a killed rank at once, as its
examples' supervisor does. A joining replica gets its state from a living one.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path


def run_rank(steps: int, minimum: int) -> None:
    """The loop of torchft's DDP example."""
    import torch.distributed as dist
    import torchft

    from tests.benchmarks.recovery.plain_loop import Loop

    rank, ranks = int(os.environ["REPLICA"]), int(os.environ["REPLICAS"])
    loop = Loop(rank, ranks, ranks)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    manager = torchft.Manager(
        pg=torchft.ProcessGroupGloo(timeout=timedelta(seconds=20)),
        load_state_dict=loop.load,
        state_dict=loop.state,
        min_replica_size=minimum,
        store_addr="127.0.0.1",
        store_port=store.port,
        rank=0,
        world_size=1,
        replica_id=f"replica_{rank}",
    )
    model = torchft.DistributedDataParallel(manager, loop.net)
    optimizer = torchft.Optimizer(manager, loop.adam)
    while manager.current_step() < steps:
        optimizer.zero_grad()
        step = manager.current_step()
        losses = loop.losses(model, step)
        loop.total(losses).backward()
        optimizer.step()
        if manager.current_step() > step:
            loop.schedule.step()
            # What is committed counts under the step that the quorum agreed on.
            loop.record(manager._quorum_id, manager.current_step() - 1, losses)
    loop.finish()
    manager.shutdown(wait=False)


def main() -> int:
    steps, ranks, heartbeat, minimum = map(int, sys.argv[1:])
    if "REPLICA" in os.environ:
        run_rank(steps, minimum)
        # torchft's server threads would keep the process alive.
        sys.stdout.flush()
        os._exit(0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    lighthouse = subprocess.Popen(
        [str(Path(sys.executable).with_name("torchft_lighthouse")), "--bind", f"127.0.0.1:{port}", "--min_replicas",
         str(minimum), "--heartbeat_timeout_ms", str(heartbeat), "--join_timeout_ms", "60000"]
    )  # fmt: skip

    def start(rank: int) -> subprocess.Popen[bytes]:
        env = {**os.environ, "REPLICA": str(rank), "REPLICAS": str(ranks),
               "TORCHFT_LIGHTHOUSE": f"http://127.0.0.1:{port}"}  # fmt: skip
        return subprocess.Popen([sys.executable, *sys.argv], env=env)

    processes = [start(rank) for rank in range(ranks)]
    restarts = 3
    while any(process.poll() != 0 for process in processes):
        for rank, process in enumerate(processes):
            if process.poll() not in (None, 0):
                if not restarts or any(other.poll() == 0 for other in processes):
                    # Nobody is left to train with.
                    lighthouse.kill()
                    return 0 if any(other.poll() == 0 for other in processes) else 1
                restarts -= 1
                processes[rank] = start(rank)
        if any(process.poll() == 0 for process in processes):
            # The others are in their last step, or still starting.
            give_up = time.monotonic() + 10
            while any(process.poll() is None for process in processes) and time.monotonic() < give_up:
                time.sleep(0.05)
            for process in processes:
                process.kill()
            lighthouse.kill()
            return 0
        time.sleep(0.01)
    lighthouse.kill()
    return 0


if __name__ == "__main__":
    sys.exit(main())
