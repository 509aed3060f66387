"""Planning a 7B-parameter transformer: seconds and memory of this machine, for 1,024 and 100,000 GPUs.

    python -m tests.benchmarks.planning [--gpus 1024 100000] [--repeats 3]

Each plan is a separate process; `plan` excludes the import of torch and Lightning, `command` includes it.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from launcher.demo.model import DemoGPT

REPOSITORY = Path(__file__).resolve().parents[2]


class Tokens(Dataset[tuple[Tensor, Tensor]]):
    """2,048 tokens a sample."""

    def __len__(self) -> int:
        return 1 << 20

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        ids = torch.zeros(2048, dtype=torch.int64)
        return ids, ids


class TokenData(pl.LightningDataModule):
    def __init__(self, batch_size: int = 1) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return DataLoader(Tokens(), batch_size=self.batch_size)


class SevenBillion(DemoGPT):
    def __init__(self) -> None:
        super().__init__(vocab_size=32_000, block_size=2048, n_layer=32, n_head=32, n_embd=4096)


def plan_once(gpus: int) -> None:
    """Plan once, in one process."""
    from launcher.config.loading import load_config
    from launcher.hardware.target_machines import read_options
    from launcher.planning.dry_run import plan_here

    arguments = ["--model", f"{__spec__.name}.SevenBillion", "--data", f"{__spec__.name}.TokenData"]
    config = load_config([], [*arguments, "--global-batch-size", str(gpus)])
    options = argparse.Namespace(gpus=gpus, gpus_per_node=8, gpu="h100", gpu_memory=None)
    import launcher.planning.profile  # noqa: F401 -- counted as an import, not as planning

    began = time.perf_counter()
    found = plan_here(config, "here", read_options(options))
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    print(json.dumps({"plan": seconds, "gib": peak, "pick": (found.plan.memory or {}).get("pick")}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1024, 100_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--once", type=int)
    options = parser.parse_args()
    if options.once:
        plan_once(options.once)
        return
    for gpus in options.gpus:
        for _ in range(options.repeats):
            began = time.perf_counter()
            arguments = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.planning", "--once", str(gpus)]
            output = subprocess.run(
                arguments, cwd=REPOSITORY, check=True, capture_output=True, text=True, timeout=300
            ).stdout
            found = json.loads(output.splitlines()[-1])
            whole = time.perf_counter() - began
            print(f"{gpus} GPUs: plan {found['plan']:.2f} s (target at most 5), command {whole:.2f} s, "
                  f"{found['gib']:.2f} GiB (target at most 4), {found['pick']}")  # fmt: skip


if __name__ == "__main__":
    main()
