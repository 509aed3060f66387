"""The random generators of every rank, in the checkpoint and back: dropout goes on as if nothing had happened."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

KEY = "launcher_random_states"


class RandomStates(pl.Callback):
    """Saves the states of Python's, NumPy's, torch's and CUDA's generators of all ranks, and restores them.

    They are restored when the training begins, after the model and the data were made: that may draw from them too.
    Loader workers have generators of their own, see `launcher.training.loader_seeds`.

    Args:
        notice: told if the checkpoint has no state for this rank.
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
            self._notice("the checkpoint has no random states: dropout and augmentation begin anew from the seed")
        elif len(saved) != trainer.world_size:
            self._notice(f"the checkpoint has the random states of {len(saved)} ranks, and now there are "
                         f"{trainer.world_size}: dropout and augmentation begin anew from the seed")  # fmt: skip
        else:
            restore(saved[trainer.global_rank])


def capture() -> dict[str, Any]:
    """The states of this process's generators, as tensors and numbers, which `weights_only` loads."""
    version, words, gauss = random.getstate()
    # The old generator is what libraries use that say `np.random.rand`.
    name, keys, position, has_gauss, cached = np.random.get_state()
    states: dict[str, Any] = {
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
        "numpy": {"name": str(name), "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
                  "position": int(position), "has_gauss": int(has_gauss), "cached": float(cached)},
        "torch": torch.get_rng_state(),
    }  # fmt: skip
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore(states: Mapping[str, Any]) -> None:
    """The inverse of `capture`."""
    python, numpy = states["python"], states["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state((numpy["name"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def gather_states(own: dict[str, Any], device: torch.device) -> list[dict[str, Any]]:
    """The states of all ranks, in their order, on every rank; a collective.

    Args:
        own: of this rank.
        device: that the process group moves tensors of.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return [own]
    buffer = io.BytesIO()
    torch.save(own, buffer)
    # As bytes, and not as objects: torch would unpickle those, which can run code.
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
