"""Translates the variables of mpirun, jsrun and Kubeflow to those of torchrun. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from launcher.core.errors import TopologyError

# Variables of rank, world size, local rank and local world size, by the program that started the ranks.
_ENDS = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
_STARTERS = {
    "mpirun": tuple(f"OMPI_COMM_WORLD_{end}" for end in _ENDS),
    "mpirun_rsh": tuple(f"MV2_COMM_WORLD_{end}" for end in _ENDS),
    "jsrun": tuple(f"JSM_NAMESPACE_{end}" for end in _ENDS),
    "mpiexec": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_ADDRESS = ("MASTER_ADDR", "MASTER_PORT")


def to_torchrun_variables(env: Mapping[str, str]) -> dict[str, str]:
    """The variables that torchrun would set for a rank of another program; empty without one, or under torchrun.

    Raises:
        TopologyError: several ranks cannot find each other; each would train its own model.
    """
    if any(name in env for name in _TORCHRUN):
        return _from_kubeflow(env)
    _reject_pods(env)
    for starter, names in _STARTERS.items():
        # srun sets the variables of PMI too; those of SLURM contain more.
        if names[1] in env and not (starter == "mpiexec" and "SLURM_PROCID" in env):
            return _from_mpi(starter, names, env)
    return {}


def remove_starter_variables(env: Mapping[str, str]) -> dict[str, str]:
    """The environment without these variables, for an agent whose node rank is given on the command line."""
    names = {name for group in _STARTERS.values() for name in group} | {"PET_NNODES"}
    return {name: value for name, value in env.items() if name not in names}


def _from_mpi(starter: str, names: tuple[str, ...], env: Mapping[str, str]) -> dict[str, str]:
    texts = [env.get(name, "") for name in names]
    if texts[1] == "1":
        return {}
    started = f"{starter} started {texts[1]} processes"
    if not all(text.isdecimal() for text in texts):
        wrong = ", ".join(f"{name}={env.get(name)!r}" for name in names)
        raise TopologyError(f"{started}, but its variables do not identify this process ({wrong}); start one process "
                            "on each node: python -m launcher fit --nnodes N --node-rank I "
                            "--rdzv-endpoint HOST:PORT")  # fmt: skip
    missing = [name for name in _ADDRESS if not env.get(name)]
    if missing:
        raise TopologyError(
            f"{started}, and {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set, so each would "
            f"train its own model; set them ({starter} -x MASTER_ADDR=HOST_OF_RANK_0 -x MASTER_PORT=29500, or its own "
            "option), or start one process, which starts the ranks: python -m launcher fit"
        )
    rank, _, local, local_size = map(int, texts)
    if local_size < 1 or rank % local_size != local:
        raise TopologyError(f"{started}, and rank {rank} is number {local} of {local_size} on its node; the ranks "
                            "of a node must be consecutive: --map-by slot")  # fmt: skip
    return {**dict(zip(_TORCHRUN, texts, strict=True)), "GROUP_RANK": str(rank // local_size)}


def _from_kubeflow(env: Mapping[str, str]) -> dict[str, str]:
    """A PyTorchJob starts one rank in each pod, and does not set the variables that are equal in all pods."""
    is_pod = "KUBERNETES_SERVICE_HOST" in env or "KUBERNETES_PORT" in env
    is_ranked = bool(env.get("RANK") and env.get("WORLD_SIZE"))
    if not is_pod or not is_ranked or "LOCAL_RANK" in env or "LOCAL_WORLD_SIZE" in env:
        return {}
    in_pod = env.get("PET_NPROC_PER_NODE") or "1"
    if in_pod not in ("1", "auto"):
        raise TopologyError(f"Kubeflow requests {in_pod} ranks in each pod (PET_NPROC_PER_NODE); start them with "
                            "torchrun, which reads the PET_ variables: torchrun -m launcher fit")  # fmt: skip
    return {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": env["RANK"]}


def _reject_pods(env: Mapping[str, str]) -> None:
    """The trainer of Kubeflow sets only the variables for torchrun itself."""
    most = (env.get("PET_NNODES") or "1").rpartition(":")[2]
    if most.isdecimal() and int(most) > 1:
        raise TopologyError(
            f"PET_NNODES={env['PET_NNODES']} requests several nodes from torchrun, but did not start this process, "
            "so each node would train its own model; start with torchrun, which reads these variables: torchrun -m "
            "launcher fit, or unset PET_NNODES"
        )
