"""Checkpoints of sharded trainings: a folder that torch's distributed checkpoints and Lightning can read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from launcher.checkpoint.precision import RECORD
from launcher.checkpoint.reader import Trust, as_mapping, guarded_loads, read_file
from launcher.core.errors import ResumeError
from strategies.sharded_files import read_all, to_plain_optimizer, write_all
from strategies.sharded_meta import OTHERS, allocate_modules, put_back, put_structures, split_content
from strategies.sharded_metadata import META, METADATA, DamagedCheckpointError, read_metadata


def is_sharded_folder(path: Path) -> bool:
    """Whether a checkpoint is such a folder, maybe a damaged one."""
    return path.is_dir() and any((path / name).is_file() or (path / name).is_symlink() for name in (METADATA, META))


def check_sharded_folder(path: Path) -> Metadata:
    """The names, shapes and places of all values, if the files have them.

    Raises:
        ResumeError: a file is missing, too short or a link, or the metadata are not of such a checkpoint.
    """
    with _explained():
        return read_metadata(path)


def read_sharded_outline(path: Path, trust: Trust | None = None, *, outline: bool = False) -> Mapping[str, Any]:
    """The part that Lightning saved, with meta tensors of the right shapes instead of the weights.

    Raises:
        ResumeError: damaged, or its loading would run untrusted code.
    """
    metadata = check_sharded_folder(path)
    state = {
        str(metadata.planner_data[name][1]): torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for name, entry in metadata.state_dict_metadata.items()
        if metadata.planner_data[name][0] == "state_dict" and isinstance(entry, TensorStorageMetadata)
    }
    meta = as_mapping(read_file(path / META, trust, of=path, outline=outline), path)
    return {**meta, "state_dict": state, **({"optimizer_states": []} if _has_optimizers(meta) else {})}


def read_sharded(path: Path, trust: Trust | None = None) -> dict[str, Any]:
    """The content as Lightning would have saved it in one file. Raises as `read_sharded_outline`."""
    metadata = check_sharded_folder(path)
    meta = as_mapping(read_file(path / META, trust, of=path), path)
    with guarded_loads(path, trust), _explained():
        values = read_all(path, metadata)
    allocate_modules(meta)
    made = put_back(meta, values.get("state_dict", {}), values.get(OTHERS, {}))
    if _has_optimizers(meta):
        keys = [key for n in range(len(values)) if (key := f"optimizer_{n}") in values]
        made["optimizer_states"] = [to_plain_optimizer(put_structures(meta, key, values[key]))[0] for key in keys]
    return made


def read_sharded_weights(path: Path) -> dict[str, Any]:
    """The weights, without the other tensors. Raises as `read_sharded_outline`."""
    metadata = check_sharded_folder(path)
    meta = as_mapping(read_file(path / META, None, of=path), path)
    with guarded_loads(path, None), _explained():
        return put_back(meta, read_all(path, metadata, "state_dict").get("state_dict", {}), {})["state_dict"]


def write_sharded(content: Mapping[str, Any], path: Path) -> None:
    """Write the content of one file as a new folder, whose tensors are read in parts.

    The names of an optimizer's parameters are those in `parameter_names`, else numbers.
    """
    names = content.get("parameter_names")
    states = [_by_names(state, names) for state in content.get("optimizer_states", [])]
    made = {key: value for key, value in content.items() if key not in ("parameter_names", "optimizer_states")}
    tensors, meta = split_content({**made, "optimizer_states": states})
    path.mkdir()
    write_all(path, tensors)
    torch.save(meta, path / META)


def _by_names(state: Mapping[str, Any], names: Sequence[str] | None) -> dict[str, Any]:
    def name(number: int) -> str:
        return str(number) if names is None else names[number]

    groups = [{**group, "params": [name(number) for number in group["params"]]} for group in state["param_groups"]]
    return {"state": {name(number): values for number, values in state["state"].items()}, "param_groups": groups}


def describe_sharded(path: Path) -> str:
    """The strategy and number of ranks that saved it, as far as it has them."""
    record = as_mapping(read_file(path / META, None, of=path), path).get(RECORD)
    strategy, ranks = (record.get(key) for key in ("strategy", "world_size")) if isinstance(record, dict) else (0, 0)
    if not isinstance(strategy, str) or not isinstance(ranks, int):
        return "another program as a sharded checkpoint"
    return f"{strategy} on {ranks} rank{'s' if ranks != 1 else ''}"


def _has_optimizers(meta: Mapping[str, Any]) -> bool:
    """Lightning saves schedulers with optimizers; without both it has saved weights only."""
    return "lr_schedulers" in meta


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except DamagedCheckpointError as error:
        raise ResumeError(str(error)) from error
