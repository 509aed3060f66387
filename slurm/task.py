"""What submitit runs on each node: the launcher's agent, stopped and requeued when SLURM warns the job."""

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
from slurm.attempts import fruitless, read_attempts, record_attempt, saved_step
from slurm.environment import OF_THE_TASK, SlurmTask, read_slurm_task
from slurm.queue import QueueCommandError, cancel_step, requeue_job
from slurm.rendezvous import Endpoint, RendezvousError, rendezvous
from slurm.unmet import missing_nodes

# What a job ends with that has saved and is queued again.
REQUEUED = 75
# Whoever chose interfaces by hand keeps them.
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@dataclass(frozen=True, slots=True)
class FitRequest:
    """What crosses from the submitting machine to the nodes. It holds no secret and no variable's value.

    Attributes:
        run: path of the run's directory, on a disk that the nodes share.
        folder: path of the folder in it for this submission.
        command: of the launcher's `fit`; how to start ranks is added on the node.
        cwd: working directory of the ranks.
        nodes: number of nodes.
        ranks_per_node: ranks on each node.
        signal: name of the warning, without SIG.
        resume_from: checkpoint to begin with, None for a fresh start or to go on with the run itself.
        fruitless_limit: attempts in a row without a saved step, after which the job is not requeued.
        interface: network interface to use, None for the one that the nodes reach each other by.
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


class FitTask:
    """The callable that submitit pickles. Its only state on the submitting side is the request."""

    def __init__(self, request: FitRequest) -> None:
        self._request = request
        self._agent: Agent | None = None
        self._requeued = False

    def __getstate__(self) -> FitRequest:
        return self._request

    def __setstate__(self, request: FitRequest) -> None:
        self.__init__(request)

    def __call__(self) -> int:
        """Train on this node until the run has ended.

        Returns:
            0: done, or ended in order because node 0 said so.

        Raises:
            SystemExit: with the job's exit code, where that is not 0.
        """
        request, task = self._request, _this_task()
        began, missing = time.time(), ()
        try:
            try:
                code = self._train(task)
            except RendezvousError as error:
                _say(f"error: {error}")
                code, missing = FAILED, error.missing
            except UncompletedJobError:
                # submitit's words for a job that it was told not to requeue; the agent has ended.
                code = FAILED if self._agent is None else self._agent.code
        except SystemExit:
            # submitit ends a job that it has requeued with a code of its own.
            if self._requeued:
                raise SystemExit(REQUEUED) from None
            raise
        if task.node > 0 and self._agent is not None and self._agent.stopped_in_order:
            # Some clusters kill the whole job when a task ends with an error: node 0 may be requeueing right now.
            code = 0
        missing = missing or missing_nodes(Path(request.run), began)
        # Node 0 sees to it, and where it is missing itself, node 1.
        acts = bool(code and missing) and task.node == (1 if 0 in missing else 0)
        if acts and self._begins_again(task, missing):
            raise SystemExit(REQUEUED)
        if code:
            _say(f"run {Path(request.run).name} ended with exit code {code} on node {task.node}")
            if acts:
                _end_others(task)
            raise SystemExit(code)
        return code

    def checkpoint(self) -> DelayedSubmission | None:
        """What submitit calls on node 0 when SLURM warns: stop the ranks at one step, and say whether to requeue.

        Returns:
            What the requeued job runs; None if it is not to be requeued.
        """
        request, task = self._request, _this_task()
        if self._agent is not None:
            code = self._agent.stop()
            if code == 0:
                _say("the training ended before it could be stopped: not requeued")
                return None
            if not self._agent.stopped_in_order:
                _say(f"the ranks ended with exit code {code} while they were stopping: not requeued")
                return None
        step = saved_step(Path(request.run))
        count = fruitless(read_attempts(Path(request.folder)), task.job_id, step)
        if count >= request.fruitless_limit:
            _say(_no_progress(count, step))
            return None
        _say(f"stopped and saved at step {step}; the job is queued again")
        _remove_torn_pickle()
        self._requeued = True
        return DelayedSubmission(FitTask(request))

    def _begins_again(self, task: SlurmTask, missing: Sequence[int]) -> bool:
        """Requeue a job that was requeued before, and whose nodes do not all come now: SLURM may choose others."""
        if task.restart_count == 0:
            return False
        step, folder = saved_step(Path(self._request.run)), Path(self._request.folder)
        if task.node > 0:
            # Node 0 has not: without it there would be no end of requeues.
            record_attempt(folder, task.job_id, task.restart_count, step, socket.gethostname())
        count = fruitless(read_attempts(folder), task.job_id, step)
        if count >= self._request.fruitless_limit:
            _say(_no_progress(count, step))
            return False
        try:
            requeue_job(task.queue_id)
        except QueueCommandError as error:
            _say(f"the job cannot be queued again: {error}; submit again with --resume auto")
            return False
        _say(f"node {', '.join(map(str, missing))} never came; the job is queued again")
        return True

    def _train(self, task: SlurmTask) -> int:
        request = self._request
        run, folder = Path(request.run), Path(request.folder)
        if task.node == 0:
            step = saved_step(run)
            count = fruitless(read_attempts(folder), task.job_id, step)
            if count >= request.fruitless_limit:
                _say(_no_progress(count, step))
                if request.nodes > 1:
                    _end_others(task)
                return FAILED
            record_attempt(folder, task.job_id, task.restart_count, step, socket.gethostname())
        with _rendezvous(request, task) as place:
            words, variables = agent_command(request, task, place, os.environ)
            self._agent = Agent(words, request.cwd, variables, request.signal)
            return self._agent.wait()


def agent_command(
    request: FitRequest, task: SlurmTask, place: Endpoint | None, env: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    """The words and the environment of a node's agent. Pure, but for a look whether the run has begun.

    Args:
        request: what to train.
        task: this node's place.
        place: where the nodes meet; None with one node.
        env: this process's environment.
    """
    words = [*request.command, "--nproc-per-node", str(request.ranks_per_node)]
    begun = any((Path(request.run) / "checkpoints").glob("*.manifest"))
    # A requeued job has come further than the checkpoint that it was begun with.
    words += ["--resume", "auto" if begun or request.resume_from is None else request.resume_from]
    # They say that this process is one of srun's tasks; the agent and its ranks are none.
    variables = {name: value for name, value in env.items() if name not in OF_THE_TASK}
    if place is None:
        return words, variables
    words += ["--nnodes", str(request.nodes), "--node-rank", str(task.node)]
    words += ["--rdzv-conf", f"join_timeout={request.join_timeout:g}"]
    words += ["--rdzv-endpoint", f"{place.host}:{place.port}", "--rdzv-id", f"{task.job_id}-{task.restart_count}"]
    interface = request.interface or place.interface
    if interface is not None:
        for name in INTERFACE_VARIABLES:
            if request.interface is not None:
                variables[name] = interface
            else:
                variables.setdefault(name, interface)
    return words, variables


@contextmanager
def _rendezvous(request: FitRequest, task: SlurmTask) -> Generator[Endpoint | None]:
    """Where the nodes meet, with its port reserved as long as the agent runs."""
    if request.nodes == 1:
        yield None
        return
    file = Path(request.folder) / f"rendezvous-{task.job_id}-{task.restart_count}.json"
    names = [os.environ.get("SLURMD_NODENAME", socket.gethostname()), socket.gethostname()]
    with rendezvous(file, task.node, request.nodes, names, request.join_timeout) as place:
        yield place


def _end_others(task: SlurmTask) -> None:
    """Else srun waits for tasks that wait for this one or never begin, and the job keeps its nodes all its time."""
    try:
        cancel_step(task.queue_id, task.step)
    except QueueCommandError as error:
        _say(f"the job step cannot be ended: {error}")


def _this_task() -> SlurmTask:
    task = read_slurm_task(os.environ)
    if task is None:
        raise RuntimeError("this is a task of a SLURM job, but SLURM's variables are not set")
    return task


def _no_progress(count: int, step: int) -> str:
    return (
        f"no progress: the last {count} attempts saved nothing beyond step {step}; not requeued. Look at the ranks' "
        "logs; give more --time, save more often (checkpoint.every_n_steps), then submit again with --resume auto"
    )


def _remove_torn_pickle() -> None:
    """Make way: submitit refuses to save where an attempt that was killed while saving has left its half."""
    file = JobEnvironment().paths.submitted_pickle
    file.with_suffix(f"{file.suffix}.save_tmp").unlink(missing_ok=True)


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
