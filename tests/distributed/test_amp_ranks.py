"""The loss scale of several real ranks: fp16 on CPUs under Lightning's DDP over gloo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.amp_ranks import STEPS
from tests.support.program_ranks import run_program
from tests.support.runs import TOY, events_of, only_run, toy_env, train_on

pytestmark = pytest.mark.slow
RANKS = 2


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Results of two ranks; one start for all tests of this file."""
    return run_program("tests.support.amp_ranks", tmp_path_factory.mktemp("ranks"))


def column(rows: list[dict[str, Any]], name: str) -> list[Any]:
    return [row[name] for row in rows]


@pytest.mark.case(43)
def test_an_overflow_on_one_rank_halves_the_scale_on_both_and_counts_as_one_skipped_step(
    ranks: list[dict[str, Any]],
) -> None:
    for rank in ranks:
        assert rank["overflow"]["scale"] == 512.0
        assert rank["overflow"]["counts"] == {"skipped_steps": 1, "overflows": 1, "floor_steps": 0}
    assert ranks[0]["overflow"]["weights"] == ranks[1]["overflow"]["weights"]
    rows = ranks[0]["overflow"]["rows"]
    assert column(rows, "trainer/global_step") == [2, 4, 6]
    assert column(rows, "amp/loss_scale") == [1024.0, 512.0, 512.0]
    assert column(rows, "amp/loss_scale_min") == column(rows, "amp/loss_scale_max") == column(rows, "amp/loss_scale")
    assert column(rows, "amp/skipped_steps") == [0, 1, 1]
    assert column(rows, "amp/skip_rate") == [0.0, 0.5, 0.0]
    assert column(rows, "amp/ranks_diverged") == [0, 0, 0]
    assert {row["perf/slowest_rank"] for row in rows} <= {0, 1}


@pytest.mark.case(39)
def test_only_rank_zero_logs_to_wandb(ranks: list[dict[str, Any]]) -> None:
    for part in ("watched", "overflow", "skewed"):
        assert ranks[0][part]["rows"]
        assert ranks[1][part]["rows"] == []
    assert (ranks[1]["skewed"]["reported"], ranks[1]["skewed"]["alerts"]) == ([], [])


@pytest.mark.case(39)
def test_every_rank_enters_one_collective_at_each_interval(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        bare, watched = rank["bare"]["collectives"], rank["watched"]["collectives"]
        assert len(bare) == len(watched) == STEPS
        for step, (without, with_it) in enumerate(zip(bare, watched, strict=True), start=1):
            added = {name: n - without.get(name, 0) for name, n in with_it.items() if n != without.get(name, 0)}
            assert added == ({"c10d::allgather_": 1} if step in (3, 6) else {}), f"step {step}"
    assert column(ranks[0]["watched"]["rows"], "trainer/global_step") == [3, 6]


def test_steps_that_do_not_log_have_no_additional_host_sync(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        bare, watched = rank["bare"]["syncs"], rank["watched"]["syncs"]
        # torch's scaler reads once in a step whether to skip it.
        assert min(bare) > 0
        assert [watched[step] - bare[step] for step in (0, 1, 3, 4)] == [0, 0, 0, 0]


@pytest.mark.case(40)
def test_a_rank_with_a_different_scale_is_reported_once(ranks: list[dict[str, Any]]) -> None:
    skewed = ranks[0]["skewed"]
    assert column(skewed["rows"], "amp/ranks_diverged") == [0, 0, 1, 1, 1, 1]
    assert column(skewed["rows"], "amp/loss_scale_min") == [1024.0] * 2 + [256.0] * 4
    assert column(skewed["rows"], "amp/loss_scale_max") == [1024.0] * STEPS
    assert [each for each in skewed["reported"] if each[0] == "ranks_diverged"] == [["ranks_diverged", 3, [1]]]
    (alert,) = [text for title, text in skewed["alerts"] if title == "the ranks' loss scales differ"]
    assert alert.startswith("step 3: rank 0 has 1024.0; rank 1: 256.0: ")


@pytest.mark.case(40)
def test_in_a_launcher_run_the_rank_is_reported_in_one_event_and_on_the_terminal(tmp_path: Path) -> None:
    arguments = (*TOY, "--precision", "16-mixed", "--trainer.max_steps", "6", "--watch.every_n_steps", "1",
                 "--trainer.callbacks", "[{class_path: tests.support.amp_ranks.SkewScale}]")  # fmt: skip
    output = train_on(RANKS, arguments, tmp_path, toy_env(tmp_path / "trace")).check().output

    folder = only_run(tmp_path)
    (event,) = [event for event in events_of(folder, "alert") if event["alert"] == "ranks_diverged"]
    assert (event["step"], event["ranks"], event["rank"]) == (3, [1], 0)
    assert output.count("the ranks' loss scales differ") == 1
    seen = events_of(folder, "ranks")
    assert [event["step"] for event in seen] == [1, 2, 3, 4, 5, 6]
    assert all(event["ranks"] == [0, 1] for event in seen)
    apart = [event["loss_scale"][0] / event["loss_scale"][1] for event in seen]
    assert apart[:3] == [1.0, 1.0, 4.0]
