"""The cluster's partitions, as `sinfo` lists them."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace

# Partition ('*' marks the default), availability, time limit, nodes, CPUs and MB of memory per node, generic resources.
_FORMAT = "%P|%a|%l|%D|%c|%m|%G"
_TIMEOUT_S = 10.0


class PartitionsError(RuntimeError):
    """`sinfo` failed or did not answer."""


@dataclass(frozen=True, slots=True)
class Partition:
    """One partition. Numbers per node are the minimum over the nodes.

    Attributes:
        is_default: whether jobs without a partition use it.
        is_up: whether it starts jobs.
        time_limit: SLURM's spelling, 'infinite' for none.
        nodes: number of nodes in any state.
        gpu_type: None if the cluster sets no type or several.
    """

    name: str
    is_default: bool
    is_up: bool
    time_limit: str
    nodes: int
    cpus_per_node: int
    memory_mb_per_node: int
    gpus_per_node: int
    gpu_type: str | None = None


def read_partitions() -> tuple[Partition, ...]:
    """Ask `sinfo`, if it exists; the default partition first.

    Raises:
        PartitionsError: `sinfo` failed or did not answer in time; with its message.
    """
    command = ["sinfo", "--noheader", f"--format={_FORMAT}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
    except FileNotFoundError:
        return ()
    except subprocess.CalledProcessError as error:
        message = _find_message(error.stderr or error.stdout)
        raise PartitionsError(f"sinfo failed with exit code {error.returncode}: {message}") from error
    except subprocess.TimeoutExpired as error:
        raise PartitionsError(f"sinfo did not answer within {error.timeout:g} seconds") from error
    except OSError as error:
        raise PartitionsError(f"sinfo could not be run: {error}") from error
    return parse_partitions(done.stdout)


def _find_message(output: str) -> str:
    """The last line, which has the reason that ended `sinfo`: without a reachable cluster it prints five."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return re.sub(r"^sinfo: (fatal|error): ", "", lines[-1]) if lines else "no message"


def parse_partitions(text: str) -> tuple[Partition, ...]:
    """Read the lines of `sinfo`, one for each kind of node in a partition; other lines are skipped."""
    found: dict[str, Partition] = {}
    for line in text.splitlines():
        # The last field, GRES, may contain bars.
        fields = [field.strip() for field in line.split("|", 6)]
        if len(fields) != 7 or not fields[0]:
            continue
        partition = _read_fields(fields)
        before = found.get(partition.name)
        found[partition.name] = partition if before is None else _joined(before, partition)
    return tuple(sorted(found.values(), key=lambda p: not p.is_default))


def _read_fields(fields: Sequence[str]) -> Partition:
    name, availability, limit, nodes, cpus, memory, gres = fields
    count, kinds = _gpus(gres)
    return Partition(
        name=name.rstrip("*"),
        is_default=name.endswith("*"),
        is_up=availability == "up",
        time_limit=limit,
        nodes=_number(nodes),
        cpus_per_node=_number(cpus),
        memory_mb_per_node=_number(memory),
        gpus_per_node=count,
        gpu_type=next(iter(kinds)) if len(kinds) == 1 else None,
    )


def _joined(one: Partition, other: Partition) -> Partition:
    return replace(
        one,
        nodes=one.nodes + other.nodes,
        cpus_per_node=min(one.cpus_per_node, other.cpus_per_node),
        memory_mb_per_node=min(one.memory_mb_per_node, other.memory_mb_per_node),
        gpus_per_node=min(one.gpus_per_node, other.gpus_per_node),
        gpu_type=one.gpu_type if one.gpu_type == other.gpu_type else None,
    )


def _gpus(gres: str) -> tuple[int, set[str]]:
    """Number and types of GPUs in 'gpu:a100:8(S:0-1),gpu:2,nvme:1'; none in '(null)'."""
    total, kinds = 0, set[str]()
    for kind, count in re.findall(r"(?:^|,)(?:gres/)?gpu(?::([^:,()]*[^\d:,()][^:,()]*))?(?::(\d+))?(?=[(,]|$)", gres):
        total += int(count or 1)
        kinds.add(kind)
    return total, kinds - {""}


def _number(text: str) -> int:
    """The number in '64+', which sinfo writes if nodes differ."""
    digits = re.match(r"\d+", text)
    return int(digits.group()) if digits else 0
