"""The tools that recover the same training, and how each is started."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.recovery.cases import CASES, config
from tests.benchmarks.recovery.rounds import Launch

HERE = Path(__file__).parent
# Optimizer steps of a run, of which a kill comes after one of the window; and between checkpoints.
STEPS, WINDOW, EVERY = 45, (2, 22), 10


@dataclass(frozen=True)
class Settings:
    """What a command depends on.

    Attributes:
        python: the interpreter of the peers.
        ranks: number of ranks.
        folder: for config files.
    """

    python: str
    ranks: int
    folder: Path


@dataclass(frozen=True)
class Contestant:
    """A tool.

    Attributes:
        name: for the table.
        command: its command line.
        module: what its interpreter must have.
        kills_rank_zero: whether it claims to survive the death of rank zero.
        reserve: ranks that only wait.
    """

    name: str
    command: Callable[[Settings], list[str]]
    module: str = "torch"
    kills_rank_zero: bool = False
    reserve: int = 0

    def launch(self, settings: Settings) -> Launch:
        return Launch(self.command(settings), settings.ranks)

    def installed(self, settings: Settings) -> bool:
        """Whether the interpreter has the module; asks no network."""
        check = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({self.module!r}) is None)"
        try:
            return subprocess.run([settings.python, "-c", check], capture_output=True, check=False).returncode == 0
        except OSError:
            return False


def _launcher(settings: Settings) -> list[str]:
    file = settings.folder / f"launcher-{settings.ranks}.yaml"
    file.write_text(json.dumps(config(CASES["mlp"], settings.ranks, STEPS, EVERY)))
    return [sys.executable, "-m", "launcher", "fit", "--nproc-per-node", str(settings.ranks), "--max-restarts", "3",
            "--config", str(file)]  # fmt: skip


def _torchrun(settings: Settings) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(settings.ranks),
            "--max-restarts", "3", str(HERE / "torchrun_script.py"), str(STEPS), str(EVERY)]  # fmt: skip


def _inprocess(reserve: int) -> Callable[[Settings], list[str]]:
    def command(settings: Settings) -> list[str]:
        script = str(HERE / "inprocess_script.py")
        return [settings.python, script, str(STEPS), str(EVERY), str(settings.ranks), str(reserve)]

    return command


def _torchft(heartbeat: int, minimum: int | None) -> Callable[[Settings], list[str]]:
    def command(settings: Settings) -> list[str]:
        least = str(minimum or settings.ranks)
        return [
            settings.python,
            str(HERE / "torchft_script.py"),
            str(STEPS),
            str(settings.ranks),
            str(heartbeat),
            least,
        ]

    return command


CONTESTANTS: Mapping[str, Contestant] = {
    "launcher": Contestant("launcher", _launcher, kills_rank_zero=True),
    "torchrun": Contestant("torchrun --max-restarts 3, Lightning", _torchrun, kills_rank_zero=True),
    "nvrx": Contestant("nvidia-resiliency-ext in-process, world shrinks", _inprocess(0), "nvidia_resiliency_ext"),
    "nvrx_reserve": Contestant(
        "nvidia-resiliency-ext in-process, one rank in reserve", _inprocess(1), "nvidia_resiliency_ext", reserve=1
    ),
    "torchft": Contestant("torchft, min_replicas 1, defaults", _torchft(5000, 1), "torchft"),
    "torchft_1s": Contestant("torchft, min_replicas 1, heartbeat 1 s", _torchft(1000, 1), "torchft"),
    "torchft_all": Contestant("torchft, min_replicas all, heartbeat 1 s", _torchft(1000, None), "torchft"),
}
