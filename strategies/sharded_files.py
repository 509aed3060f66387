"""Reads torch's distributed checkpoints without running code that the pickles in them name."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, load
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from typing_extensions import override

METADATA = ".metadata"
_CLASSES = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))),
    "pathlib": ("PosixPath",),
    "pathlib._local": ("PosixPath",),
    "collections": ("OrderedDict",),
}  # fmt: skip


class _MetadataUnpickler(pickle.Unpickler):
    @override
    def find_class(self, module: str, name: str) -> Any:
        if name not in _CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of a checkpoint's metadata")
        return super().find_class(module, name)


def read_metadata(path: Path) -> Metadata:
    """The names, shapes and places of all values."""
    with (path / METADATA).open("rb") as file:
        return _MetadataUnpickler(file).load()


class SafeReader(FileSystemReader):
    """torch's reader, which would run code that `.metadata` names."""

    @override
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return read_metadata(Path(self.path))


class SafePlanner(DefaultLoadPlanner):
    """torch's planner, which would run code that a value names."""

    @override
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        checked = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), checked)
        checked.seek(0)
        super().load_bytes(read_item, checked)


def read_all(path: Path) -> dict[str, Any]:
    """All values of a checkpoint, complete, on this process alone."""
    metadata = read_metadata(path)
    flat: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        if isinstance(entry, TensorStorageMetadata)
        else None
        for name, entry in metadata.state_dict_metadata.items()
    }
    load(
        flat,
        storage_reader=SafeReader(path),
        planner=SafePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
        no_dist=True,
    )
    return nest(flat, metadata)


def nest(flat: dict[str, Any], metadata: Metadata) -> dict[str, Any]:
    """The nested state dict, by the path of each value; of lists too."""
    nested: dict[str, Any] = {}
    for name, path in metadata.planner_data.items():
        if name not in flat:
            continue
        place: Any = nested
        for key, following in zip(path, (*path[1:], None), strict=True):
            value = flat[name] if following is None else [] if isinstance(following, int) else {}
            if isinstance(place, list):
                place.extend([None] * (key + 1 - len(place)))
                if place[key] is None:
                    place[key] = value
            else:
                place.setdefault(key, value)
            place = place[key]
    return nested


def to_plain_optimizer(saved: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A state dict by names as `Optimizer.state_dict` has it, and the names in the order of the numbers."""
    groups = [dict(group) for group in saved["param_groups"]]
    names: list[str] = []
    for group in groups:
        own = list(group["params"])
        group["params"] = list(range(len(names), len(names) + len(own)))
        names += own
    state = saved.get("state", {})
    return {"state": {n: state[name] for n, name in enumerate(names) if name in state}, "param_groups": groups}, names
