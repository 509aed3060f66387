"""Saves the complete state of a survivor as of its last step, as a checkpoint that the next attempt resumes from."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist

from launcher.checkpoint.atomic_io import AtomicCheckpointIO
from launcher.checkpoint.reader import Trust
from launcher.runs.kept_state import claim_path, record_path, state_path
from launcher.training.loops.position import KEY as POSITION_KEY
from launcher.training.loops.position import Position, rewind_position
from launcher.training.survivors.callback_states import CallbackStates, count_tensor_bytes
from launcher.training.survivors.own_state import METRICS, RANDOM, restore_buffers, unpack
from launcher.training.survivors.record import Record, find_record

# A file has more than its tensors.
_MORE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class KeptFolders:
    """Where the ranks keep what the next attempt needs.

    Attributes:
        records: of this node's ranks, in shared memory.
        states: where a survivor saves the complete state.
        on_disk: used instead if there is no space in `states`.
    """

    records: Path
    states: Path
    on_disk: Path


def save_state(
    trainer: pl.Trainer,
    folders: KeptFolders,
    position: Position,
    callbacks: CallbackStates,
    silent: tuple[type[pl.Callback], ...],
) -> str | None:
    """Save the state at `position` unless another survivor does it; return why that is not possible.

    Args:
        trainer: its objects have the state of that position, but for what its records and `callbacks` have.
        folders: with the records of this node's ranks.
        position: where the next attempt continues.
        callbacks: their states as of the position.
        silent: callbacks whose `on_save_checkpoint` is not called.

    Raises:
        Exception: of the user's code for checkpoints.
        StorageError: there is no space on the disk either.
    """
    batches = position.total
    records = [find_record(record_path(folders.records, rank), batches) for rank in range(trainer.world_size)]
    own = records[trainer.global_rank]
    if own is None:
        return "its record is damaged"
    if not _claim(folders.states, batches):
        return None
    # Nothing below may wait for the lost rank.
    if dist.is_initialized():
        dist.destroy_process_group()
    # DDP takes the buffers of rank zero.
    restore_buffers(trainer.lightning_module, (records[0] or own).content)
    checkpoint = _dump(trainer, silent)
    callbacks.put_into(checkpoint)
    fit_state: dict[str, Any] = checkpoint["loops"]["fit_loop"]["state_dict"]
    fit_state[POSITION_KEY] = rewind_position(position).to_dict()
    if "loader_states" in fit_state:
        return "the position of a loader with its own state is not known"
    checkpoint |= _gathered(records)
    folder = folders.states
    if shutil.disk_usage(folder).free < count_tensor_bytes(checkpoint) + _MORE_BYTES:
        folder = folders.on_disk
    AtomicCheckpointIO(Trust(folder)).save_checkpoint(checkpoint, state_path(folder, batches))
    return None


def _gathered(records: list[Record | None]) -> Mapping[str, Any]:
    """The values of all ranks, as a checkpoint has them; None for a rank on another node."""
    return {key: [None if each is None else unpack(each.content[key]) for each in records] for key in (RANDOM, METRICS)}


def add_own_record(checkpoint: dict[str, Any], path: Path, rank: int) -> None:
    """Add what this rank has recorded itself to a state that a survivor on another node has saved without it."""
    position: Mapping[str, Any] = checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict", {})
    batches = position.get(POSITION_KEY, {}).get("total")
    for key in (RANDOM, METRICS):
        values: Any = checkpoint.get(key)
        if isinstance(values, list) and len(values) > rank and values[rank] is None:
            own = None if batches is None else find_record(path, batches)
            if own is not None:
                values[rank] = unpack(own.content[key])


def _dump(trainer: pl.Trainer, silent: tuple[type[pl.Callback], ...]) -> dict[str, Any]:
    connected: Any = trainer
    callbacks = connected.callbacks
    connected.callbacks = [each for each in callbacks if not isinstance(each, silent)]
    try:
        return connected._checkpoint_connector.dump_checkpoint(weights_only=False)
    finally:
        connected.callbacks = callbacks


def _claim(folder: Path, batches: int) -> bool:
    """Whether this rank is the first survivor of this step, which saves for all."""
    folder.mkdir(mode=0o700, exist_ok=True)
    try:
        os.close(os.open(claim_path(folder, batches), os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600))
    except FileExistsError:
        return False
    return True
