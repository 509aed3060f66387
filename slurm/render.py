"""A job as submitit's parameters, and the batch script that submitit renders."""

from __future__ import annotations

import shlex
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from submitit.core.utils import DelayedSubmission, JobPaths
from submitit.slurm.slurm import SlurmExecutor

from slurm.array import ArrayChoice
from slurm.job import SlurmJob

# submitit counts a preemption as a timeout and stops at the third; the launcher limits attempts without progress.
_TIMEOUTS = 1_000_000
# Minutes for submitit if the partition sets the limit; submitit's default is five.
_NO_LIMIT = 366 * 24 * 60


# Attributes of `SlurmJob` that are parameters of submitit too.
_SAME_NAMES = ("nodes", "gpus_per_node", "cpus_per_task", "mem", "partition", "account", "qos", "constraint", "exclude",
               "nodelist", "dependency", "mail_type", "mail_user")  # fmt: skip


def make_submission_parameters(job: SlurmJob) -> dict[str, Any]:
    """Arguments of `SlurmExecutor.update_parameters`: one task on each node. Pure."""
    parameters = {
        "job_name": job.name,
        "ntasks_per_node": 1,
        "time": job.time or _NO_LIMIT,
        "signal_delay_s": job.signal_delay,
        **{name: getattr(job, name) for name in _SAME_NAMES},
    }
    # `wckey` is None below: clusters that track keys refuse submitit's.
    more: dict[str, Any] = {"signal": f"{job.signal}@{job.signal_delay}", "requeue": True}
    if job.reservation is not None:
        more["reservation"] = job.reservation
    # sbatch's name of an empty list is NIL.
    more["export"] = ",".join(job.environment) or "NIL"
    return {
        **{key: value for key, value in parameters.items() if value is not None},
        "wckey": None,
        "additional_parameters": more,
        # The signal that submitit handles in the tasks.
        "setup": [f"export SUBMITIT_PREEMPT_SIGNAL={job.signal}"],
        # By default srun passes only the variables of sbatch's --export, without those that the script sets.
        "srun_args": ["--export=ALL"],
    }


class JobExecutor(SlurmExecutor):
    """submitit's executor for one job; it can render the script on a machine without SLURM.

    The folder gets the script, the pickle and the tasks' output: it must be private and shared by the nodes.
    """

    def __init__(self, job: SlurmJob, folder: Path, python: str) -> None:
        # -P: packages in the working directory with the launcher's names must not be imported instead.
        super().__init__(folder, max_num_timeout=_TIMEOUTS, python=f"{shlex.quote(python)} -P")
        # Set when sbatch has accepted the job, even if submitit then fails to move its files.
        self.submitted_id: str | None = None
        self._job = job
        self.update_parameters(**make_submission_parameters(job))

    @classmethod
    def affinity(cls) -> int:
        """Always available: submitit checks for `srun` here, the launcher checks for `sbatch` before it submits."""
        return 2

    def batch_script(self) -> str:
        """The script, byte for byte as `sbatch` gets it."""
        return self._make_submission_file_text(self._submitit_command_str, "")

    def _get_job_id_from_submission_command(  # pyright: ignore[reportIncompatibleMethodOverride] -- called on self
        self, string: bytes | str
    ) -> str:
        self.submitted_id = super()._get_job_id_from_submission_command(string)
        return self.submitted_id

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        text = super()._make_submission_file_text(command, uid)
        return text if self._job.time else text.replace(f"#SBATCH --time={_NO_LIMIT}\n", "", 1)


class ArrayExecutor(JobExecutor):
    """submitit's executor for a job array: one script, and a pickle for each member.

    submitit's `submit_array` cannot leave out indices, and does not render the script.
    """

    def __init__(self, job: SlurmJob, folder: Path, python: str, choice: ArrayChoice) -> None:
        super().__init__(job, folder, python)
        self._choice = choice
        # submitit then names the tasks' output by array and member.
        self.parameters["map_count"] = len(choice.indices)
        self.parameters["additional_parameters"]["array"] = str(choice)

    def submit_members(self, tasks: Sequence[Callable[[], Any]]) -> str:
        """Submit the tasks of the chosen members; returns the array's job number (member 3 of array 42 is job 42_3).

        Raises:
            FailedJobError, FailedSubmissionError: from submitit, with sbatch's message.
        """
        pickles: list[Path] = []
        for task in tasks:
            delayed = DelayedSubmission(task)
            delayed.set_timeout(self.parameters["time"], self.max_num_timeout)
            pickles.append(self.folder / f"{uuid.uuid4().hex}.pkl")
            delayed.dump(pickles[-1])
        job_id = self._submit_command(self._submitit_command_str).job_id
        for index, pickle in zip(self._choice.indices, pickles, strict=True):
            # A member that starts before its pickle exists waits for it.
            JobPaths(self.folder, f"{job_id}_{index}").move_temporary_file(pickle, "submitted_pickle")
        return job_id
