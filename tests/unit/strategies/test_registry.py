"""`strategies.registry`: the built-in strategies, and adding others."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from strategies import registry
from strategies.base import StrategyError
from strategies.ddp import Distributed
from strategies.registry import (
    find_requested,
    find_strategy,
    list_candidates,
    list_strategies,
    list_strategy_names,
    register,
)
from tests.support.processes import run
from tests.support.runs import REPOSITORY

BUILT_IN = (
    "single_device",
    "ddp",
    "ddp_find_unused_parameters_true",
    "fsdp2",
    "fsdp2_grad_op",
    "hsdp",
    "deepspeed_stage_1",
    "deepspeed_stage_2",
    "deepspeed_stage_3",
    "fsdp2_offload",
    "deepspeed_stage_2_offload",
    "deepspeed_stage_3_offload",
    "deepspeed_stage_3_offload_nvme",
)


class Mine(Distributed):
    name = "mine"
    summary = "my own"
    order = 15


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Mine:
    """A strategy that is registered during one test."""
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    register(entry := Mine())
    return entry


def test_built_in_strategies_have_unique_names_and_one_line_summaries() -> None:
    assert list_strategy_names() == ("auto", *BUILT_IN)
    requested_only = "ddp_find_unused_parameters_true"
    assert [each.name for each in list_candidates()] == [each for each in BUILT_IN if each != requested_only]
    assert all(0 < len(each.summary) < 70 and "\n" not in each.summary for each in list_strategies())
    assert len({each.order for each in list_strategies()}) == len(BUILT_IN)


def test_registered_strategy_is_listed_in_order(own: Mine) -> None:
    assert find_strategy("mine") is own
    assert find_requested("mine") is own
    names = [each.name for each in list_candidates()]
    assert names.index("ddp") < names.index("mine") < names.index("deepspeed_stage_1")


@pytest.mark.parametrize("name", ["mine", "ddp", "auto"])
def test_duplicate_name_is_rejected(own: Mine, name: str) -> None:
    entry = Mine()
    entry.name = name
    with pytest.raises(StrategyError, match=f"strategy '{name}' exists already"):
        register(entry)


@pytest.mark.parametrize("name", ["auto", "dpd", None, ["ddp"]])
def test_find_requested_gives_none_for_auto_and_unknown_names(name: object) -> None:
    assert find_requested(name) is None


def test_unknown_strategy_error_lists_valid_names() -> None:
    with pytest.raises(
        StrategyError, match=r"strategy 'dpd' does not exist; valid are auto, single_device, ddp, .*nvme$"
    ):
        find_strategy("dpd")


_PROGRAM = """
import sys
from launcher.config.validation import find_problems
from strategies.registry import list_strategies

print(len(list_strategies()), [p.message for p in find_problems({"strategy": "broken"})])
assert not {"torch", "lightning", "deepspeed"} & set(sys.modules), "entries import libraries when they build"
"""


def test_broken_entry_point_is_named_if_its_strategy_is_requested(tmp_path: Path) -> None:
    information = tmp_path / "broken_strategies-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-strategies\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[launcher.strategies]\nbroken = no_such_module:Broken\n")
    env = {"PYTHONPATH": f"{REPOSITORY}:{tmp_path}"}
    output = run([sys.executable, "-c", _PROGRAM], tmp_path, env=env).check().output
    assert output.startswith(f"{len(BUILT_IN)} ")
    assert "broken-strategies cannot be loaded: ModuleNotFoundError: No module named 'no_such_module'" in output
