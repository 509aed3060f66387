"""Which strategies ran out of memory in a run, and under which circumstances: one small file in its directory.

Whoever knows it first writes it: the rank that was refused memory, or the agent of a rank that the kernel killed. A
start that goes on with the run reads it, whoever makes that start: our agent, torchrun, SLURM or a person.
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

from launcher.core.atomic_write import write_file
from launcher.core.secrets import redact

FILE_NAME = "out_of_memory.json"
# Two nodes of one kind differ by what their firmware and kernel keep for themselves.
_SAME_MEMORY = 1.01
# Settings that change what a step needs, beside those with a field of their own.
_SETTINGS = ("model", "data", "deepspeed_config")


@dataclass(frozen=True, slots=True)
class OomRecord:
    """A strategy that ran out of memory, and what it ran out with.

    Attributes:
        strategy: its name.
        asked: the config's strategy: `auto`, or the name that the user gave.
        model: import path of the module's class.
        settings: digest of the arguments of model and data, and of the user's DeepSpeed config.
        precision: Lightning's name.
        world_size: number of ranks.
        micro_batch_size: samples that a rank takes at once; None where the loader alone knows.
        memory_bytes: of one rank's device; None if the plan did not look.
    """

    strategy: str
    asked: str
    model: str
    settings: str
    precision: str
    world_size: int
    micro_batch_size: int | None
    memory_bytes: int | None

    @classmethod
    def of(cls, config: Mapping[str, Any], plan: Mapping[str, Any]) -> OomRecord:
        """The plan's strategy in the plan's circumstances.

        Args:
            config: `RunConfig.to_dict()`, or `config.yaml`.
            plan: `Plan.to_dict()`, or `plan.json`.
        """
        # As JSON, where tuples and lists are one.
        settings = json.dumps(redact([config.get(name) for name in _SETTINGS]), sort_keys=True, default=str)
        return cls(
            strategy=plan["strategy"]["name"],
            asked=config["strategy"],
            model=str((config.get("model") or {}).get("class_path")),
            settings=hashlib.sha256(settings.encode()).hexdigest()[:16],
            precision=plan["precision"],
            world_size=plan["world_size"],
            micro_batch_size=plan["batch"]["micro_batch_size"],
            memory_bytes=plan["memory"]["memory_bytes"] if plan["memory"] else None,
        )

    def would_recur(self, now: OomRecord) -> bool:
        """Whether this strategy would run out once more in the other's circumstances; where memory grew it may not."""
        if self.memory_bytes and now.memory_bytes and now.memory_bytes > _SAME_MEMORY * self.memory_bytes:
            return False
        apart = ("strategy", "memory_bytes")
        return all(getattr(self, name) == getattr(now, name) for name in self.__slots__ if name not in apart)


@dataclass(frozen=True, slots=True)
class MemoryRecord:
    """What a run's directory says of it.

    Attributes:
        entries: in the order in which they happened.
        problem: why the file cannot be read; None if it can, or if there is none.
    """

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
    """Add an entry to a run's record.

    Returns:
        Whether it is there now: a full disk must not hide that memory ran out.
    """
    with contextlib.suppress(OSError):
        known = read_memory_record(run).entries
        if entry not in known:
            write_file(run / FILE_NAME, json.dumps([asdict(each) for each in (*known, entry)], indent=1) + "\n")
    # Several ranks run out at once, with the same to say: whichever was last, it stands there.
    return entry in read_memory_record(run).entries


def add_attempt_oom_record(run: Path) -> bool:
    """Add the strategy of the run's last plan: for a rank that the kernel killed, which can say nothing.

    Returns:
        See `add_oom_record`.
    """
    try:
        config: Any = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))
        entry = OomRecord.of(config, plan)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return False
    return add_oom_record(run, entry)
