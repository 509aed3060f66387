"""The strategies that ran out of memory in a run, with the circumstances: a file in its directory.

The rank whose allocation failed writes it, or the agent of a rank that the kernel killed. Every later start of the run
reads it, by the agent, torchrun, SLURM or a user.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from launcher.config.schema import FsdpOptions
from launcher.core.atomic_write import write_file
from launcher.core.secrets import redact

FILE_NAME = "out_of_memory.json"
# The memory of two equal nodes differs by what firmware and kernel reserve.
_SAME_MEMORY = 1.01
# Settings that change the memory of a step and have no field in the record.
_SETTINGS = ("model", "data", "deepspeed_config")


@dataclass(frozen=True, slots=True)
class OomRecord:
    """A strategy that ran out of memory, and the circumstances.

    Attributes:
        asked: the config's strategy: `auto`, or the name that the user gave.
        settings: digest of the arguments of model and data, and of the user's DeepSpeed config.
        micro_batch_size: samples of a rank per forward pass; None if only the loader determines it.
        memory_bytes: of one rank's device; None if the plan does not know it.
        activation_checkpointing: whether blocks' activations were computed again.
    """

    strategy: str
    asked: str
    model: str
    settings: str
    precision: str
    world_size: int
    micro_batch_size: int | None
    memory_bytes: int | None
    activation_checkpointing: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any], plan: Mapping[str, Any]) -> OomRecord:
        """The plan's strategy and circumstances; both mappings as in `config.yaml` and `plan.json`."""
        # As JSON, in which tuples and lists are equal.
        values = [config.get(name) for name in _SETTINGS]
        # Records of versions without it have no part for the default.
        values += [fsdp] if (fsdp := config.get("fsdp")) not in (None, asdict(FsdpOptions())) else []
        settings = json.dumps(redact(values), sort_keys=True, default=str)
        return cls(
            strategy=plan["strategy"]["name"],
            asked=config["strategy"],
            model=str((config.get("model") or {}).get("class_path")),
            settings=hashlib.sha256(settings.encode()).hexdigest()[:16],
            precision=plan["precision"],
            world_size=plan["world_size"],
            micro_batch_size=plan["batch"]["micro_batch_size"],
            memory_bytes=plan["memory"]["memory_bytes"] if plan["memory"] else None,
            activation_checkpointing=plan.get("activation_checkpointing", False),
        )

    def would_recur(self, now: OomRecord) -> bool:
        """Whether this strategy would run out of memory again in the circumstances of `now`; false with more memory."""
        if self.memory_bytes and now.memory_bytes and now.memory_bytes > _SAME_MEMORY * self.memory_bytes:
            return False
        ignored = ("strategy", "memory_bytes")
        return all(getattr(self, name) == getattr(now, name) for name in self.__slots__ if name not in ignored)


@dataclass(frozen=True, slots=True)
class MemoryRecord:
    """The strategies of a run that ran out of memory, oldest first; `problem` is why the file cannot be read."""

    entries: tuple[OomRecord, ...] = ()
    problem: str | None = None

    def ran_out(self, now: OomRecord) -> tuple[str, ...]:
        """The strategies that would run out of memory again in these circumstances."""
        return tuple(dict.fromkeys(entry.strategy for entry in self.entries if entry.would_recur(now)))


def read_memory_record(run: Path) -> MemoryRecord:
    """The record of a run; empty if nothing ran out of memory."""
    file = run / FILE_NAME
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return MemoryRecord(tuple(OomRecord(**entry) for entry in values))
    except FileNotFoundError:
        return MemoryRecord()
    except (OSError, ValueError, TypeError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        return MemoryRecord(problem=f"{file} cannot be read ({why}): what ran out of memory in this run is not known")


def add_oom_record(run: Path, entry: OomRecord) -> bool:
    """Add an entry to a run's record; return whether it is there. A full disk must not hide the original error."""
    with contextlib.suppress(OSError):
        known = read_memory_record(run).entries
        if entry not in known:
            write_file(run / FILE_NAME, json.dumps([asdict(each) for each in (*known, entry)], indent=1) + "\n")
    # Several ranks may write the same entry at once.
    return entry in read_memory_record(run).entries


def add_attempt_oom_record(run: Path) -> bool:
    """Add the strategy of the run's last plan, for a rank that the kernel killed; see `add_oom_record`."""
    try:
        config: Any = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        entry = OomRecord.of(config, json.loads((run / "plan.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return False
    return add_oom_record(run, entry)
