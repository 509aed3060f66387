"""The command that continues a run has the ranks of the run, wherever it is shown and however the run was started."""

from __future__ import annotations

import dataclasses
import io
import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

from launcher.cli.config_commands import FIT
from launcher.cli.main import describe_unknown_command
from launcher.cli.submit import build_parser
from launcher.cli.summary import print_summary
from launcher.config.launch_options import read_launch_options
from launcher.config.loading import load_config
from launcher.config.schema import RunConfig
from launcher.core.events import EventLog
from launcher.jobs.status import read_run_status
from launcher.jobs.submission import JobOptions, prepare
from launcher.planning.plan import Plan, make_plan
from launcher.runs.continuation import find_command_to_continue, make_recorded_command
from launcher.runs.submission_record import write_record
from launcher.training.result import FitResult
from tests.support.rank_threads import CPU, ranks
from tests.support.run_directories import make_run

# GPUs of each machine on which the command is pasted: more than the runs had.
GPUS = 8


@dataclass(frozen=True)
class Start:
    """How a run was started: ranks, nodes, their devices, and the back end of a job."""

    ranks: int
    nodes: int = 1
    device: str = "cpu"
    cluster: str | None = None

    def make_plan(self) -> Plan:
        hosts = tuple(f"node{number}" for number in range(self.nodes))
        plan = make_plan(RunConfig(), ranks(CPU))
        return dataclasses.replace(
            plan, world_size=self.ranks, num_nodes=self.nodes, device_kind=self.device, hosts=hosts
        )

    def make_run(self, folder: Path) -> Path:
        fixed = {} if self.cluster is None else {"devices": self.ranks // self.nodes, "num_nodes": self.nodes}
        run = make_run(folder / "runs", "it", **fixed)
        (run / "plan.json").write_text(json.dumps(self.make_plan().to_dict()))
        if self.cluster is not None:
            (run / "submissions" / "1").mkdir(parents=True)
            write_record(run / "submissions" / "1", self.cluster)
        return run


STARTS = {
    "fit, one rank": Start(1),
    "fit, two ranks": Start(2),
    "fit, one of the GPUs": Start(1, device="cuda"),
    "torchrun, four GPUs": Start(4, device="cuda"),
    "two nodes of four ranks": Start(8, nodes=2),
    "two nodes of one rank": Start(2, nodes=2),
    "two nodes of four GPUs": Start(8, nodes=2, device="cuda"),
    "SLURM": Start(4, cluster="slurm"),
    "SLURM, two nodes": Start(8, nodes=2, cluster="slurm"),
    "SLURM, GPUs": Start(8, nodes=2, device="cuda", cluster="slurm"),
    "a job on this machine": Start(2, cluster="local"),
}


def show_when_done(run: Path, start: Start) -> str:
    stream = io.StringIO()
    print_summary(FitResult(run, start.make_plan(), {}, 3, run / "checkpoints" / "last.ckpt"), Console(file=stream))
    lines = stream.getvalue().splitlines()
    assert any(line.startswith("continue") for line in lines)
    command = lines[-1][12:]
    assert ("on each of the" in lines[-2]) == (start.nodes > 1 and start.cluster is None)
    return command.removeprefix("python -m ").removesuffix(" --trainer.max_epochs N")


def _show_status(run: Path, start: Start, *end: str) -> str:
    log = EventLog(run / "events.jsonl", 0)
    log.write("run_started")
    log.write("planned", plan=start.make_plan().to_dict())
    log.write("checkpoint", step=5, epoch=0)
    for kind in end:
        log.write(kind, signal=15, step=5, error="nan")
    status = read_run_status(run)
    assert ("on each of the" in status.advice) == (start.nodes > 1)
    return status.command


def show_when_stopped(run: Path, start: Start) -> str:
    return _show_status(run, start, "interrupted")


def show_when_failed(run: Path, start: Start) -> str:
    return _show_status(run, start, "failed")


def show_when_killed(run: Path, start: Start) -> str:
    return _show_status(run, start)


def show_by_wrong_command(run: Path, start: Start) -> str:
    return describe_unknown_command("resume", [str(run)]).splitlines()[-1].strip()


def count_ranks(command: str) -> int:
    """The ranks that the command starts, on all nodes."""
    program, name, *arguments = shlex.split(command)
    assert program == "launcher"
    if name == "submit":
        options, overrides = build_parser().parse_known_args(arguments)
        fixed = prepare(load_config(options.config, overrides), JobOptions.from_arguments(options), {}).config
        assert isinstance(fixed.devices, int)
        assert isinstance(fixed.num_nodes, int)
        return fixed.devices * fixed.num_nodes
    options, overrides = FIT.build_parser().parse_known_args(arguments)
    launch, config = read_launch_options(vars(options)), load_config(options.config, overrides)
    per_node = launch.nproc_per_node or (GPUS if config.devices == "auto" else config.devices)
    assert isinstance(per_node, int)
    return per_node * launch.max_nodes


ENDS = [show_when_done, show_when_stopped, show_when_failed, show_when_killed, show_by_wrong_command]
CASES = [
    pytest.param(start, show, id=f"{name}, {show.__name__}")
    for name, start in STARTS.items()
    for show in ENDS
    # The status of a job says to submit it again.
    if start.cluster is None or show in (show_when_done, show_by_wrong_command)
]


@pytest.mark.parametrize(("start", "show"), CASES)
def test_the_command_has_the_ranks_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: Start, show: Callable[[Path, Start], str]
) -> None:
    if start.device == "cpu":
        monkeypatch.setattr(f"{__name__}.GPUS", 1)
    run = start.make_run(tmp_path)
    command = show(run, start)
    assert count_ranks(command) == start.ranks
    assert ("--cluster local" in command) == (start.cluster == "local")
    assert ("--gpus-per-node" in command) == (start.cluster == "slurm" and start.device == "cuda")


@pytest.mark.parametrize("start", [start for start in STARTS.values() if start.cluster is not None])
def test_the_command_after_a_signal_to_a_job_has_its_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: Start
) -> None:
    run = start.make_run(tmp_path)
    argv = ["python", "-m", "launcher", "fit", "--config", f"{run}/submissions/1/config.yaml"]
    monkeypatch.setattr("sys.orig_argv", argv)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    command = find_command_to_continue(run)
    assert command is not None
    assert count_ranks(command.removeprefix("python -m ")) == start.ranks
    assert command.endswith("--name it --resume auto")


@pytest.mark.parametrize("size", [None, "1", "2"])
def test_the_command_after_a_signal_to_ranks_of_mpirun_has_their_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: str | None
) -> None:
    run = Start(int(size or 2)).make_run(tmp_path)
    monkeypatch.setattr("sys.orig_argv", ["python", "-m", "launcher", "fit", "--config", "run.yaml", "--name", "it"])
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if size is not None:
        monkeypatch.setenv("WORLD_SIZE", size)
    own = f"{run}/config.yaml --nproc-per-node 2" if size == "2" else "run.yaml"
    assert find_command_to_continue(run) == f"python -m launcher fit --config {own} --name it --resume auto"


@pytest.mark.parametrize("plan", [{}, {"world_size": 3, "num_nodes": 2}, {"world_size": "2", "num_nodes": 1}])
def test_a_plan_without_ranks_adds_no_option(tmp_path: Path, plan: dict[str, object]) -> None:
    command = make_recorded_command(tmp_path, plan)
    assert (command.text, command.nodes) == (f"launcher fit --config {tmp_path}/config.yaml --resume auto", 1)
