"""The task that submitit runs on each node: starts the launcher's agent, and requeues the job when SLURM warns it."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from submitit.core.job_environment import JobEnvironment
from submitit.core.utils import DelayedSubmission, UncompletedJobError

from slurm.agent import FAILED, Agent
from slurm.attempts import count_fruitless, read_attempts, read_missing_nodes, read_saved_step, record_attempt
from slurm.environment import TASK_VARIABLES, SlurmTask, read_slurm_task
from slurm.queue import QueueCommandError, cancel_step, requeue_job
from slurm.rendezvous import Endpoint, RendezvousError, rendezvous

# Exit code of a job that has saved and is queued again.
REQUEUED = 75
# Set only where the user has not chosen an interface.
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@dataclass(frozen=True, slots=True)
class FitRequest:
    """The message to the nodes, as a pickle. It contains no secret and no variable's value.

    Attributes:
        run: path of the run's directory, on a disk that the nodes share.
        folder: path of this submission's folder in it.
        command: of the launcher's `fit` or `run`; the node adds how to start ranks.
        script: what follows after that, a plain script with its arguments; empty for `fit`.
        cwd: working directory of the ranks.
        signal: name of the warning, without SIG.
        resume_from: checkpoint to start from; None for a fresh start or to resume the run itself.
        fruitless_limit: attempts in a row without a saved step, after which the job is not requeued.
        interface: network interface; None for the one on which the nodes reach each other.
        join_timeout: seconds that the nodes wait for each other.
    """

    run: str
    folder: str
    command: tuple[str, ...]
    cwd: str
    nodes: int
    ranks_per_node: int
    signal: str
    resume_from: str | None = None
    fruitless_limit: int = 3
    interface: str | None = None
    join_timeout: float = 600.0
    script: tuple[str, ...] = ()


class FitTask:
    """The callable that submitit pickles. Only the request is pickled."""

    def __init__(self, request: FitRequest) -> None:
        self._request = request
        self._agent: Agent | None = None
        self._requeued = False

    def __getstate__(self) -> FitRequest:
        return self._request

    def __setstate__(self, request: FitRequest) -> None:
        self.__init__(request)

    def __call__(self) -> int:
        """Train on this node until the run has ended; returns 0 if it is done, or if node 0 stops the job.

        Raises:
            SystemExit: with the job's exit code, if it is not 0.
        """
        request, task = self._request, _current_task()
        started, missing = time.time(), ()
        try:
            try:
                code = self._train(task)
            except RendezvousError as error:
                _print(f"error: {error}")
                code, missing = FAILED, error.missing
            except UncompletedJobError:
                # submitit's error for a job that is not requeued; the agent has ended.
                code = FAILED if self._agent is None else self._agent.code
        except SystemExit:
            # submitit has its own exit code for a requeued job.
            if self._requeued:
                raise SystemExit(REQUEUED) from None
            raise
        if task.node > 0 and self._agent is not None and self._agent.has_stopped_on_request:
            # Some clusters kill the whole job when a task fails, and node 0 may be requeueing it right now.
            code = 0
        missing = missing or read_missing_nodes(Path(request.run), started)
        # Node 0 requeues the job, or node 1 if node 0 is missing.
        is_responsible = bool(code and missing) and task.node == (1 if 0 in missing else 0)
        if is_responsible and self._requeue(task, missing):
            raise SystemExit(REQUEUED)
        if code:
            _print(f"run {Path(request.run).name} ended with exit code {code} on node {task.node}")
            if is_responsible:
                _end_other_tasks(task)
            raise SystemExit(code)
        return code

    def checkpoint(self) -> DelayedSubmission | None:
        """Stop all ranks at one step; submitit calls it on node 0 when SLURM warns the job.

        Returns:
            The task of the requeued job; None if it is not requeued.
        """
        request, task = self._request, _current_task()
        if self._agent is not None:
            code = self._agent.stop()
            if code == 0:
                _print("the training ended before it could be stopped: not requeued")
                return None
            if not self._agent.has_stopped_on_request:
                _print(f"the ranks ended with exit code {code} while they were stopping: not requeued")
                return None
        step = self._find_progress(task)
        if step is None:
            return None
        _print(f"stopped{'' if _script_of(request) else f' and saved at step {step}'}; the job is queued again")
        _remove_incomplete_pickle()
        self._requeued = True
        return DelayedSubmission(FitTask(request))

    def _find_progress(self, task: SlurmTask) -> int | None:
        """The saved step; None, with a message, if too many attempts in a row have saved nothing new.

        The progress of a plain script is not known: every attempt counts as a step.
        """
        if _script_of(self._request):
            return len(read_attempts(Path(self._request.folder)))
        step = read_saved_step(Path(self._request.run))
        count = count_fruitless(read_attempts(Path(self._request.folder)), task.job_id, step)
        if count < self._request.fruitless_limit:
            return step
        _print(
            f"no progress: the last {count} attempts saved nothing beyond step {step}; not requeued. Read the ranks' "
            "logs; give more --time, save more often (checkpoint.every_n_steps), then submit again with --resume auto"
        )
        return None

    def _record_attempt(self, task: SlurmTask, step: int) -> None:
        record_attempt(Path(self._request.folder), task.job_id, task.restart_count, step, socket.gethostname())

    def _requeue(self, task: SlurmTask, missing: Sequence[int]) -> bool:
        """Requeue a job that ran before if nodes are missing now: SLURM may choose others."""
        if task.restart_count == 0:
            return False
        if task.node > 0:
            # Node 0 did not record this attempt; without a record the requeues would not end.
            self._record_attempt(task, read_saved_step(Path(self._request.run)))
        if self._find_progress(task) is None:
            return False
        try:
            requeue_job(task.queue_id)
        except QueueCommandError as error:
            _print(f"the job cannot be queued again: {error}; submit again with --resume auto")
            return False
        _print(f"node {', '.join(map(str, missing))} did not join; the job is queued again")
        return True

    def _train(self, task: SlurmTask) -> int:
        request = self._request
        if task.node == 0:
            step = self._find_progress(task)
            if step is None:
                if request.nodes > 1:
                    _end_other_tasks(task)
                return FAILED
            self._record_attempt(task, step)
        with _rendezvous(request, task) as endpoint:
            arguments, variables = make_agent_command(request, task, endpoint, os.environ)
            self._agent = Agent(arguments, request.cwd, variables, request.signal)
            return self._agent.wait()


def make_agent_command(
    request: FitRequest, task: SlurmTask, endpoint: Endpoint | None, env: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    """The arguments and the environment of a node's agent; `endpoint` is None with one node."""
    arguments = [*request.command, "--nproc-per-node", str(request.ranks_per_node)]
    script = _script_of(request)
    if not script:
        has_checkpoint = any((Path(request.run) / "checkpoints").glob("*.manifest"))
        # The run's own checkpoints are newer than the one that it started from.
        resume = "auto" if has_checkpoint or request.resume_from is None else request.resume_from
        arguments += ["--resume", resume]
    # With these variables, libraries would take the agent and its ranks for srun's tasks.
    variables = {name: value for name, value in env.items() if name not in TASK_VARIABLES}
    if endpoint is None:
        return [*arguments, *script], variables
    arguments += ["--nnodes", str(request.nodes), "--node-rank", str(task.node)]
    arguments += ["--rdzv-conf", f"join_timeout={request.join_timeout:g}"]
    arguments += ["--rdzv-endpoint", f"{endpoint.host}:{endpoint.port}"]
    arguments += ["--rdzv-id", f"{task.job_id}-{task.restart_count}"]
    if request.interface is not None:
        variables |= dict.fromkeys(INTERFACE_VARIABLES, request.interface)
    elif endpoint.interface is not None:
        variables = {**dict.fromkeys(INTERFACE_VARIABLES, endpoint.interface), **variables}
    return [*arguments, *script], variables


