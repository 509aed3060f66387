"""Saves and restores the random generators of every rank, so dropout continues as in an uninterrupted run."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from launcher.checkpoint.rng_state import capture, restore

KEY = "launcher_random_states"


class RandomStates(pl.Callback):
    """Saves and restores the generators of Python, NumPy, torch and CUDA of all ranks.

    They are restored when the training starts, after the model and the data are created, which may draw from them too.
    Loader workers have other generators, see `launcher.training.data.sample_seeds`.
    """

    def __init__(self, notice: Callable[[str], None]) -> None:
        self._notice = notice
        self._saved: Sequence[Mapping[str, Any]] | None = None
        self._resumed = False

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[KEY] = gather_states(capture(), trainer.strategy.root_device)

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._saved = checkpoint.get(KEY)
        self._resumed = True

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._resumed:
            return
        self._resumed = False
        saved, self._saved = self._saved, None
        if not saved:
            self._notice("the checkpoint has no random states: dropout and augmentation start from the seed")
        elif len(saved) != trainer.world_size:
            self._notice(f"the checkpoint has the random states of {len(saved)} ranks and this run has "
                         f"{trainer.world_size}: dropout and augmentation start from the seed")  # fmt: skip
        elif saved[trainer.global_rank] is None:
            self._notice(f"the random states of rank {trainer.global_rank} were lost with its node: its dropout and "
                         "augmentation start from the seed")  # fmt: skip
        else:
            restore(saved[trainer.global_rank])


def gather_states(own: dict[str, Any], device: torch.device) -> list[dict[str, Any]]:
    """Gather the states of all ranks, in rank order, on every rank; a collective."""
    if not (dist.is_available() and dist.is_initialized()):
        return [own]
    buffer = io.BytesIO()
    torch.save(own, buffer)
    # As bytes: torch would unpickle objects, which can run code.
    data = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8).to(device)
    size = torch.tensor([data.numel()], device=device)
    sizes = [torch.zeros_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size)
    longest = max(int(s) for s in sizes)
    padded = torch.cat([data, data.new_zeros(longest - data.numel())])
    pieces = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(pieces, padded)
    return [_load(piece[: int(length)]) for piece, length in zip(pieces, sizes, strict=True)]


def _load(piece: Tensor) -> dict[str, Any]:
    return torch.load(io.BytesIO(piece.cpu().numpy().tobytes()), weights_only=True)
