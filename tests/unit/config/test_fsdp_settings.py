"""Settings of FSDP2 beside a strategy that does not read them, or that do not fit the number of ranks."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.config.fsdp_settings import describe_indivisible
from launcher.config.schema import RunConfig
from launcher.config.validation import find_problems, parse_config
from strategies.fsdp import FullyShard
from strategies.registry import list_strategies

SETTINGS: dict[str, Any] = {
    "fsdp.wrap": {"fsdp": {"wrap": ["Block"]}},
    "fsdp.reduce_dtype": {"fsdp": {"reduce_dtype": "param"}},
    "fsdp.reduce_every_batch": {"fsdp": {"reduce_every_batch": False}},
    "fsdp.compile": {"fsdp": {"compile": True}},
    "fsdp.shard_ranks": {"fsdp": {"shard_ranks": 2}},
}
NAMES = ["auto", *(entry.name for entry in list_strategies())]
READERS = {entry.name for entry in list_strategies() if isinstance(entry, FullyShard)}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("path", SETTINGS)
def test_a_setting_that_the_strategy_does_not_read_is_reported(path: str, name: str) -> None:
    problems = find_problems({"strategy": name, **SETTINGS[path]})
    is_read = name in ("auto", "hsdp") if path == "fsdp.shard_ranks" else name in ("auto", *READERS)
    assert [problem.path for problem in problems] == ([] if is_read else [path])
    wrong = f"but {name} shards over all ranks" if name in READERS else f"but the strategy is {name}"
    assert all(problem.message.startswith(f"given, {wrong}; ") for problem in problems)
    assert all("; remove it, or use `strategy: " in problem.message for problem in problems)


@pytest.mark.parametrize("name", NAMES)
def test_every_strategy_has_activation_checkpointing_of_blocks_with_given_classes(name: str) -> None:
    values = {"strategy": name, "activation_checkpointing": True, "fsdp": {"wrap": ["Block"]}}
    assert find_problems(values) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_config_with_all_defaults_has_no_problem(name: str) -> None:
    values = {**RunConfig().to_dict(), "strategy": name, "model": {"class_path": "a.B"}}
    assert find_problems(values) == []
    assert parse_config(values).strategy == name


@pytest.mark.parametrize("strategy", ["auto", "hsdp"])
@pytest.mark.parametrize(
    ("shard_ranks", "devices", "nodes", "valid"),
    [(3, 4, 1, "2, 4"), (3, 2, 2, "2, 4"), (4, 2, 2, None), (2, 4, "auto", None), (5, 3, 1, "3"), (2, "auto", 1, None),
     (4, 1, 1, "remove it, or start several ranks"), (7, 64, 16, "2, 4, 8, 16, 32, 64, 128, 256, ...")],
)  # fmt: skip
def test_the_ranks_are_divided_into_equal_groups(
    strategy: str, shard_ranks: int, devices: Any, nodes: Any, valid: str | None
) -> None:
    values = {"strategy": strategy, "devices": devices, "num_nodes": nodes, "fsdp": {"shard_ranks": shard_ranks}}
    problems = find_problems(values)
    assert [problem.path for problem in problems] == ([] if valid is None else ["fsdp.shard_ranks"])
    if valid is not None:
        assert problems[0] == describe_indivisible(shard_ranks, devices * nodes)
        assert problems[0].message.endswith(valid)


@pytest.mark.parametrize("name", sorted(READERS))
def test_settings_of_other_strategies_are_reported_beside_fsdp2(name: str) -> None:
    (problem,) = find_problems({"strategy": name, "ddp": {"bucket_cap_mb": 5}})
    assert (problem.path, problem.message) == (
        "ddp", f"given, but the strategy is {name}; remove it, or use `strategy: ddp`"
    )  # fmt: skip