def _script_of(request: FitRequest) -> tuple[str, ...]:
    # An earlier version has pickled requests without it.
    return getattr(request, "script", ())


@contextmanager
def _rendezvous(request: FitRequest, task: SlurmTask) -> Generator[Endpoint | None]:
    """The rendezvous of the nodes; its port is reserved while the agent runs."""
    if request.nodes == 1:
        yield None
        return
    file = Path(request.folder) / f"rendezvous-{task.job_id}-{task.restart_count}.json"
    names = [os.environ.get("SLURMD_NODENAME", socket.gethostname()), socket.gethostname()]
    with rendezvous(file, task.node, request.nodes, names, request.join_timeout) as endpoint:
        yield endpoint


def _end_other_tasks(task: SlurmTask) -> None:
    """End the step: otherwise srun waits for tasks that wait for this one, and the job keeps its nodes."""
    try:
        cancel_step(task.queue_id, task.step)
    except QueueCommandError as error:
        _print(f"the job step cannot be ended: {error}")


def _current_task() -> SlurmTask:
    task = read_slurm_task(os.environ)
    if task is None:
        raise RuntimeError("this is a task of a SLURM job, but SLURM's variables are not set")
    return task


def _remove_incomplete_pickle() -> None:
    """Remove the file of an attempt that was killed while it saved: submitit refuses to overwrite it."""
    file = JobEnvironment().paths.submitted_pickle
    file.with_suffix(f"{file.suffix}.save_tmp").unlink(missing_ok=True)


def _print(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
