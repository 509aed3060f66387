"""The times that `run_started` names: of the SLURM job, of the processes and of the agreement."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from launcher.process.launch_time import find_process_start, read_launch
from launcher.runs.submission_record import read_records


def list_launch_times(
    run: Path, env: Mapping[str, str], *, pid: int, parent: int | None, called: float | None, agreement: float
) -> dict[str, float | None]:
    """Times in seconds since 1970; None where there was no such event.

    Args:
        run: the run directory.
        env: the rank's environment variables.
        pid: of rank zero.
        parent: of the process that started it, if that process writes no time into the environment (torchrun).
        called: when a script called the training, whose process began for other reasons; None for a command.
        agreement: when rank zero began to agree with the others.
    """
    record = next(iter(read_records(run)[-1:]), {})
    job = env.get("SLURM_JOB_ID")
    array = f"{env.get('SLURM_ARRAY_JOB_ID')}_{env.get('SLURM_ARRAY_TASK_ID')}"
    is_submitted = job is not None and str(record.get("job_id")) in (job, array)
    # In a job of the user's own, such as an interactive one, its time before the launch was not the run's.
    is_job = is_submitted or env.get("SLURM_RESTART_COUNT", "0") not in ("", "0")
    launched = called if called is not None else read_launch(env) or find_process_start(parent or pid)
    return {
        "submitted": _as_time(record.get("submitted")) if is_submitted else None,
        "job": _as_time(env.get("SLURM_JOB_START_TIME")) if is_job else None,
        "launched": launched,
        "process": find_process_start(pid),
        "agreement": agreement,
    }


def _as_time(value: object) -> float | None:
    try:
        return float(str(value))
    except ValueError:
        return None
