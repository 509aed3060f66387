"""Lightning's way to the disk for checkpoints: nothing half written ever has a checkpoint's name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from typing_extensions import override

from launcher.checkpoint_files import publish, remove


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, syncs it, notes its hashes, and only then gives it its name.

    Lightning's own writes whole files too, but does not wait for the disk and keeps no hash.

    Args:
        run: the run's directory, in which files are private; elsewhere the user's umask decides. None: all are private.
    """

    def __init__(self, run: Path | None = None) -> None:
        super().__init__()
        self._run = run

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Save to a local path.

        Args:
            checkpoint: what to save.
            path: its name.
            storage_options: none are known.

        Raises:
            OSError: the disk is full or read-only; an earlier checkpoint of that name is still there.
        """
        target = Path(path).absolute()
        private = self._run is None or target.is_relative_to(self._run)
        target.parent.mkdir(mode=0o700 if private else 0o777, parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.tmp")
        step = checkpoint.get("global_step")
        try:
            with open(temporary, "wb", opener=_private if private else None) as file:
                torch.save(checkpoint, file)
            publish(temporary, target, step if isinstance(step, int) else None)
        except BaseException:  # Ctrl-C too leaves no half-written checkpoint; raised on
            temporary.unlink(missing_ok=True)
            raise

    @override
    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, loc: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Load; nothing in the file is run, whoever asks."""
        return super().load_checkpoint(path, map_location, weights_only=True)

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove it with what was noted of it."""
        remove(Path(path))


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
