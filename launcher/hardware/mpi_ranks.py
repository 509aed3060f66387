"""Ranks that mpirun, jsrun or Kubeflow made, in torchrun's variables. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from launcher.core.errors import TopologyError

# Who made the ranks: its variables of rank, world size, local rank and ranks on this node.
_ENDS = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
_MADE_BY = {
    "mpirun": tuple(f"OMPI_COMM_WORLD_{end}" for end in _ENDS),
    "mpirun_rsh": tuple(f"MV2_COMM_WORLD_{end}" for end in _ENDS),
    "jsrun": tuple(f"JSM_NAMESPACE_{end}" for end in _ENDS),
    "mpiexec": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}
_TORCHRUNS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_ADDRESS = ("MASTER_ADDR", "MASTER_PORT")


def as_torchrun_variables(env: Mapping[str, str]) -> dict[str, str]:
    """What torchrun would have set for the rank that somebody else has made; empty if nobody has.

    Args:
        env: the environment; where torchrun's own variables are in it they are what counts.

    Raises:
        TopologyError: there are several ranks that cannot find each other: they would train a model each.
    """
    if any(name in env for name in _TORCHRUNS):
        return _kubeflow(env)
    _refuse_pods(env)
    for starter, names in _MADE_BY.items():
        # srun sets PMI's too, and SLURM's own say more.
        if names[1] in env and not (starter == "mpiexec" and "SLURM_PROCID" in env):
            return _mpi(starter, names, env)
    return {}


def without_starters(env: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that says itself which node's agent it is, whoever started it."""
    theirs = {name for names in _MADE_BY.values() for name in names} | {"PET_NNODES"}
    return {name: value for name, value in env.items() if name not in theirs}


def _mpi(starter: str, names: tuple[str, ...], env: Mapping[str, str]) -> dict[str, str]:
    texts = [env.get(name, "") for name in names]
    if texts[1] == "1":
        return {}
    how = f"{starter} started {texts[1]} processes"
    if not all(text.isdecimal() for text in texts):
        wrong = ", ".join(f"{name}={env.get(name)!r}" for name in names)
        raise TopologyError(f"{how}, but does not say which this one is ({wrong}); start one process on each node: "
                            "python -m launcher fit --nnodes N --node-rank I --rdzv-endpoint HOST:PORT")  # fmt: skip
    missing = [name for name in _ADDRESS if not env.get(name)]
    if missing:
        raise TopologyError(
            f"{how}, and {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set, so they would train a "
            f"model each; hand them on ({starter} -x MASTER_ADDR=HOST_OF_RANK_0 -x MASTER_PORT=29500 or its own way), "
            "or start one process, which makes the ranks itself: python -m launcher fit"
        )
    rank, _, local, local_size = map(int, texts)
    if local_size < 1 or rank % local_size != local:
        raise TopologyError(f"{how}, and rank {rank} is number {local} of {local_size} on its node; the launcher wants "
                            "the ranks of a node to follow each other: --map-by slot")  # fmt: skip
    return {**dict(zip(_TORCHRUNS, texts, strict=True)), "GROUP_RANK": str(rank // local_size)}


def _kubeflow(env: Mapping[str, str]) -> dict[str, str]:
    """A PyTorchJob makes one rank a pod, and leaves out what is the same in all."""
    if not ("KUBERNETES_SERVICE_HOST" in env or "KUBERNETES_PORT" in env) or not (
        env.get("RANK") and env.get("WORLD_SIZE")
    ):
        return {}
    if "LOCAL_RANK" in env or "LOCAL_WORLD_SIZE" in env:
        return {}
    in_pod = env.get("PET_NPROC_PER_NODE") or "1"
    if in_pod not in ("1", "auto"):
        raise TopologyError(f"Kubeflow asks for {in_pod} ranks in each pod (PET_NPROC_PER_NODE); start them with "
                            "torchrun, which reads its PET_ variables: torchrun -m launcher fit")  # fmt: skip
    return {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": env["RANK"]}


def _refuse_pods(env: Mapping[str, str]) -> None:
    """Kubeflow's trainer sets torchrun's settings alone."""
    most = (env.get("PET_NNODES") or "1").rpartition(":")[2]
    if most.isdecimal() and int(most) > 1:
        raise TopologyError(
            f"PET_NNODES={env['PET_NNODES']} asks torchrun for several nodes, and this is none of its ranks, so each "
            "node would train a model of its own; start with torchrun, which reads these variables: torchrun -m "
            "launcher fit, or unset PET_NNODES"
        )
