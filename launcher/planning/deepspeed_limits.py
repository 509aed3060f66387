"""Reasons why ranks cannot run a strategy of DeepSpeed, regardless of memory. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.agreement.facts import Agreement, RankFacts, list_hosts
from launcher.hardware.devices import BUILD_TOOLS
from strategies.deepspeed_merge import nvme_paths
from strategies.precision import Precision
from strategies.registry import list_candidates
from strategies.repeated import select
from strategies.units import join_some

_FP16 = (Precision.FP16_MIXED, Precision.FP16_TRUE)


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Why a strategy cannot run, and what to do if it was requested."""

    reason: str
    advice: str

    def __str__(self) -> str:
        return f"{self.reason}; {self.advice}"


def find_obstacles(
    name: str, agreement: Agreement, precision: Precision | None, user: Mapping[str, Any]
) -> list[Obstacle]:
    """All obstacles of one strategy that needs DeepSpeed.

    `precision` is None if the ranks have none, or if the user's plugin decides.
    """
    found: list[Obstacle] = []
    missing = select(agreement.facts, lambda fact: _version(fact, "deepspeed") is None)
    if missing:
        reason = f"DeepSpeed is not installed on {join_some(list_hosts(missing))}"
        found.append(Obstacle(reason, "install it (`pip install deepspeed`), or use `strategy: fsdp2`"))
    plugin = agreement.facts[0].traits.get("precision_plugin")
    if plugin is not None:
        reason = f"the user's own {plugin} decides the precision, but DeepSpeed's engine has its own plugin"
        found.append(Obstacle(reason, "remove yours and set `precision`, or use `strategy: ddp`"))
    without = select(agreement.facts, lambda fact: not fact.deepspeed_fp16)
    if precision in _FP16 and without:
        found.append(
            Obstacle(
                f"precision {precision} was requested, but DeepSpeed trains in fp16 on a CPU only with AVX512-FP16, "
                f"which {join_some(list_hosts(without))} lacks",
                "use bf16-mixed, or debug fp16 with `strategy: ddp`",
            )
        )
    for path in nvme_paths(name, user):
        found += _folder_obstacles(path, agreement.facts)
        tools = find_missing_tools(agreement)
        if tools:
            found.append(Obstacle(f"{name} compiles DeepSpeed's async_io at its first start, but {tools[0]}", tools[1]))
    return list(dict.fromkeys(found))


def candidate_obstacles(agreement: Agreement, precision: Precision | None, user: Mapping[str, Any]) -> dict[str, str]:
    """The reasons why these ranks cannot run a candidate, by its name; candidates without obstacles are omitted."""
    names = [candidate.name for candidate in list_candidates() if candidate.needs_deepspeed]
    found = {name: find_obstacles(name, agreement, precision, user) for name in names}
    return {name: "; ".join(o.reason for o in obstacles) for name, obstacles in found.items() if obstacles}


def nvme_room(name: str, agreement: Agreement, user: Mapping[str, Any]) -> int | None:
    """Free bytes on NVMe per rank, on the node with least; None without offload to NVMe, or if no rank checked."""
    paths = nvme_paths(name, user)
    rooms = [
        sum({f.device: f.free_bytes for f in fact.nvme if f.path in paths}.values()) // fact.local_world_size
        for fact, _ in agreement.kinds()
        if any(folder.path in paths for folder in fact.nvme)
    ]
    return min(rooms, default=None)


def assumed_folders(name: str, agreement: Agreement, user: Mapping[str, Any]) -> tuple[str, ...]:
    """The folders that a strategy offloads to and that some rank did not check."""
    paths = nvme_paths(name, user)
    seen = [{folder.path for folder in fact.nvme} for fact, _ in agreement.kinds()]
    return tuple(path for path in paths if not all(path in known for known in seen))


def find_missing_tools(agreement: Agreement) -> tuple[str, str] | None:
    """The hosts without a build tool of DeepSpeed's, and the packages to install; None if all have them."""
    tools = dict.fromkeys(tool for fact, _ in agreement.kinds() for tool in _find_missing(fact))
    if not tools:
        return None
    hosts = join_some(list_hosts(select(agreement.facts, lambda fact: bool(_find_missing(fact)))))
    install = " and ".join(BUILD_TOOLS[tool] for tool in tools)
    return f"{' and '.join(tools)} not on the PATH of {hosts}", f"install {install}"


def _find_missing(fact: RankFacts) -> list[str]:
    return [tool for tool in BUILD_TOOLS if _version(fact, tool) is None]


def _version(fact: RankFacts, name: str) -> str | None:
    """Version of a library or path of a tool on a rank; None if it is not installed there."""
    return fact.hardware.versions.get(name, "unknown") if fact.hardware else "unknown"


def _folder_obstacles(path: str, facts: Sequence[RankFacts]) -> list[Obstacle]:
    """An obstacle for each problem of a folder, with the hosts that have it."""

    def problem_of(fact: RankFacts) -> str | None:
        return next((folder.problem for folder in fact.nvme if folder.path == path), None)

    wrong = select(facts, lambda fact: problem_of(fact) is not None)
    problems = dict.fromkeys(problem_of(fact) for fact in wrong)
    return [
        Obstacle(
            f"its NVMe folder {path} {problem} on "
            + join_some(list_hosts(select(wrong, lambda fact, problem=problem: problem_of(fact) == problem))),
            "create it on every node, or set another nvme_path in deepspeed_config.zero_optimization, under "
            "offload_optimizer and offload_param",
        )
        for problem in problems
    ]
