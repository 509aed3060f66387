"""The task on the node in submitit's process; the launcher's agent and scontrol are small programs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from slurm.attempts import read_attempts
from slurm.environment import SlurmTask
from slurm.job import SlurmJob
from slurm.render import JobExecutor
from slurm.rendezvous import Endpoint
from slurm.task import FitRequest, FitTask, make_agent_command
from tests.support.stand_ins import TAKEN, StandIns

# Processes start.
pytestmark = pytest.mark.slow

# Prints that it runs, records its arguments, and ends with CODE after saving STEP when it is asked to stop.
_AGENT = """
import json, os, pathlib, signal, sys, time
run, step, code = pathlib.Path(sys.argv[1]), int(os.environ["STEP"]), int(os.environ["CODE"])
def stop(number, frame):
    (run / "checkpoints").mkdir(exist_ok=True)
    (run / "checkpoints" / "last.ckpt.manifest").write_text(json.dumps({"step": step}))
    sys.exit(128 + number if code < 0 else code)
signal.signal(signal.SIGUSR1, stop)
is_ignored = signal.getsignal(signal.SIGUSR2) == signal.SIG_IGN
(run / "started.json").write_text(json.dumps([sys.argv[2:], sorted(os.environ), is_ignored]))
print("agent runs", flush=True)
os.kill(os.getpid(), signal.SIGUSR2)  # SLURM signals every process of the job
if os.environ.get("MISSING"):
    with (run / "events.jsonl").open("a") as events:
        events.write(json.dumps({"time": time.time(), "kind": "nodes_missing", "nodes": [1]}) + "\\n")
if os.environ.get("AT_ONCE"):
    sys.exit(code)
while True:
    signal.pause()
