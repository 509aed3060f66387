"""The demo under a bare Lightning Trainer: the peer of `throughput.py`. Run it with torchrun.

As lean as Lightning gets: no logger, no progress bar, no checkpoint, no validation.
"""

from __future__ import annotations

import os
import sys

import lightning.pytorch as pl
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from launcher.demo.model import DemoGPT, DemoText
from tests.benchmarks.clock import Clock


class ShardedGPT(DemoGPT):
    """The demo as a user of plain Lightning writes it for FSDP2."""

    def configure_model(self) -> None:
        assert self.device_mesh is not None
        mesh = self.device_mesh["data_parallel"]
        for block in self.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self, mesh=mesh)


def main(steps: int, strategy: str = "ddp") -> None:
    ranks = int(os.environ["WORLD_SIZE"])
    pl.seed_everything(42, workers=True, verbose=False)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1)
        if strategy == "fsdp2"
        else "ddp"
        if ranks > 1
        else "auto",
        max_steps=steps,
        limit_val_batches=0,
        gradient_clip_val=1.0,
        log_every_n_steps=10,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[Clock()],
    )
    trainer.fit(ShardedGPT() if strategy == "fsdp2" else DemoGPT(), datamodule=DemoText(batch_size=32 // ranks))


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
