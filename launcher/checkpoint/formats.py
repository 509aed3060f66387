"""The formats of checkpoints: how each is recognized, read, and converted for a strategy that writes another."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from typing_extensions import override

from launcher.checkpoint.deepspeed import ZeroLayout, read_consolidated, read_zero_outline, zero_layout
from launcher.checkpoint.reader import Trust, as_mapping, read_file
from launcher.checkpoint.sharded import (
    check_sharded_folder,
    describe_sharded,
    is_sharded_folder,
    read_sharded,
    read_sharded_outline,
    read_sharded_weights,
)
from strategies.registry import find_strategy, list_strategies
from strategies.sharded_metadata import META

Settings = Mapping[str, Any]


class CheckpointFormat(ABC):
    """One format. A strategy refers to it as `checkpoint_format`."""

    # Whether the strategy saves and restores its loss scale itself.
    has_own_loss_scale: ClassVar[bool] = False

    @abstractmethod
    def recognizes(self, path: Path) -> bool:
        """Whether a checkpoint is of this format."""

    @abstractmethod
    def read_outline(self, path: Path, trust: Trust | None = None, *, outline: bool = False) -> Mapping[str, Any]:
        """The content as Lightning saved it, with the tensors left on disk or only their shapes.

        See `launcher.checkpoint.reader.read_file` for `trust` and `outline`.

        Raises:
            ResumeError: not a checkpoint, a damaged one, or one whose loading would run untrusted code.
        """

    @abstractmethod
    def read_consolidated(self, path: Path, trust: Trust | None = None) -> Mapping[str, Any]:
        """The content as Lightning would have saved it in one file. Raises as `read_outline`."""

    def read_weights(self, path: Path) -> Any:
        """The state dict of the module; None without one. Raises as `read_outline`."""
        return self.read_consolidated(path).get("state_dict")

    @abstractmethod
    def is_loadable(self, path: Path, planned: CheckpointFormat, deepspeed: Settings | None, ranks: int) -> bool:
        """Whether a strategy with the planned format, DeepSpeed config and number of ranks loads it unconverted."""

    @abstractmethod
    def describe(self, path: Path) -> str:
        """Describe the format for a notice."""

    @abstractmethod
    def sample_files(self, path: Path) -> list[Path]:
        """Files of which at least one has each kind of content."""


class OneFile(CheckpointFormat):
    """The file that Lightning writes. Every strategy loads it."""

    def recognizes(self, path: Path) -> bool:
        """See `CheckpointFormat`."""
        return not path.is_dir()

    def read_outline(self, path: Path, trust: Trust | None = None, *, outline: bool = False) -> Mapping[str, Any]:
        """See `CheckpointFormat`."""
        return as_mapping(read_file(path, trust, outline=outline), path)

    def read_consolidated(self, path: Path, trust: Trust | None = None) -> Mapping[str, Any]:
        """See `CheckpointFormat`."""
        return self.read_outline(path, trust)

    def is_loadable(self, path: Path, planned: CheckpointFormat, deepspeed: Settings | None, ranks: int) -> bool:
        """See `CheckpointFormat`."""
        return True

    def describe(self, path: Path) -> str:
        """See `CheckpointFormat`."""
        return "Lightning"

    def sample_files(self, path: Path) -> list[Path]:
        """See `CheckpointFormat`."""
        return [path]


class DeepSpeedFolder(CheckpointFormat):
    """DeepSpeed's folder with files of every rank, which loads only with the partitions of the running training."""

    has_own_loss_scale: ClassVar[bool] = True

    def recognizes(self, path: Path) -> bool:
        """Every folder that no other format recognizes: its reader reports what is missing."""
        return path.is_dir()

    def read_outline(self, path: Path, trust: Trust | None = None, *, outline: bool = False) -> Mapping[str, Any]:
        """See `CheckpointFormat`."""
        return read_zero_outline(path, trust, outline=outline)

    def read_consolidated(self, path: Path, trust: Trust | None = None) -> Mapping[str, Any]:
        """See `CheckpointFormat`."""
        return read_consolidated(path, trust)

    def is_loadable(self, path: Path, planned: CheckpointFormat, deepspeed: Settings | None, ranks: int) -> bool:
        """See `CheckpointFormat`."""
        return planned is self and deepspeed is not None and zero_layout(path) == ZeroLayout.of(deepspeed, ranks)

    def describe(self, path: Path) -> str:
        """See `CheckpointFormat`."""
        return str(zero_layout(path))

    def sample_files(self, path: Path) -> list[Path]:
        """See `CheckpointFormat`."""
        found = (sorted(path.rglob(f"*_{kind}_states.pt"))[:1] for kind in ("model", "optim"))
        return [file for files in found for file in files]


class ShardedFolder(CheckpointFormat):
    """The folder of torch's distributed checkpoints, which loads with any number of ranks."""

    def recognizes(self, path: Path) -> bool:
        """See `CheckpointFormat`."""
        return is_sharded_folder(path)

    def read_outline(self, path: Path, trust: Trust | None = None, *, outline: bool = False) -> Mapping[str, Any]:
        """See `CheckpointFormat`."""
        return read_sharded_outline(path, trust, outline=outline)

    def read_consolidated(self, path: Path, trust: Trust | None = None) -> Mapping[str, Any]:
        """See `CheckpointFormat`."""
        return read_sharded(path, trust)

    @override
    def read_weights(self, path: Path) -> Any:
        return read_sharded_weights(path)

    def is_loadable(self, path: Path, planned: CheckpointFormat, deepspeed: Settings | None, ranks: int) -> bool:
        """See `CheckpointFormat`."""
        return planned is self

    def describe(self, path: Path) -> str:
        """See `CheckpointFormat`."""
        return describe_sharded(path)

    def sample_files(self, path: Path) -> list[Path]:
        """See `CheckpointFormat`."""
        check_sharded_folder(path)
        return [path / META]


# DeepSpeed's is last: it takes every folder.
_FORMATS: dict[str, CheckpointFormat] = {
    "file": OneFile(),
    "sharded": ShardedFolder(),
    "deepspeed": DeepSpeedFolder(),
}


def format_of(path: Path) -> CheckpointFormat:
    """The format of a checkpoint."""
    names = dict.fromkeys(entry.checkpoint_format for entry in list_strategies())
    own = [_find_format(name) for name in names if name not in _FORMATS]
    return next(each for each in (*own, *_FORMATS.values()) if each.recognizes(path))


def format_written_by(strategy: str) -> CheckpointFormat:
    """The format that the strategy of this name writes."""
    return _find_format(find_strategy(strategy).checkpoint_format)


def _find_format(name: str) -> CheckpointFormat:
    if name in _FORMATS:
        return _FORMATS[name]
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)
