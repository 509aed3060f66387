"""Helpers for real runs: start ranks without an agent, read traces and events."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from launcher.core.events import read_events
from tests.support.processes import Finished, launcher, run_warm

REPOSITORY = Path(__file__).resolve().parents[2]
TOY = ("--model", "tests.support.toy.Toy", "--data", "tests.support.toy.ToyData", "--wandb.mode", "disabled")

# A real training loads data in worker processes; they must not block a restart.
WORKERS = ("--data.workers", "2")
PERSISTENT = (*WORKERS, "--data.persistent", "true")


def toy_env(trace: Path) -> dict[str, str]:
    """Variables with the toy's trace file and the path of its module."""
    return {"TRACE": str(trace), "PYTHONPATH": str(REPOSITORY)}


def start_by_hand(
    arguments: Sequence[Sequence[str]],
    cwd: Path,
    env: Mapping[str, str],
    *,
    world_size: int | None = None,
    timeout: float = 120,
    preloaded: Sequence[str] = (),
) -> list[Finished]:
    """Ranks without an agent: rank n receives `arguments[n]` and torchrun's variables. Rank zero serves the store."""
    commands = [launcher(*each) for each in arguments]
    return start_commands_by_hand(commands, cwd, env, world_size=world_size, timeout=timeout, preloaded=preloaded)


def start_commands_by_hand(
    commands: Sequence[Sequence[str]],
    cwd: Path,
    env: Mapping[str, str],
    *,
    world_size: int | None = None,
    timeout: float = 120,
    preloaded: Sequence[str] = (),
) -> list[Finished]:
    """As `start_by_hand`, for other modules than the launcher."""
    size = world_size or len(commands)
    port = free_port()

    def one(rank: int) -> Finished:
        own = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, "GROUP_RANK": 0,
               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
        variables = {**env, **{name: str(value) for name, value in own.items()}}
        return run_warm(commands[rank], cwd, env=variables, timeout=timeout, preloaded=preloaded)

    with ThreadPoolExecutor(len(commands)) as pool:
        return list(pool.map(one, range(len(commands))))


def train_on(
    ranks: int, arguments: Sequence[str], cwd: Path, env: Mapping[str, str], *, preloaded: Sequence[str] = ()
) -> Finished:
    """Run with the same arguments on some ranks; several ranks have torchrun's variables, without its start.

    Returns:
        The output of all ranks, and the first exit code other than 0.
    """
    if ranks == 1:
        return run_warm(launcher(*arguments), cwd, env=env, preloaded=preloaded)
    ended = start_by_hand([arguments] * ranks, cwd, env, preloaded=preloaded)
    return Finished(next((each.code for each in ended if each.code), 0), "".join(each.output for each in ended))


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def read_trace(trace: Path, rank: int = 0) -> list[tuple[int, list[int], float]]:
    """A rank's trace: (step, sample numbers, loss) for each micro batch."""
    lines = Path(f"{trace}-{rank}").read_text().splitlines()
    return [(step, index, loss) for step, index, loss in map(json.loads, lines)]


def events_of(run_directory: Path, kind: str) -> list[dict[str, Any]]:
    """The run's events of one kind."""
    return [event for event in read_events(run_directory / "events.jsonl") if event["kind"] == kind]


def only_run(folder: Path) -> Path:
    """The one run directory in `folder/runs`."""
    (found,) = (path for path in (folder / "runs").iterdir() if path.is_dir())
    return found
