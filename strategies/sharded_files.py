"""Reads torch's distributed checkpoints without running code that the pickles in them name."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import (
    CheckpointException,
    DefaultLoadPlanner,
    FileSystemReader,
    FileSystemWriter,
    load,
    save,
)
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from typing_extensions import override

from strategies.sharded_metadata import METADATA, DamagedCheckpointError


class _SafeReader(FileSystemReader):
    """torch's reader, which would run code that `.metadata` names."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(path)
        self._metadata = metadata

    @override
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


class _SafePlanner(DefaultLoadPlanner):
    """torch's planner, which would run code that a value names."""

    @override
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, map_location="cpu", weights_only=True)


def read_values(path: Path, metadata: Metadata, values: dict[str, Any], *, alone: bool = False) -> None:
    """Read values by their names; tensors are read in place, of a DTensor this rank's shard.

    Args:
        path: the folder.
        metadata: from `read_metadata`.
        values: tensors for the values that are tensors, None for others, which are set.
        alone: whether only this process reads; else all ranks call this.

    Raises:
        DamagedCheckpointError: a value cannot be read.
    """
    planner = _SafePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with _damage_errors(path), warnings.catch_warnings():
        # That one process reads alone.
        warnings.simplefilter("ignore")
        load(values, storage_reader=_SafeReader(path, metadata), planner=planner, no_dist=alone)


@contextlib.contextmanager
def own_errors() -> Iterator[None]:
    """Replace torch's error, which collects those of all ranks, by this rank's, or else by the first one."""
    try:
        yield
    except CheckpointException as error:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        raise error.failures.get(rank, next(iter(error.failures.values())))[0] from None


@contextlib.contextmanager
def _damage_errors(path: Path) -> Iterator[None]:
    """Describe errors of a damaged file; those of the disk and the launcher's own stay as they are."""
    try:
        with own_errors():
            yield
    except Exception as error:  # a damaged file may raise any error
        if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in ("launcher", "strategies"):
            raise
        reason = f"cannot be read: {str(error).partition(chr(10))[0]}"
        raise DamagedCheckpointError(path, "a file", reason) from error


def empty_value(entry: Any) -> Any:
    """What a value of the metadata is read into, complete on the CPU."""
    return torch.empty(entry.size, dtype=entry.properties.dtype) if isinstance(entry, TensorStorageMetadata) else None


def read_all(path: Path, metadata: Metadata, only: str | None = None) -> dict[str, Any]:
    """All values of a checkpoint, or those under one key, complete, on this process alone."""
    paths: Mapping[str, tuple[str | int, ...]] = metadata.planner_data
    entries = metadata.state_dict_metadata.items()
    flat = {name: empty_value(entry) for name, entry in entries if only in (None, paths[name][0])}
    read_values(path, metadata, flat, alone=True)
    try:
        return nest(flat, metadata)
    except (AttributeError, TypeError) as error:
        raise DamagedCheckpointError(path, METADATA, f"has paths that exclude each other: {error}") from error


def write_all(path: Path, values: Mapping[str, Any]) -> None:
    """Write a checkpoint's values as one part, on this process alone."""
    with own_errors(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(dict(values), storage_writer=FileSystemWriter(path), no_dist=True)


def nest(flat: Mapping[str, Any], metadata: Metadata) -> dict[str, Any]:
    """The nested state dict, by the path of each value; of lists too."""
    nested: dict[str, Any] = {}
    paths: Mapping[str, tuple[str | int, ...]] = metadata.planner_data
    for name, value in flat.items():
        place: Any = nested
        path = paths[name]
        for part in path[:-1]:
            place = place.setdefault(part, {})
        place[path[-1]] = value
    return {key: _with_lists(value) for key, value in nested.items()}


def _with_lists(value: Any) -> Any:
    """Dicts with numbers as keys are lists; those that were dicts have text as keys."""
    if not isinstance(value, dict):
        return value
    made = {key: _with_lists(each) for key, each in value.items()}
    if made and all(isinstance(key, int) for key in made):
        return [made[key] for key in sorted(made)]
    return made


def to_plain_optimizer(saved: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A state dict by names as `Optimizer.state_dict` has it, and the names in the order of the numbers."""
    groups = [dict(group) for group in saved["param_groups"]]
    names: list[str] = []
    for group in groups:
        own = list(group["params"])
        group["params"] = list(range(len(names), len(names) + len(own)))
        names += own
    state = saved.get("state", {})
    return {"state": {n: state[name] for n, name in enumerate(names) if name in state}, "param_groups": groups}, names
