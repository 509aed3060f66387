"""Steps with unused parameters, on two real ranks: detected in the first step, or rejected with their names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.program_ranks import run_program
from tests.support.runs import REPOSITORY, events_of, train_on
from tests.support.unused_ranks import SEARCHED, WHOLE

pytestmark = pytest.mark.slow
_RANKS = 2
_UNUSED = {
    "never": ["heads.1.weight", "heads.1.bias", "heads.2.weight", "heads.2.bias"],
    "rank": ["heads.1.weight", "heads.1.bias", "heads.2.weight", "heads.2.bias"],
    "in turns": ["heads.1.weight", "heads.1.bias", "heads.2.weight", "heads.2.bias"],
    "gan": ["heads.1.weight", "heads.1.bias", "heads.2.weight", "heads.2.bias"],
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Results of two ranks; one start for all tests of this file."""
    return run_program("tests.support.unused_ranks", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(("kind", "accumulate"), SEARCHED)
def test_unused_parameters_found_in_the_first_step_train_as_with_the_search(
    ranks: list[dict[str, Any]], kind: str, accumulate: int
) -> None:
    searched, found = (ranks[0][f"{kind} {accumulate} {search}"] for search in (True, False))
    assert found["weights"] == searched["weights"] == ranks[1][f"{kind} {accumulate} False"]["weights"]
    assert found["steps"] == searched["steps"]
    assert (searched["found"], found["found"]) == ([], [_UNUSED[kind]])


@pytest.mark.parametrize(("kind", "accumulate"), WHOLE)
def test_nothing_changes_if_all_parameters_are_used(ranks: list[dict[str, Any]], kind: str, accumulate: int) -> None:
    refusing, searching = (ranks[0][f"{kind} {accumulate} {search}"] for search in (None, False))
    assert refusing == searching
    assert searching["found"] == []
    assert searching["error"] is None


def test_a_requested_strategy_rejects_unused_parameters_before_the_first_optimizer_step(
    ranks: list[dict[str, Any]],
) -> None:
    for rank in ranks:
        assert rank["never refused"]["steps"] == 0
        assert rank["never refused"]["error"].startswith(f"parameters {', '.join(_UNUSED['never'])} got no gradient")
        assert "`strategy: ddp_find_unused_parameters_true`" in rank["never refused"]["error"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_layers_that_are_unfrozen_are_trained_equally_on_all_ranks(
    ranks: list[dict[str, Any]], accumulate: int
) -> None:
    first, second = (rank[f"thaws {accumulate}"] for rank in ranks)
    assert first["error"] is second["error"] is None
    assert first["weights"] == second["weights"]
    assert first["weights"]["trunk.weight"] != ranks[0]["never refused"]["weights"]["trunk.weight"], "it was trained"


@pytest.mark.parametrize("kind", ["later refused", "later"])
def test_unused_parameters_in_a_later_step_are_reported_before_its_optimizer_step(
    ranks: list[dict[str, Any]], kind: str
) -> None:
    for number, rank in enumerate(ranks):
        assert rank[kind]["steps"] == 3
        expected = f"parameters heads.2.weight, heads.2.bias got no gradient in a later step on rank {number}"
        assert rank[kind]["error"].startswith(expected)
    assert ranks[0][kind]["weights"] == ranks[1][kind]["weights"]


@pytest.mark.parametrize(("strategy", "code"), [("auto", 0), ("ddp", 2)])
def test_a_run_lists_the_unused_parameters(tmp_path: Path, strategy: str, code: int) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom tests.support.toy import Toy, ToyData\n\n\nclass Spare(Toy):\n    static_graph = False\n\n"
        "    def __init__(self):\n        super().__init__()\n        self.spare = torch.nn.Linear(2, 2)\n"
    )
    arguments = (
        "--model",
        "mine.Spare",
        "--data",
        "tests.support.toy.ToyData",
        "--wandb.mode",
        "disabled",
        "--name",
        "it",
    )
    settings = ("--global_batch_size", "8", "--trainer.max_epochs", "1", "--strategy", strategy)
    env = {"TRACE": str(tmp_path / "trace"), "PYTHONPATH": str(REPOSITORY)}
    output = train_on(2, ("fit", *arguments, *settings), tmp_path, env).check(code).output
    named = "parameters spare.weight, spare.bias got no gradient in the first step"
    assert named in output
    if code:
        assert "error: " in output
        assert "Traceback" not in output
        return
    run = tmp_path / "runs/it"
    assert [event["names"] for event in events_of(run, "unused_parameters")] == [["spare.weight", "spare.bias"]]
    strategy_of_plan = json.loads((run / "plan.json").read_text())["strategy"]
    assert strategy_of_plan["find_unused_parameters"]
    assert strategy_of_plan["reasons"][-1] == f"find_unused_parameters on: {named}"