"""


class Node:
    """A task of job 7, as srun would start it."""

    def __init__(self, folder: Path, **more: object) -> None:
        self.run = folder / "run"
        self.folder = self.run / "submissions" / "1"
        self.folder.mkdir(parents=True)
        agent = folder / "agent.py"
        agent.write_text(_AGENT)
        self.slurm = StandIns(folder / "bin", {"sbatch": (0, TAKEN[1].replace("42", "7"), ""), "scontrol": (0, "", ""),
                                                "scancel": (0, "", "")})  # fmt: skip
        request = FitRequest(
            run=str(self.run),
            folder=str(self.folder),
            command=(sys.executable, str(agent), str(self.run)),
            cwd=str(folder),
            ranks_per_node=2,
            signal="USR2",
            **{"nodes": 1, **more},
        )  # type: ignore[arg-type]
        before = os.environ["PATH"]
        os.environ["PATH"] = self.slurm.env["PATH"]
        try:
            JobExecutor(SlurmJob("it"), self.folder, sys.executable).submit(FitTask(request))
        finally:
            os.environ["PATH"] = before

    def attempt(
        self,
        *,
        restarts: int = 0,
        step: int = 0,
        code: int = -1,
        warn: bool = True,
        at_once: bool = False,
        missing: bool = False,
        env: Mapping[str, str] | None = None,
    ) -> int:
        """One attempt of the job, warned once the agent runs; its exit code, 1 for an error."""
        env = {**os.environ, **self.slurm.env, "SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NODEID": "0",
               "SLURM_STEP_ID": "0", "SLURM_NTASKS": "1", "SLURM_RESTART_COUNT": str(restarts),
               "SUBMITIT_EXECUTOR": "slurm", "STEP": str(step), "CODE": str(code),
               "AT_ONCE": "1" if at_once else "", "MISSING": "1" if missing else "", **(env or {})}  # fmt: skip
        command = [sys.executable, "-u", "-m", "submitit.core._submit", str(self.folder)]
        self.output = ""
        with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                self.output += line
                if line == "agent runs\n" and warn:
                    process.send_signal(signal.SIGUSR2)
            return process.wait(60)


def test_a_warned_job_stops_its_ranks_and_is_requeued_with_exit_code_75(tmp_path: Path) -> None:
    node = Node(tmp_path)
    assert node.attempt(step=12) == 75, node.output
    assert node.slurm.calls("scontrol") == [["requeue", "7"]]
    assert "stopped and saved at step 12; the job is queued again" in node.output
    arguments, names, is_ignored = json.loads((node.run / "started.json").read_text())
    assert arguments == ["--nproc-per-node", "2", "--resume", "auto"]
    assert is_ignored, "only the task handles the warning to the whole job"
    assert "SLURM_JOB_ID" in names
    assert not {"SLURM_PROCID", "SLURM_NTASKS"} & set(names), "ranks of the agent are no tasks of srun's"
    # The same pickle is run again.
    assert node.attempt(restarts=1, step=20) == 75, node.output
    assert [(a.number, a.step) for a in read_attempts(node.folder)] == [(0, 0), (1, 12)]


def test_a_job_without_progress_is_not_requeued(tmp_path: Path) -> None:
    node = Node(tmp_path, fruitless_limit=2)
    assert node.attempt(step=5) == 75, node.output
    assert node.attempt(restarts=1, step=5) == 75, node.output
    assert node.attempt(restarts=2, step=5) != 0
    assert len(node.slurm.calls("scontrol")) == 2, "the third time it is not requeued"
    assert "no progress: the last 2 attempts saved nothing beyond step 5; not requeued" in node.output


def test_a_job_without_progress_that_slurm_requeues_ends(tmp_path: Path) -> None:
    node = Node(tmp_path, fruitless_limit=2)
    for restarts in range(2):
        assert node.attempt(restarts=restarts, warn=False, at_once=True, code=143) == 143, node.output
    assert node.attempt(restarts=2, warn=False, at_once=True, code=0) == 1
    assert "no progress: the last 2 attempts" in node.output
    assert len(read_attempts(node.folder)) == 2, "it did not train"


@pytest.mark.parametrize(
    ("code", "message"), [(0, "before it could be stopped"), (1, "exit code 1 while they were stopping")]
)
def test_a_training_that_ends_before_it_is_stopped_is_not_requeued(tmp_path: Path, code: int, message: str) -> None:
    node = Node(tmp_path)
    assert node.attempt(code=code) == code, node.output
    assert node.slurm.calls("scontrol") == []
    assert message in node.output


@pytest.mark.parametrize("code", [0, 1, 3])
def test_without_a_warning_the_job_has_the_exit_code_of_the_agent(tmp_path: Path, code: int) -> None:
    node = Node(tmp_path)
    assert node.attempt(code=code, warn=False, at_once=True) == code, node.output
    assert node.slurm.calls("scontrol") == []


def test_a_restarted_job_with_missing_nodes_is_requeued(tmp_path: Path) -> None:
    node = Node(tmp_path, fruitless_limit=2)
    assert node.attempt(restarts=1, warn=False, at_once=True, code=2, missing=True) == 75, node.output
    assert node.slurm.calls("scontrol") == [["requeue", "7"]]
    assert "node 1 did not join; the job is queued again" in node.output
    # An event of an earlier attempt does not count.
    assert node.attempt(restarts=2, warn=False, at_once=True, code=2) == 2
    assert len(node.slurm.calls("scontrol")) == 1


def test_a_member_of_an_array_is_requeued_or_ended_without_the_others(tmp_path: Path) -> None:
    node = Node(tmp_path)
    # The array has the number of one member.
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    shutil.copy(node.folder / "7_submitted.pkl", node.folder / "7_3_submitted.pkl")
    assert node.attempt(restarts=1, warn=False, at_once=True, code=2, missing=True, env=array) == 75, node.output
    assert node.attempt(warn=False, at_once=True, code=2, missing=True, env=array) == 2, node.output
    assert (node.slurm.calls("scontrol"), node.slurm.calls("scancel")) == ([["requeue", "7_3"]], [["7_3.0"]])


def test_node_1_requeues_or_ends_the_job_if_node_0_is_missing(tmp_path: Path) -> None:
    node = Node(tmp_path, fruitless_limit=2, nodes=2, join_timeout=0.2)
    for restarts, code in ((0, 1), (1, 75), (2, 1)):
        for number in ("2", "1"):
            ended = node.attempt(restarts=restarts, warn=False, env={"SLURM_NODEID": number, "SLURM_PROCID": number})
            assert ended == (code if number == "1" else 1), node.output
    assert (node.slurm.calls("scontrol"), node.slurm.calls("scancel")) == ([["requeue", "7"]], [["7.0"], ["7.0"]])
    assert "no progress: the last 2 attempts" in node.output


def test_missing_nodes_requeue_a_job_only_after_a_restart_and_with_a_limit(tmp_path: Path) -> None:
    first = Node(tmp_path / "first")
    assert first.attempt(warn=False, at_once=True, code=2, missing=True) == 2, first.output
    assert (first.slurm.calls("scontrol"), first.slurm.calls("scancel")) == ([], [["7.0"]])
    fruitless = Node(tmp_path / "fruitless", fruitless_limit=2)
    assert fruitless.attempt(restarts=1, warn=False, at_once=True, code=2, missing=True) == 75, fruitless.output
    assert fruitless.attempt(restarts=2, warn=False, at_once=True, code=2, missing=True) == 2, fruitless.output
    assert "no progress: the last 2 attempts" in fruitless.output
    refused = Node(tmp_path / "refused")
    refused.slurm = StandIns(
        tmp_path / "other-bin", {"scontrol": (1, "", "Job is not requeueable"), "scancel": (1, "", "no")}
    )
    assert refused.attempt(restarts=1, warn=False, at_once=True, code=2, missing=True) == 2
    assert "cannot be queued again: scontrol requeue: Job is not requeueable; submit again" in refused.output
    assert "the job step cannot be ended: scancel: no" in refused.output


def test_the_incomplete_pickle_of_a_killed_attempt_is_removed(tmp_path: Path) -> None:
    node = Node(tmp_path)
    (node.folder / "7_submitted.pkl.save_tmp").write_bytes(b"half")
    assert node.attempt(step=1) == 75, node.output


_REQUEST = FitRequest("/r/it", "/r/it/submissions/1", ("launcher", "fit"), "/cwd", 2, 8, "USR2")
_TASK = SlurmTask("7", 1, 2, 1, 3)


def _command(request: FitRequest, env: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    return make_agent_command(request, _TASK, Endpoint("n1", 4711, "ib0"), env)


def test_several_nodes_get_the_published_endpoint_and_its_interface() -> None:
    arguments, env = _command(_REQUEST, {"HOME": "/h", "SLURM_PROCID": "1"})
    assert arguments == ["launcher", "fit", "--nproc-per-node", "8", "--resume", "auto",
                     "--nnodes", "2", "--node-rank", "1", "--rdzv-conf", "join_timeout=600",
                     "--rdzv-endpoint", "n1:4711", "--rdzv-id", "7-3"]  # fmt: skip
    assert env == {"HOME": "/h", "GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "ib0"}


def test_an_interface_of_the_user_is_kept() -> None:
    _, env = _command(_REQUEST, {"NCCL_SOCKET_IFNAME": "eth7"})
    assert env == {"NCCL_SOCKET_IFNAME": "eth7", "GLOO_SOCKET_IFNAME": "ib0"}
    asked = FitRequest("/r/it", "/f", ("l",), "/cwd", 2, 8, "USR2", interface="hsn0")
    _, env = _command(asked, {"NCCL_SOCKET_IFNAME": "eth7"})
    assert env == {"NCCL_SOCKET_IFNAME": "hsn0", "GLOO_SOCKET_IFNAME": "hsn0"}


def test_the_first_checkpoint_is_used_until_the_run_has_its_own(tmp_path: Path) -> None:
    request = FitRequest(str(tmp_path), "/f", ("l",), "/cwd", 1, 1, "USR2", resume_from="/old/last.ckpt")
    assert make_agent_command(request, _TASK, None, {})[0][-2:] == ["--resume", "/old/last.ckpt"]
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt.manifest").touch()
    assert make_agent_command(request, _TASK, None, {})[0][-2:] == ["--resume", "auto"]


def test_a_plain_script_follows_the_options_of_the_node_and_resumes_itself(tmp_path: Path) -> None:
    script = ("-m", "pkg.train", "--lr", "1")
    request = FitRequest(str(tmp_path), str(tmp_path), ("launcher", "run"), "/cwd", 2, 8, "USR2", script=script)
    arguments, _ = _command(request, {})
    assert arguments[:4] == ["launcher", "run", "--nproc-per-node", "8"]
    assert arguments[-len(script) :] == list(script)
    assert "--resume" not in arguments
    assert make_agent_command(request, _TASK, None, {})[0][2:] == ["--nproc-per-node", "8", *script]


def test_a_plain_script_is_queued_again_however_often(tmp_path: Path) -> None:
    node = Node(tmp_path, fruitless_limit=1, script=("train.py",))
    for restarts in range(3):
        assert node.attempt(restarts=restarts) == 75, node.output
    assert "stopped; the job is queued again" in node.output
