"""A CheckpointIO plugin that writes atomically: no partly written file has the name of a checkpoint."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from typing_extensions import override

from launcher.checkpoint.background import BackgroundWriter
from launcher.checkpoint.manifest import publish, remove_checkpoint
from launcher.checkpoint.read_back import ReadBack
from launcher.checkpoint.reader import Trust, read_file
from launcher.checkpoint.secrets import hide_hyperparameters
from launcher.checkpoint.snapshot import HostMemoryError, Snapshot, SnapshotMemory
from launcher.checkpoint.storage import explain_unsaveable, explained_writes, save_to_file


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint under a temporary name, syncs it, writes its hashes and renames it.

    Lightning's plugin is atomic too, but does not sync the file and writes no hashes.
    """

    def __init__(
        self,
        trust: Trust = Trust(),  # noqa: B008 -- frozen
        read_back: ReadBack | None = None,
        background: BackgroundWriter | None = None,
        *,
        maps_files: bool = False,
    ) -> None:
        """Make a plugin.

        Args:
            trust: the checkpoints that may run code when they are loaded.
            read_back: checks what was written.
            background: writes the checkpoints that are saved while it accepts one.
            maps_files: leave tensors on the disk until they are used, so that each rank reads its shards only.
        """
        self._trust = trust
        self._read_back = read_back
        self._background = BackgroundWriter() if background is None else background
        self._memory = SnapshotMemory()
        self._maps_files = maps_files

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Save to a local path, or to a URL as Lightning does, without hashes.

        If the background writer accepts it, this returns when a copy of the state is in host memory.

        Raises:
            StorageError: the disk is full or not writable; an earlier checkpoint of that name is kept.
            TrainingError: names a part of it that cannot be pickled.
        """
        if not self._background.accepts:
            self._background.wait()
        if not _is_local_file_protocol(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target, run = _local(path), self._trust.run
        # Outside the run directory the user's umask applies.
        private = run is None or target.is_relative_to(run.absolute())
        with explained_writes(target.parent):
            target.parent.mkdir(mode=0o700 if private else 0o777, parents=True, exist_ok=True)
        step = checkpoint.get("global_step")
        # Lightning does not call the callbacks when it saves weights only.
        hide_hyperparameters(checkpoint)
        write = functools.partial(self._write, target=target, step=step if isinstance(step, int) else None)
        if (snapshot := self._take_snapshot(checkpoint)) is not None:
            self._background.start(functools.partial(write, snapshot, private=private))
        else:
            write(checkpoint, private=private)

    def _take_snapshot(self, checkpoint: dict[str, Any]) -> Snapshot | None:
        """A copy of the state if it may be written in the background."""
        if not self._background.accepts:
            return None
        try:
            return self._memory.take(checkpoint)
        except HostMemoryError as error:
            self._background.decline(f"the host has too little memory for a copy of the state ({error})")
            return None
        except Exception as error:
            explain_unsaveable(error, checkpoint)
            raise

    def _write(self, content: Any, *, target: Path, step: int | None, private: bool) -> None:
        temporary = target.with_name(f".{target.name}.tmp")
        try:
            save_to_file(content, temporary, _private if private else None)
            if self._read_back is not None:
                self._read_back(temporary, target)
            with explained_writes(target.parent):
                publish(temporary, target, step, with_manifest=private)
        except BaseException:  # Ctrl-C too leaves no partly written checkpoint; raised on
            temporary.unlink(missing_ok=True)
            raise

    @override
    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, loc: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Load from a local path or a URL. Code from a URL runs only if all checkpoints are trusted.

        Raises:
            ResumeError: not a checkpoint, a damaged one, or one whose loading would run untrusted code.
        """
        self._background.wait()
        if not _is_local_file_protocol(path):
            safe = weights_only is not False and not self._trust.everywhere
            return super().load_checkpoint(path, map_location, weights_only=safe)
        trust = Trust(everywhere=True) if weights_only is False else self._trust
        return read_file(_local(path), trust, map_location=map_location, mmap=self._maps_files)

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        if _is_local_file_protocol(path):
            remove_checkpoint(_local(path))
        else:
            super().remove_checkpoint(path)

    @override
    def teardown(self) -> None:
        try:
            self._background.wait()
        finally:
            self._memory = SnapshotMemory()


def _local(path: str | Path) -> Path:
    return Path(LocalFileSystem._strip_protocol(str(path))).absolute()  # pyright: ignore[reportPrivateUsage]


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)
