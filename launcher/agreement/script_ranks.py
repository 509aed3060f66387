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
from launcher.process.parent_death import STOP_SIGNALS

# Set in the environment of every rank of a script that runs once per rank; its value is the Hydra job, if any.
_MARK = "LAUNCHER_SCRIPT_RANKS"
_HYDRA_FLAGS = ("--config-name", "-cn", "--config-path", "-cp", "--config-dir", "-cd")
# Seconds that a rank has to end by itself with its own error after another rank failed, and after SIGTERM.
_GRACE = 10.0
# The same after the script of rank zero has ended.
_GRACE_AT_EXIT = 60.0
_started: dict[int, subprocess.Popen[bytes]] = {}
# Ranks that have ended, and how. They are not started again: a new one would begin at the start of the script.
_ended: dict[int, str] = {}


def in_notebook() -> bool:
    """Whether this process is a notebook kernel or a prompt: other ranks have no script to run."""
    import __main__

    # Python 3.11 names the file of piped code '<stdin>'.
    return getattr(__main__, "__file__", "<").startswith("<") or "ipykernel" in sys.modules


def make_rank_variables(rank: int, world_size: int, port: int) -> dict[str, str]:
    """The variables that torchrun would set for a rank on this machine; rank zero serves the store at `port`."""
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
    """This process's variables for a training of a script that runs once per rank.

    The first call starts the script again for the other ranks, and marks this process as rank zero in its environment:
    all ranks run the same trainings.

    Raises:
        AgreementError: a rank has ended; names it.
    """
    if is_script_rank():
        check_script_ranks()
    else:
        port = find_free_port()
        mark = {_MARK: find_hydra_job()}
        for rank in range(1, world_size):
            command, folder = build_rank_command(rank)
            env = {**os.environ, **make_rank_variables(rank, world_size, port), **mark}
            process = subprocess.Popen(command, env=env, cwd=folder)
            _started[rank] = process
            threading.Thread(target=_end_after, args=(rank, process), name=f"rank-{rank}", daemon=True).start()
        atexit.register(_end_at_exit)
        os.environ.update({**make_rank_variables(0, world_size, port), **mark})
    return dict(os.environ)


def is_script_rank() -> bool:
    """Whether this process is a rank of a script that `script_rank` started.

    The other ranks of one job of a Hydra sweep end with the job; the next job starts its own.
    """
    if os.environ.get("RANK") == "0" and os.environ.get(_MARK, "") not in ("", find_hydra_job()):
        end_script_ranks(_GRACE_AT_EXIT)
        _ended.clear()
        for name in (_MARK, *make_rank_variables(0, 1, 0)):
            os.environ.pop(name, None)
    return _MARK in os.environ


def _end_at_exit() -> None:
    """At the end of the script; Ctrl-C meanwhile ends the other ranks at once."""
    try:
        end_script_ranks(_GRACE_AT_EXIT)
    except KeyboardInterrupt:
        end_script_ranks(0.0, 0.0)


def end_script_ranks(grace: float = _GRACE, grace_after_sigterm: float = _GRACE) -> None:
    """Wait `grace` seconds for the other ranks to exit, then end them: they may wait for this rank in a collective.

    A rank that gets SIGTERM has `grace_after_sigterm` seconds until SIGKILL.
    """
    give_up = time.monotonic() + grace
    if _started:
        announce_end()
    for rank, process in list(_started.items()):
        rest = max(give_up - time.monotonic(), 0)
        for end, seconds in ((process.terminate, rest), (process.kill, grace_after_sigterm)):
            try:
                process.wait(seconds)
                break
            except subprocess.TimeoutExpired:
                end()
        _note_end(rank, process.wait())


def _note_end(rank: int, code: int) -> None:
    _ended[rank] = f"ended with exit code {code}"
    # Last: another thread must find a rank that has ended in one of the two.
    _started.pop(rank, None)


