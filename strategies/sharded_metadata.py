"""Reads and checks `.metadata` of torch's distributed checkpoints, a pickle, without running what it names."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from typing_extensions import override

from strategies.base import StrategyError

METADATA, META = ".metadata", "meta.pt"
_DCP = "torch.distributed.checkpoint.metadata"
_OLD = "torch.distributed._shard.sharded_tensor.metadata"
# Replaced by a `_Record` of what the pickle has of them.
_RECORDS = {
    *((_DCP, name) for name in ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
                                "TensorProperties", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    *((_OLD, name) for name in ("TensorProperties", "MEM_FORMAT_ENCODING")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
    # How some versions of Python pickle a member of an enum.
    ("builtins", "getattr"),
}  # fmt: skip
_PLAIN = {("torch", "Size"): tuple, ("collections", "OrderedDict"): dict}


class DamagedCheckpointError(StrategyError):
    """A checkpoint folder cannot be read: its path, the file in it, and the reason."""

    def __init__(self, folder: Path, file: str, reason: str) -> None:
        super().__init__(f"resume: {folder} is damaged: {file} {reason}; give another checkpoint")
        self.folder, self.file, self.reason = folder, file, reason


class _Record:
    """What a pickle has of an object, instead of the object."""

    args: Any = ()
    state: Any = None

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def field(self, name: str, kind: type | tuple[type, ...]) -> Any:
        """A field of a dataclass."""
        found = self.state.get(name) if isinstance(self.state, dict) else None
        return _checked(found, kind, name)


class _RecordUnpickler(pickle.Unpickler):
    """Creates records, tuples, dicts and torch's types; a file may change its own records only."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self._made: dict[tuple[str, str], type] = {}

    @override
    def find_class(self, module: str, name: str) -> Any:
        key = (module, name)
        if key in _PLAIN:
            return _PLAIN[key]
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if key not in _RECORDS:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of a checkpoint's metadata")
        # A new class for each file: a pickle can set the attributes of a class too.
        return self._made.setdefault(key, type(name, (_Record,), {}))


def read_metadata(folder: Path) -> Metadata:
    """The names, shapes and places of all values, after a check that the folder's files have them.

    Raises:
        DamagedCheckpointError: a file is missing, too short or a link, or the metadata are not of such a checkpoint.
    """
    file = folder / METADATA
    _check_file(folder, METADATA)
    try:
        with file.open("rb") as stream:
            metadata = _make_metadata(_RecordUnpickler(stream).load())
    except Exception as error:  # a hostile or damaged pickle may raise any error
        raise DamagedCheckpointError(folder, METADATA, f"cannot be read: {str(error)[:200]}") from error
    _check_parts(folder, metadata)
    return metadata


def _make_metadata(found: Any) -> Metadata:
    entries = {
        _checked(name, str, "a name"): _make_entry(entry)
        for name, entry in _record(found, "Metadata").field("state_dict_metadata", dict).items()
    }
    places = found.field("storage_data", dict)
    storage = {_make_index(index): _make_place(place) for index, place in places.items()}
    paths = found.field("planner_data", (dict, type(None))) or {}
    planner = {_checked(name, str, "a name"): _make_path(path) for name, path in paths.items()}
    if missing := entries.keys() - planner.keys():
        raise ValueError(f"{min(missing)} has no path")
    return Metadata(entries, planner, storage, StorageMeta())


