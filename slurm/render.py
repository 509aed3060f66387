"""A job as submitit's parameters, and the batch script that submitit makes of them."""

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

# submitit counts a preemption as a timeout and would stop at the third: what bounds requeues here is lost progress.
_TIMEOUTS = 1_000_000
# Minutes that submitit reckons with where the partition decides; its own default would be a limit of five.
_NO_LIMIT = 366 * 24 * 60


def submission_parameters(job: SlurmJob) -> dict[str, Any]:
    """What `SlurmExecutor.update_parameters` takes: one task on each node. Pure."""
    own = {
        "job_name": job.name,
        "nodes": job.nodes,
        "ntasks_per_node": 1,
        "gpus_per_node": job.gpus_per_node,
        "cpus_per_task": job.cpus_per_task,
        "time": job.time or _NO_LIMIT,
        "mem": job.mem,
        "partition": job.partition,
        "account": job.account,
        "qos": job.qos,
        "constraint": job.constraint,
        "exclude": job.exclude,
        "nodelist": job.nodelist,
        "dependency": job.dependency,
        "mail_type": job.mail_type,
        "mail_user": job.mail_user,
        "signal_delay_s": job.signal_delay,
    }
    # An accounting key of submitit's own is refused where keys are tracked.
    more: dict[str, Any] = {"signal": f"{job.signal}@{job.signal_delay}", "requeue": True}
    if job.reservation is not None:
        more["reservation"] = job.reservation
    # NIL and NONE are sbatch's words for an empty list.
    more["export"] = ",".join(job.environment) or "NIL"
    return {
        **{key: value for key, value in own.items() if value is not None},
        "wckey": None,
        "additional_parameters": more,
        # The tasks' submitit listens for this one.
        "setup": [f"export SUBMITIT_PREEMPT_SIGNAL={job.signal}"],
        # srun would hand on only what sbatch's --export names; the script itself has set more.
        "srun_args": ["--export=ALL"],
    }


class JobExecutor(SlurmExecutor):
    """submitit's executor for one job: what it would send can be looked at, also where there is no SLURM.

    Args:
        job: what to ask for.
        folder: for the script, the pickle and the tasks' output; shared by the nodes, and the user's alone.
        python: path of the nodes' Python.
    """

    def __init__(self, job: SlurmJob, folder: Path, python: str) -> None:
        # -P: a package of the user's with the name of one of ours, in the working directory, is not found first.
        super().__init__(folder, max_num_timeout=_TIMEOUTS, python=f"{shlex.quote(python)} -P")
        # Number of the job once sbatch has taken it, also where submitit then fails to put its files in place.
        self.taken: str | None = None
        self._job = job
        self.update_parameters(**submission_parameters(job))

    @classmethod
    def affinity(cls) -> int:
        """Say yes: submitit asks for `srun` on construction; whether there is a SLURM is told in our own words."""
        return 2

    def batch_script(self) -> str:
        """The script, byte for byte as `sbatch` will get it."""
        return self._make_submission_file_text(self._submitit_command_str, "")

    def _get_job_id_from_submission_command(  # pyright: ignore[reportIncompatibleMethodOverride] -- called on self
        self, string: bytes | str
    ) -> str:
        self.taken = super()._get_job_id_from_submission_command(string)
        return self.taken

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        text = super()._make_submission_file_text(command, uid)
        return text if self._job.time else text.replace(f"#SBATCH --time={_NO_LIMIT}\n", "", 1)


class ArrayExecutor(JobExecutor):
    """The same for a job array: one script, and a pickle for each member.

    submitit's own `submit_array` numbers its members from zero without a gap, and leaves the script to another one.

    Args:
        job: what each member asks for.
        folder: for the script, the pickles and the tasks' output.
        python: path of the nodes' Python.
        choice: which members run.
    """

    def __init__(self, job: SlurmJob, folder: Path, python: str, choice: ArrayChoice) -> None:
        super().__init__(job, folder, python)
        self._choice = choice
        # From here on submitit names the tasks' output by array and member.
        self.parameters["map_count"] = len(choice.indices)
        self.parameters["additional_parameters"]["array"] = str(choice)

    def submit_members(self, tasks: Sequence[Callable[[], Any]]) -> str:
        """Send the array.

        Args:
            tasks: of the chosen members, in the order of their indices.

        Returns:
            The array's job number; member 3 of array 42 is job 42_3.

        Raises:
            FailedJobError, FailedSubmissionError: from submitit, with sbatch's own words.
        """
        pickles: list[Path] = []
        for task in tasks:
            delayed = DelayedSubmission(task)
            delayed.set_timeout(self.parameters["time"], self.max_num_timeout)
            pickles.append(self.folder / f"{uuid.uuid4().hex}.pkl")
            delayed.dump(pickles[-1])
        job_id = self._submit_command(self._submitit_command_str).job_id
        for index, pickle in zip(self._choice.indices, pickles, strict=True):
            # A member that begins before its pickle is in place waits for it.
            JobPaths(self.folder, f"{job_id}_{index}").move_temporary_file(pickle, "submitted_pickle")
        return job_id