def list_ended_ranks() -> dict[int, str]:
    """The ranks that this process has started and that have ended, with their exit."""
    return {**_ended, **{rank: f"ended with exit code {process.returncode}" for rank, process in list(_started.items())
                         if process.poll() is not None}}  # fmt: skip


def check_script_ranks() -> None:
    """Check that all ranks of this script can take part in a training; does nothing in other processes.

    Raises:
        AgreementError: a rank of this script has ended, so a training of all ranks cannot start.
    """
    ended = list_ended_ranks()
    # Rank zero of a Hydra sweep's next job has announced the end of the previous job.
    if not ended and os.environ.get("RANK") != "0" and rank_zero_has_ended():
        ended = {0: "has ended"}
    if ended:
        for rank in [*_started]:
            if rank in ended:
                _note_end(rank, _started[rank].wait())
        names = "; ".join(f"rank {rank} of this script {how}" for rank, how in sorted(ended.items()))
        raise AgreementError(
            f"{names}, and a training needs all ranks; look at its output above, and start the script again",
            sorted(ended),
        )


def _end_after(rank: int, process: subprocess.Popen[bytes]) -> None:
    """End this process if another rank failed unnoticed: it may wait for that rank until a timeout."""
    code = process.wait()
    # After a signal this rank stops too, and may need time to end.
    if not code or code - 128 in STOP_SIGNALS:
        return
    # The first SIGTERM requests a stop at a step boundary. A training in a collective that does not end needs a second.
    for text in (f"error: rank {rank} of this script ended with exit code {code}, and so does rank 0\n", ""):
        # This rank may raise its own error in that time, which removes the failed rank from `_started`.
        time.sleep(_GRACE)
        if _started.get(rank) is process:
            sys.stderr.write(text)
            sys.stderr.flush()
            os.kill(os.getpid(), signal.SIGTERM)


def build_rank_command(rank: int) -> tuple[list[str], str | None]:
    """The command that runs this script as another rank, and its working directory; None for the current one.

    A Hydra script gets the output folder of this process, as Lightning's ranks do; a job of a sweep also gets the job's
    overrides.
    """
    if not find_hydra_job():
        return [*_program(), *sys.argv[1:]], None
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    job = HydraConfig.get()
    arguments = sys.argv[1:]
    if job.mode == RunMode.MULTIRUN:
        overrides = [each for each in job.overrides.hydra if not each.startswith("hydra.mode=")]
        arguments = [*_config_flags(arguments), *job.overrides.task, *overrides]
    arguments += [f'hydra.run.dir="{job.runtime.output_dir}"', f"hydra.job.name={job.job.name}_rank_{rank}",
              "hydra.output_subdir=null", "hydra.mode=RUN"]  # fmt: skip
    return [*_program(), *arguments], job.runtime.cwd


def find_hydra_job() -> str:
    """The Hydra job that this process runs now: 'only', its number in a sweep, or nothing without Hydra."""
    if "hydra.core.hydra_config" not in sys.modules:
        return ""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    if not HydraConfig.initialized():
        return ""
    job = HydraConfig.get().job
    return "only" if OmegaConf.is_missing(job, "num") else f"job {job.num}"


def _config_flags(arguments: Sequence[str]) -> list[str]:
    """The arguments of a sweep that its jobs need too: those that select the config."""
    kept: list[str] = []
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, _ = argument.partition("=")
        if name in _HYDRA_FLAGS:
            kept += [argument] if equals else [argument, following]
    return kept


def _program() -> list[str]:
    """The command that started this process, without its arguments."""
    import __main__

    spec = getattr(__main__, "__spec__", None)
    if spec is not None:
        name = spec.name.removesuffix(".__main__") if spec.name != "__main__" else spec.name
        return [sys.executable, "-m", name]
    # An absolute path stays valid after the script has changed its working directory.
    return [sys.executable, str(Path(__main__.__file__ or sys.argv[0]).absolute())]


def find_free_port() -> int:
    """Find a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
