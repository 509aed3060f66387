"""Writes run directories as the launcher does, for reports on runs that are too large to train in a test."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.agreement.facts import RankFacts, agree_on
from launcher.config.schema import RunConfig
from launcher.core.events import EventLog
from launcher.hardware.devices import Device, Hardware
from launcher.planning.plan import make_plan

START = 1_700_000_000.0
VERSIONS = {"launcher": "0.1.0", "python": "3.11.7", "torch": "2.13.0"}


class Clock:
    """A clock that a test sets."""

    def __init__(self, now: float = START) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class MadeRun:
    """Writes a run's directory with the launcher's own code for config, plan and events.

    Args:
        path: of the directory.
        world_size: number of ranks.
        config: settings on top of the defaults.
    """

    def __init__(self, path: Path, world_size: int = 2, **config: Any) -> None:
        self.path = path
        self.world_size = world_size
        self.clock = Clock()
        self.events = EventLog(path / "events.jsonl", 0, self.clock)
        self.attempts = 0
        path.mkdir(parents=True)
        (path / "logs").mkdir()
        self.config = RunConfig(**{"name": path.name, **config})
        (path / "config.yaml").write_text(self.config.to_yaml())
        device = Device("cuda", 0, "NVIDIA A100-SXM4-80GB", 80 * 2**30, ("fp32", "fp16", "bf16"))
        facts = [
            RankFacts(rank, rank, world_size, 0, "node1", Hardware(device, world_size, VERSIONS), "digest")
            for rank in range(world_size)
        ]
        self.plan = make_plan(self.config, agree_on(facts)).to_dict()

    def start(self, *, at_step: int = 0, start_up: float = 5.0, has_step: bool = True, **more: Any) -> None:
        """Write the events of another attempt, up to its first step."""
        self.write_event("run_started", 0.0, name=self.path.name, restart_count=self.attempts,
                         **{"versions": VERSIONS, "host": "node1", "source": "torchrun", **more})  # fmt: skip
        self.attempts += 1
        (self.path / "plan.json").write_text(json.dumps(self.plan))
        self.write_event("planned", 0.0, plan=self.plan)
        self.write_event("training_started", start_up, step=at_step)
        if has_step:
            self.write_event("first_step", 0.1, step=at_step + 1)

    def write_event(self, kind: str, after: float = 0.0, rank: int = 0, **fields: Any) -> None:
        """Write one event, some seconds after the previous one."""
        self.clock.now += after
        EventLog(self.path / "events.jsonl", rank, self.clock).write(kind, **fields)

    def step(self, step: int, seconds: float = 0.1, loss: float | None = None, rate: float = 1e-3) -> None:
        """Write rank zero's event of a logging interval."""
        loss = 4 * math.exp(-step / 40) + 0.5 if loss is None else loss
        self.write_event("step", 0.01, step=step, epoch=0, seconds_per_step=seconds, metrics={"loss": loss},
                         learning_rate=[rate])  # fmt: skip

    def ranks(
        self,
        step: int,
        *,
        scale: Sequence[float | None] | float | None = None,
        skipped: int | None = None,
        own: Sequence[float] | None = None,
        memory: int = 3 * 2**30,
    ) -> None:
        """Write the event of all ranks for a logging interval."""
        size = self.world_size
        scales = list(scale) if isinstance(scale, list | tuple) else [scale] * size
        self.write_event("ranks", 0.0, step=step, ranks=list(range(size)), loss_scale=scales,
                         skipped_steps=[skipped] * size, step_seconds=[0.1] * size, data_seconds=[0.01] * size,
                         own_seconds=list(own or [0.04] * size), peak_memory=[memory] * size)  # fmt: skip

    def append(self, text: str) -> None:
        """Append any text to the events file."""
        with (self.path / "events.jsonl").open("a") as file:
            file.write(text)


def with_memory(plan: Mapping[str, Any], parts: Mapping[str, int], limit: int) -> dict[str, Any]:
    """The plan with an estimate of its strategy's memory."""
    name = plan["strategy"]["name"]
    memory = {"assessments": [{"name": name, "memory": dict(parts)}], "limit_bytes": limit, "method": "traced"}
    return {**plan, "memory": memory}
