"""The titles of the launcher's processes in `ps`, `top` and `nvidia-smi`, such as `launcher: rank 3 of 8 (run mine)`.

Only processes that the launcher has started are renamed, not a notebook's kernel or the process of a user's script.
"""

from __future__ import annotations

import os

_is_own = False
_run = ""


def claim_process() -> None:
    """Allow to rename this process and its forks: it runs nothing but the launcher."""
    global _is_own
    _is_own = True


def prepare_titles() -> None:
    """Find the memory of the title, in a claimed process; needed before the first change of `os.environ`."""
    if _is_own:
        import setproctitle  # noqa: F401 -- its import does that


def set_title(role: str, run: str | None = None) -> None:
    """Name a claimed process; without a name of the run, the last one given is used."""
    global _run
    _run = run or _run
    if _is_own:
        from setproctitle import setproctitle, setthreadtitle

        setproctitle(f"launcher: {role}{f' (run {_run})' if _run else ''}")
        # The short name in /proc/PID/stat must have no space: SLURM's proctrack/linuxproc misses such a process, and
        # does not signal it and its children.
        setthreadtitle(role.replace(" ", "-"))


def set_rank_title(rank: int, world_size: int, run: str | None = None) -> None:
    """Name the process of a rank."""
    set_title(f"rank {rank} of {world_size}", run)


def name_forks(rank: int) -> None:
    """From now on, forks of this rank are not named as the rank: the loader workers and pools of a script."""
    os.register_at_fork(after_in_child=lambda: set_title(f"process of rank {rank}"))


def set_worker_title(worker: int, rank: int) -> None:
    """Name a loader worker of a rank, if it is a fork of the rank."""
    set_title(f"loader worker {worker} of rank {rank}")
