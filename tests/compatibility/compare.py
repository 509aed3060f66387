"""Runs programs under plain Lightning and under the launcher, and lists the differences."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.compatibility.programs import Program
from tests.compatibility.record import read_records, same_number
from tests.support.logged_rows import users_rows
from tests.support.processes import Finished, launcher, run_warm
from tests.support.runs import REPOSITORY, free_port, train_on

# Equal computations may differ in the last bits, through other kernels and threads.
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Outcome:
    """The result of a program.

    Attributes:
        failed: name of the exception, or the launcher's error; None if it trained.
        ranks: the record of each rank.
        files: checkpoints in the user's own folders.
        rows: of the user's CSV logger, by step: names and numbers.
        output: all that was printed.
    """

    failed: str | None
    ranks: Sequence[Mapping[str, Any]]
    files: frozenset[str]
    rows: Sequence[Mapping[str, float]]
    output: str

    @classmethod
    def of(cls, folder: Path, failed: str | None, output: str) -> Outcome:
        """Read the files of a program's folder."""
        own = [file for name in ("kept", "also") for file in (folder / name).rglob("*.ckpt")]
        # Lightning's version number does not matter.
        files = frozenset(str(file.relative_to(folder)) for file in own)
        rows: list[dict[str, float]] = []
        for file in sorted((folder / "csv").rglob("metrics.csv")):
            rows += [{k: float(v) for k, v in row.items() if v and k} for row in users_rows(file)]
        return cls(failed, read_records(folder / "record"), files, rows, output)


def run_plain(programs: Sequence[Program], ranks: int, folder: Path) -> dict[str, Outcome]:
    """All programs in one process (or one a rank), each in its own folder."""
    port = free_port()
    folder.mkdir(parents=True, exist_ok=True)
    arguments = ["-m", "tests.compatibility.plain", str(ranks), *(each.name for each in programs)]

    def one(rank: int) -> Finished:
        place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0,
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "plain"}  # fmt: skip
        env = {"PYTHONPATH": str(REPOSITORY), **({k: str(v) for k, v in place.items()} if ranks > 1 else {})}
        return run_warm([sys.executable, *arguments], folder, env=env, timeout=280)

    with ThreadPoolExecutor(ranks) as pool:
        output = "".join(each.check().output for each in pool.map(one, range(ranks)))
    found: dict[str, Outcome] = {}
    for program in programs:
        place = folder / program.name
        failures = sorted(place.glob("failed-*"))
        failed = failures[0].read_text() if failures else None
        found[program.name] = Outcome.of(place, failed, output)
    return found


def run_launcher(program: Program, ranks: int, folder: Path) -> Outcome:
    """One program by `python -m launcher fit`; several ranks by the agent if `by_agent` is set."""
    folder.mkdir(parents=True, exist_ok=True)
    own = {"seed": 42, "accelerator": "cpu", "name": "run", "wandb": {"mode": "disabled"}}
    (folder / "run.yaml").write_text(yaml.safe_dump({**program.settings(), **own}))
    env = {"PYTHONPATH": str(REPOSITORY), "RECORD": str(folder / "record")}
    arguments = ["fit", "--config", "run.yaml"]
    if program.by_agent and ranks > 1:
        ended = run_warm(launcher(*arguments, "--devices", str(ranks)), folder, env=env, timeout=120)
    else:
        ended = train_on(ranks, arguments, folder, env)
    return Outcome.of(folder, None if ended.code == 0 else ended.output, ended.output)


def differences(program: Program, plain: Outcome, ours: Outcome) -> list[str]:
    """Differences that a user would notice; empty if there are none."""
    if program.same == "fails":
        return _failures(plain, ours)
    if plain.failed is not None:
        return [f"plain Lightning fails: {plain.failed}"]
    if ours.failed is not None:
        return [f"fails: {ours.failed}"]
    found: list[str] = []
    if len(plain.ranks) != len(ours.ranks):
        return [f"{len(plain.ranks)} ranks under Lightning, {len(ours.ranks)} here"]
    for rank, (one, other) in enumerate(zip(plain.ranks, ours.ranks, strict=True)):
        found += [f"rank {rank}: {text}" for text in _records(program, one, other)]
    missing = plain.files - ours.files
    if missing:
        found.append(f"checkpoints missing: {sorted(missing)}; there are {sorted(ours.files)}")
    return found + _rows(program, plain.rows, ours.rows)


def _failures(plain: Outcome, ours: Outcome) -> list[str]:
    if plain.failed is None or ours.failed is None:
        return [f"fails: Lightning {plain.failed is not None}, here {ours.failed is not None}"]
    name = plain.failed.splitlines()[0]
    return [] if name in ours.failed else [f"Lightning raises {name}; here: {ours.failed[-500:]}"]


def _records(program: Program, one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    found = [f"{key}: {one[key]} under Lightning, {other[key]} here"
             for key in ("steps", "epoch", "world_size", "precision") if one[key] != other[key]]  # fmt: skip
    found += [f"hooks: {one['hooks']} under Lightning, {other['hooks']} here"] if one["hooks"] != other["hooks"] else []
    lost = sorted(set(one["metrics"]) - set(other["metrics"]))
    found += [f"metrics missing: {lost}"] if lost else []
    if program.same == "metrics":
        return found
    if program.same == "order":
        return found + _same_values("samples of epochs", _by_epoch(one["batches"]), _by_epoch(other["batches"]))
    found += _same_values("batches", one["batches"], other["batches"])
    found += _same_values("learning rates", one["rates"], other["rates"])
    for name in one["metrics"]:
        found += _same_values(f"metric {name}", one["metrics"][name], other["metrics"].get(name))
    for name in one["weights"]:
        found += _same_values(f"weights of {name}", one["weights"][name], other["weights"].get(name))
    return found


def _by_epoch(batches: Sequence[Sequence[float]]) -> list[list[float]]:
    sums: dict[float, float] = defaultdict(float)
    for epoch, _, total in batches:
        sums[epoch] += total
    return [[epoch, round(total, 3)] for epoch, total in sorted(sums.items())]


def _same_values(what: str, one: Any, other: Any) -> list[str]:
    if _equal(one, other):
        return []
    return [f"{what}: {_short(one)} under Lightning, {_short(other)} here"]


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, int | float) and isinstance(other, int | float):
        return same_number(one, other, _TOLERANCE)
    return one == other


def _short(value: Any) -> str:
    return re.sub(r"(\d\.\d{6})\d+", r"\1", str(value))[:300]


def _has(row: Mapping[str, float], wanted: Mapping[str, float], *, exactly: bool) -> bool:
    return all(k in row and (not exactly or same_number(v, row[k], _TOLERANCE)) for k, v in wanted.items())


def _rows(program: Program, one: Sequence[Mapping[str, float]], other: Sequence[Mapping[str, float]]) -> list[str]:
    """Each row that Lightning logged is there, with the same numbers."""
    timed = ("DeviceStatsMonitor",)
    found: list[str] = []
    for row in one:
        wanted = {k: v for k, v in row.items() if not k.startswith(timed)}
        if not any(_has(each, wanted, exactly=program.same == "exact") for each in other):
            found.append(f"row missing: {row}")
    names = {k for row in one for k in row} - {k for row in other for k in row}
    return [*found[:3], *([f"columns missing: {sorted(names)}"] if names else [])]