def _make_entry(found: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if type(found).__name__ == "BytesStorageMetadata":
        return BytesStorageMetadata()
    entry = _record(found, "TensorStorageMetadata")
    properties = entry.field("properties", _Record)
    dtype = properties.state[0] if isinstance(properties.state, tuple) else properties.field("dtype", torch.dtype)
    made = TensorProperties(dtype=_checked(dtype, torch.dtype, "dtype"))
    chunks = [
        ChunkStorageMetadata(_size(each.field("offsets", tuple)), _size(each.field("sizes", tuple)))
        for each in (_record(chunk, "ChunkStorageMetadata") for chunk in entry.field("chunks", list))
    ]
    return TensorStorageMetadata(made, _size(entry.field("size", tuple)), chunks)


def _make_index(found: Any) -> MetadataIndex:
    index = _record(found, "MetadataIndex")
    offset, number = index.field("offset", (tuple, type(None))), index.field("index", (int, type(None)))
    return MetadataIndex(index.field("fqn", str), None if offset is None else _size(offset), number)


def _make_place(found: Any) -> _StorageInfo:
    place = _record(found, "_StorageInfo")
    path = place.field("relative_path", str)
    if Path(path).name != path or path in ("", ".", ".."):
        raise ValueError(f"{path!r} is not the name of a file in the folder")
    offset, length = place.field("offset", int), place.field("length", int)
    if offset < 0 or length < 0:
        raise ValueError(f"{length} bytes at {offset} of {path}")
    state: Mapping[str, Any] = place.state
    if state.get("transform_descriptors"):
        raise ValueError(f"{path} is compressed or encrypted, which is not supported")
    return _StorageInfo(path, offset, length)


def _make_path(found: Any) -> tuple[str | int, ...]:
    path = _checked(found, tuple, "a path")
    if not path or not isinstance(path[0], str):
        raise ValueError(f"{path!r} is not the path of a value")
    return tuple(_checked(part, (str, int), "a part of a path") for part in path)


def _record(found: Any, name: str) -> _Record:
    if not isinstance(found, _Record) or type(found).__name__ != name:
        raise TypeError(f"it has a {type(found).__name__} in place of a {name}")
    return found


def _checked(found: Any, kind: type | tuple[type, ...], what: str) -> Any:
    if not isinstance(found, kind) or isinstance(found, bool):
        raise TypeError(f"{what} is a {type(found).__name__}")
    return found


def _size(found: tuple[Any, ...]) -> torch.Size:
    if not all(type(each) is int and each >= 0 for each in found):
        raise ValueError(f"{found!r} is not a size")
    return torch.Size(found)


def _check_file(folder: Path, name: str) -> int:
    """The size of a file in the folder; an error if it is missing or a link."""
    file = folder / name
    if file.is_symlink():
        raise DamagedCheckpointError(folder, name, "is a link, which could refer to any file")
    if not file.is_file():
        raise DamagedCheckpointError(folder, name, "is missing")
    return file.stat().st_size


def _check_parts(folder: Path, metadata: Metadata) -> None:
    """Check that the files have every value in its size, which also limits what reading them can allocate."""
    stored: Mapping[MetadataIndex, _StorageInfo] = metadata.storage_data
    needed: dict[str, int] = {}
    for place in stored.values():
        needed[place.relative_path] = max(needed.get(place.relative_path, 0), place.offset + place.length)
    sizes = {name: _check_file(folder, name) for name in sorted(needed)}
    for name, size in needed.items():
        if sizes[name] < size:
            raise DamagedCheckpointError(folder, name, f"has {sizes[name]} bytes of {size}")
    _check_file(folder, META)
    for name, entry in metadata.state_dict_metadata.items():
        problem = _entry_problem(name, entry, stored)
        if problem is not None:
            raise DamagedCheckpointError(folder, METADATA, f"does not match the files: {name} {problem}")


def _entry_problem(name: str, entry: Any, stored: Mapping[MetadataIndex, _StorageInfo]) -> str | None:
    if isinstance(entry, BytesStorageMetadata):
        return None if MetadataIndex(name) in stored else "is in no file"
    covered = 0
    for chunk in entry.chunks:
        if not len(chunk.offsets) == len(chunk.sizes) == len(entry.size):
            return f"has a part of shape {tuple(chunk.sizes)}, but the shape {tuple(entry.size)}"
        place = stored.get(MetadataIndex(name, chunk.offsets))
        if place is None:
            return f"lacks its part at {tuple(chunk.offsets)}"
        numel = chunk.sizes.numel()
        if place.length < numel * entry.properties.dtype.itemsize:
            return f"has {place.length} bytes for {numel} elements of {entry.properties.dtype}"
        ends = zip(chunk.offsets, chunk.sizes, entry.size, strict=True)
        if any(offset + size > total for offset, size, total in ends):
            return f"has a part at {tuple(chunk.offsets)} outside of its shape {tuple(entry.size)}"
        covered += numel
    if covered != entry.size.numel():
        return f"has {covered} of {entry.size.numel()} elements"
    return None
