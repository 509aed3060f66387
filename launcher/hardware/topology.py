"""The place of this process among the ranks, read once from a mapping of environment variables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from launcher.core.errors import TopologyError
from launcher.hardware.mpi_ranks import to_torchrun_variables
from slurm.environment import SlurmEnvironmentError, read_slurm_task

Source = Literal["torchrun", "slurm", "single"]

_REQUIRED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# A shell may export an address or a port; only these variables show that a program started ranks.
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True, slots=True)
class Topology:
    """The place of one rank, with torchrun's names.

    Attributes:
        source: what started the ranks.
        master_addr: host of the store; None with one rank.
        master_port: port of the store; None with one rank.
        agent_store: whether the agent of torchelastic serves that store, instead of rank 0.
        restart_count: restarts of the ranks by the agent of this node, or of the job by SLURM.
        run_id: name of the rendezvous, or job id of SLURM.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int
    host: str
    source: Source
    master_addr: str | None = None
    master_port: int | None = None
    agent_store: bool = False
    restart_count: int = 0
    run_id: str | None = None

    @property
    def num_nodes(self) -> int:
        """Number of nodes, each with the same number of ranks."""
        return self.world_size // self.local_world_size

    @classmethod
    def single(
        cls, host: str, *, source: Source = "single", run_id: str | None = None, restart_count: int = 0
    ) -> Topology:
        """The place of a process that is the only rank."""
        return cls(0, 1, 0, 1, 0, host, source, run_id=run_id, restart_count=restart_count)

    @classmethod
    def from_env(cls, env: Mapping[str, str], host: str) -> Topology:
        """Read the place of this process from its environment, on the machine named `host`.

        Raises:
            TopologyError: variables are missing or contradict each other (lists all); or `srun`, mpirun or Kubeflow
                started ranks that cannot be used.
        """
        env = {**env, **to_torchrun_variables(env)}
        if any(name in env for name in _RANK_VARIABLES):
            return _from_torchrun(env, host)
        try:
            task = read_slurm_task(env)
        except SlurmEnvironmentError as error:
            raise TopologyError(str(error)) from error
        if task is None:
            return cls.single(host)
        if task.tasks > 1 and not task.has_one_task_per_node:
            raise TopologyError(
                f"srun started {task.tasks} tasks on {task.nodes} nodes; the launcher needs one task a node, which "
                "starts the ranks: srun --ntasks-per-node=1 python -m launcher fit ..."
            )
        return cls.single(host, source="slurm", run_id=task.job_id, restart_count=task.restart_count)


def _from_torchrun(env: Mapping[str, str], host: str) -> Topology:
    missing = [name for name in _REQUIRED if not env.get(name)]
    if missing:
        given = ", ".join(f"{name}={env[name]}" for name in _REQUIRED if env.get(name))
        raise TopologyError(
            f"{given or 'no value'} set, but {', '.join(missing)} missing; start with torchrun, which sets "
            f"all of them, or unset {', '.join(n for n in _RANK_VARIABLES if n in env)} to train in one process"
        )
    numbers: dict[str, int] = {}
    wrong: list[str] = []
    for name, default in [*((n, None) for n in _REQUIRED if n != "MASTER_ADDR"),
                          ("GROUP_RANK", "0"), ("TORCHELASTIC_RESTART_COUNT", "0")]:  # fmt: skip
        text = env.get(name) or default or ""
        if text.isdecimal():
            numbers[name] = int(text)
        else:
            wrong.append(f"{name}={text!r} is not an integer")
    if not wrong:
        wrong = _contradictions(numbers)
    if wrong:
        raise TopologyError("; ".join(wrong))
    return Topology(
        rank=numbers["RANK"],
        world_size=numbers["WORLD_SIZE"],
        local_rank=numbers["LOCAL_RANK"],
        local_world_size=numbers["LOCAL_WORLD_SIZE"],
        node_rank=numbers["GROUP_RANK"],
        host=host,
        source="torchrun",
        master_addr=env["MASTER_ADDR"],
        master_port=numbers["MASTER_PORT"],
        agent_store=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        restart_count=numbers["TORCHELASTIC_RESTART_COUNT"],
        run_id=env.get("TORCHELASTIC_RUN_ID"),
    )


def _contradictions(numbers: Mapping[str, int]) -> list[str]:
    wrong: list[str] = []
    for rank, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if numbers[rank] >= numbers[size]:
            wrong.append(f"{rank}={numbers[rank]} must be below {size}={numbers[size]}")
    if numbers["LOCAL_WORLD_SIZE"] > numbers["WORLD_SIZE"]:
        wrong.append(f"LOCAL_WORLD_SIZE={numbers['LOCAL_WORLD_SIZE']} exceeds WORLD_SIZE={numbers['WORLD_SIZE']}")
    if not 0 < numbers["MASTER_PORT"] <= 65535:
        wrong.append(f"MASTER_PORT={numbers['MASTER_PORT']} is not a port")
    return wrong
