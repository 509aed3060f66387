"""The other ranks of a training that a script starts itself; the calling process is rank zero."""

from __future__ import annotations

import atexit
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from launcher.agreement.process_group import announce_end, rank_zero_has_ended
from launcher.core.errors import AgreementError

# Set in the environment of every rank of a script that is run once for each; its value is the job of hydra's, if any.
_MARK = "LAUNCHER_SCRIPT_RANKS"
_HYDRA_FLAGS = ("--config-name", "-cn", "--config-path", "-cp", "--config-dir", "-cd")
_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
# Seconds that a rank has to end by itself, in its own words, after another one failed, and after SIGTERM.
_GRACE = 10.0
# The same after the script of rank zero has ended.
_GRACE_AT_EXIT = 60.0
_started: dict[int, subprocess.Popen[bytes]] = {}
# Those that have ended, and how: they are made once, as a new one would not be where the script is now.
_ended: dict[int, str] = {}


def in_notebook() -> bool:
    """Whether this process is a notebook's kernel or a prompt: there is no script that other ranks could run."""
    import __main__

    # Of code that is piped in, Python 3.11 says that it is in the file '<stdin>'.
    return getattr(__main__, "__file__", "<").startswith("<") or "ipykernel" in sys.modules


def rank_variables(rank: int, world_size: int, port: int) -> dict[str, str]:
    """The variables that torchrun would set for one of the ranks on this machine.

    Args:
        rank: which.
        world_size: how many.
        port: of the store, which rank zero serves.
    """
    values = {
        "RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_RANK": rank,
        "LOCAL_WORLD_SIZE": world_size,
        "GROUP_RANK": 0,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    return {name: str(value) for name, value in values.items()}


def script_rank(world_size: int) -> dict[str, str]:
    """This process's variables for a training of a script that is run once for each rank.

    The first call runs the script again for the further ranks, and marks this process as rank zero in its environment,
    as they all go through the same trainings.

    Args:
        world_size: ranks in all.

    Raises:
        AgreementError: one of them has ended; names it.
    """
    if is_script_rank():
        check_script_ranks()
    else:
        port = free_port()
        mark = {_MARK: hydra_job()}
        for rank in range(1, world_size):
            command, folder = rank_command(rank)
            env = {**os.environ, **rank_variables(rank, world_size, port), **mark}
            process = subprocess.Popen(command, env=env, cwd=folder)
            _started[rank] = process
            threading.Thread(target=_end_with, args=(rank, process), name=f"rank-{rank}", daemon=True).start()
        atexit.register(end_script_ranks, _GRACE_AT_EXIT)
        os.environ.update({**rank_variables(0, world_size, port), **mark})
    return dict(os.environ)


def is_script_rank() -> bool:
    """Whether this process is one of those that `script_rank` made.

    The other ranks of one job of a hydra sweep end with it: in the next job this process is none of them any more.
    """
    if os.environ.get("RANK") == "0" and os.environ.get(_MARK, "") not in ("", hydra_job()):
        end_script_ranks(_GRACE_AT_EXIT)
        _ended.clear()
        for name in (_MARK, *rank_variables(0, 1, 0)):
            os.environ.pop(name, None)
    return _MARK in os.environ


def end_script_ranks(grace: float = _GRACE, grace_after_sigterm: float = _GRACE) -> None:
    """Wait for the other ranks, and end those that do not end: they may wait for this one in a collective.

    Args:
        grace: seconds that they have to end by themselves.
        grace_after_sigterm: the same, before each is killed.
    """
    give_up = time.monotonic() + grace
    if _started:
        announce_end()
    for rank, process in list(_started.items()):
        left = max(give_up - time.monotonic(), 0)
        for end, seconds in ((process.terminate, left), (process.kill, grace_after_sigterm)):
            try:
                process.wait(seconds)
                break
            except subprocess.TimeoutExpired:
                end()
        _note_end(rank, process.wait())


def _note_end(rank: int, code: int) -> None:
    _ended[rank] = f"ended with exit code {code}"
    # Last: until then it is one to wait for.
    _started.pop(rank, None)


def ended_ranks() -> dict[int, str]:
    """The ranks that this process has started and that have ended, and how."""
    return {**_ended, **{rank: f"ended with exit code {process.returncode}" for rank, process in list(_started.items())
                         if process.poll() is not None}}  # fmt: skip


def check_script_ranks() -> None:
    """Nothing where this process is no rank of a script.

    Raises:
        AgreementError: a rank of this script has ended, so a training of all of them can never begin.
    """
    gone = ended_ranks()
    # Rank zero of a hydra sweep's next job has told the end of the job before.
    if not gone and os.environ.get("RANK") != "0" and rank_zero_has_ended():
        gone = {0: "has ended"}
    if gone:
        for rank in [*_started]:
            if rank in gone:
                _note_end(rank, _started[rank].wait())
        names = "; ".join(f"rank {rank} of this script {how}" for rank, how in sorted(gone.items()))
        raise AgreementError(
            f"{names}, and a training needs all ranks: look at what it wrote above, and start the script again",
            sorted(gone),
        )


def _end_with(rank: int, process: subprocess.Popen[bytes]) -> None:
    """End this process if another rank failed and nobody has noticed: it may be waiting for that rank in vain."""
    code = process.wait()
    # After a signal this rank stops, too, and may have more to end.
    if not code or code - 128 in _STOPS:
        return
    # A training that takes the first SIGTERM as a wish to stop, in a collective that never ends, takes a second one.
    for text in (f"error: rank {rank} of this script ended with exit code {code}, and so does rank 0\n", ""):
        # What failed is told in the words of this rank too, and taken from the list then.
        time.sleep(_GRACE)
        if _started.get(rank) is process:
            sys.stderr.write(text)
            sys.stderr.flush()
            os.kill(os.getpid(), signal.SIGTERM)


def rank_command(rank: int) -> tuple[list[str], str | None]:
    """The words that run this script as another rank, and the folder to do it in; None for the one that this is in.

    A script of hydra's gets the output folder of this process, as Lightning's ranks do, and a job of a sweep the
    job's own overrides.
    """
    if not hydra_job():
        return [*_program(), *sys.argv[1:]], None
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    job = HydraConfig.get()
    words = sys.argv[1:]
    if job.mode == RunMode.MULTIRUN:
        ours = [word for word in job.overrides.hydra if not word.startswith("hydra.mode=")]
        words = [*_hydra_flags(words), *job.overrides.task, *ours]
    words += [f'hydra.run.dir="{job.runtime.output_dir}"', f"hydra.job.name={job.job.name}_rank_{rank}",
              "hydra.output_subdir=null", "hydra.mode=RUN"]  # fmt: skip
    return [*_program(), *words], job.runtime.cwd


def hydra_job() -> str:
    """Which job of hydra's this process runs now: 'only', its number in a sweep, or nothing without hydra."""
    if "hydra.core.hydra_config" not in sys.modules:
        return ""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    if not HydraConfig.initialized():
        return ""
    job = HydraConfig.get().job
    return "only" if OmegaConf.is_missing(job, "num") else f"job {job.num}"


def _hydra_flags(words: Sequence[str]) -> list[str]:
    """Of a sweep's words those that its jobs need: which config is meant."""
    kept: list[str] = []
    for word, after in zip(words, [*words[1:], ""], strict=True):
        name, equals, _ = word.partition("=")
        if name in _HYDRA_FLAGS:
            kept += [word] if equals else [word, after]
    return kept


def _program() -> list[str]:
    """The words that started this process, without its arguments."""
    import __main__

    spec = getattr(__main__, "__spec__", None)
    if spec is not None:
        name = spec.name.removesuffix(".__main__") if spec.name != "__main__" else spec.name
        return [sys.executable, "-m", name]
    # Python makes it absolute, so it holds after the script has gone to another folder.
    return [sys.executable, str(Path(__main__.__file__ or sys.argv[0]).absolute())]


def free_port() -> int:
    """A port that the system has just given and taken back."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
