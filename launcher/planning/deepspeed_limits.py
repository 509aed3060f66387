"""What keeps the ranks at hand from running a variant of ZeRO, whatever its memory. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.agreement.facts import Agreement, RankFacts, hosts_of
from launcher.hardware.devices import BUILD_TOOLS
from strategies.deepspeed_merge import nvme_paths
from strategies.precision import Precision
from strategies.registry import list_candidates
from strategies.repeated import select

_FP16 = (Precision.FP16_MIXED, Precision.FP16_TRUE)


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Why a variant cannot be run.

    Attributes:
        reason: what is in the way.
        advice: what to do where the variant was asked for.
    """

    reason: str
    advice: str

    def __str__(self) -> str:
        return f"{self.reason}; {self.advice}"


def zero_obstacles(
    name: str, agreement: Agreement, precision: Precision | None, user: Mapping[str, Any]
) -> list[Obstacle]:
    """Everything that is in the way of one variant.

    Args:
        name: of a strategy that needs DeepSpeed.
        agreement: what the ranks are and have.
        precision: what was agreed on; None if nothing was, or a plugin of the user's own decides.
        user: the user's own DeepSpeed settings.
    """
    found: list[Obstacle] = []
    plugin = agreement.facts[0].traits.get("precision_plugin")
    if plugin is not None:
        reason = f"the user's own {plugin} decides the precision, but DeepSpeed's engine has a plugin of its own"
        found.append(Obstacle(reason, "remove yours and set `precision`, or use `strategy: ddp`"))
    without = select(agreement.facts, lambda fact: not fact.deepspeed_fp16)
    if precision in _FP16 and without:
        found.append(
            Obstacle(
                f"precision {precision} was asked for, but DeepSpeed trains in fp16 on a CPU only where that has "
                f"AVX512-FP16, which {some(hosts_of(without))} lacks",
                "use bf16-mixed, or debug fp16 with `strategy: ddp`",
            )
        )
    for path in nvme_paths(name, user):
        found += _folder_obstacles(path, agreement.facts)
        lacking = without_tools(agreement)
        if lacking:
            found.append(
                Obstacle(f"{name} compiles DeepSpeed's async_io at its first start, but {lacking[0]}", lacking[1])
            )
    return list(dict.fromkeys(found))


def candidate_obstacles(agreement: Agreement, precision: Precision | None, user: Mapping[str, Any]) -> dict[str, str]:
    """Name of a variant to why these ranks cannot run it, for those that they cannot; see `zero_obstacles`."""
    names = [candidate.name for candidate in list_candidates() if candidate.needs_deepspeed]
    found = {name: zero_obstacles(name, agreement, precision, user) for name in names}
    return {name: "; ".join(o.reason for o in obstacles) for name, obstacles in found.items() if obstacles}


def nvme_room(name: str, agreement: Agreement, user: Mapping[str, Any]) -> int | None:
    """Bytes on NVMe that each rank has where it has least; None if the variant takes none, or no rank looked."""
    paths = nvme_paths(name, user)
    rooms = [
        sum({f.device: f.free_bytes for f in fact.nvme if f.path in paths}.values()) // fact.local_world_size
        for fact, _ in agreement.kinds()
        if any(folder.path in paths for folder in fact.nvme)
    ]
    return min(rooms, default=None)


def assumed_folders(name: str, agreement: Agreement, user: Mapping[str, Any]) -> tuple[str, ...]:
    """The folders that a variant offloads to and that some rank did not look at."""
    paths = nvme_paths(name, user)
    seen = [{folder.path for folder in fact.nvme} for fact, _ in agreement.kinds()]
    return tuple(path for path in paths if not all(path in known for known in seen))


def without_tools(agreement: Agreement) -> tuple[str, str] | None:
    """Which hosts lack what DeepSpeed compiles its ops with, and the packages to install; None if none does."""
    tools = dict.fromkeys(tool for fact, _ in agreement.kinds() for tool in _lacking(fact))
    if not tools:
        return None
    hosts = some(hosts_of(select(agreement.facts, lambda fact: bool(_lacking(fact)))))
    install = " and ".join(BUILD_TOOLS[tool] for tool in tools)
    return f"{' and '.join(tools)} not on the PATH of {hosts}", f"install {install}"


def some(names: Sequence[str], limit: int = 8) -> str:
    """At most `limit` of the names, and how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _lacking(fact: RankFacts) -> list[str]:
    versions = fact.hardware.versions if fact.hardware else {}
    return [tool for tool in BUILD_TOOLS if versions.get(tool, "unknown") is None]


def _folder_obstacles(path: str, facts: Sequence[RankFacts]) -> list[Obstacle]:
    """One for each thing that is wrong with the folder, with the hosts where it is."""

    def problem_of(fact: RankFacts) -> str | None:
        return next((folder.problem for folder in fact.nvme if folder.path == path), None)

    wrong = select(facts, lambda fact: problem_of(fact) is not None)
    problems = dict.fromkeys(problem_of(fact) for fact in wrong)
    return [
        Obstacle(
            f"its NVMe folder {path} {problem} on "
            + some(hosts_of(select(wrong, lambda fact, problem=problem: problem_of(fact) == problem))),
            "make it on every node, or name another as nvme_path in deepspeed_config.zero_optimization, under "
            "offload_optimizer and offload_param",
        )
        for problem in problems
    ]
