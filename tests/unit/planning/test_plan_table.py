"""The printed plan: no text is lost at any width, the chosen row is marked, times are comparable."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from launcher.agreement.facts import Agreement, make_identical_ranks
from launcher.config.schema import RunConfig
from launcher.planning.memory import plan_with_memory
from launcher.planning.plan import Plan, make_plan
from launcher.planning.table import print_memory, print_plan
from strategies.step_time import STEP_FLOOR
from tests.support.rank_threads import CPU, H100, facts
from tests.unit.strategies.test_comparison import profile

WIDTHS = (60, 80, 100, 120, 200, 100_000)


def planned(count: int, device: Any = H100, billions: float = 7, **given: Any) -> Plan:
    first = dataclasses.replace(facts(0, device, traits={"batch_size": 2}), local_world_size=min(count, 8))
    agreement = Agreement(make_identical_ranks(first, count), assumed=True)
    return plan_with_memory(RunConfig(**given), agreement, profile(billions, 10))


PLANS: dict[str, Callable[[], Plan]] = {
    "one CPU": lambda: planned(1, CPU, 0.01),
    "one GPU": lambda: planned(1, billions=0.1),
    "a small model on GPUs": lambda: planned(8, billions=0.001),
    "many nodes": lambda: planned(512, billions=70),
    "a requested strategy": lambda: planned(8, strategy="deepspeed_stage_3"),
    "smaller micro batches": lambda: planned(2, billions=2.7, global_batch_size=4, memory_share=0.8),
    "a device with a long name": lambda: planned(8, dataclasses.replace(H100, name="A" * 70)),
}


def printed(plan: Plan, width: int) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width)
    print_plan(plan, console)
    print_memory(plan, console)
    return out.getvalue()


def entries(plan: Plan) -> list[dict[str, Any]]:
    assert plan.memory is not None
    return list(plan.memory["assessments"])


@pytest.mark.parametrize("name", PLANS)
def test_no_text_is_lost_at_any_width(name: str) -> None:
    plan = PLANS[name]()
    wide = printed(plan, WIDTHS[-1])
    assert wide.count(">") >= 1
    for width in WIDTHS:
        text = printed(plan, width)
        assert "…" not in text
        # A URL stays in one piece, so that it can be opened.
        lines = [line for line in text.splitlines() if "https://" not in line]
        assert max(map(len, lines)) <= width
        together = "".join(text.split())
        texts = [*plan.strategy.reasons, *plan.precision_reasons, *plan.batch_reasons, *plan.notices, *plan.devices]
        assert plan.memory is not None
        texts += plan.memory["notes"]
        for entry in entries(plan):
            texts += [entry["name"]] if entry["name"] == plan.strategy.name else [entry["name"], entry["reason"]]
        # Every value of the widest table, in which each row is one line; '-' stands for nothing.
        rows = [line.split() for line in wide.splitlines() if "deepspeed_stage" in line and ":" not in line]
        texts += [value for row in rows for value in row if value not in ("-", ">", "x")]
        for expected in texts:
            assert "".join(expected.split()) in together, f"{expected!r} at {width} columns"


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", PLANS)
def test_only_the_row_of_the_chosen_strategy_is_marked(name: str, width: int) -> None:
    plan = PLANS[name]()
    marked = [line.split()[1] for line in printed(plan, width).splitlines() if line.startswith(">")]
    assert marked == [plan.strategy.name]


@pytest.mark.parametrize("width", [40, 47, 60, 72, 80, 99])
@pytest.mark.parametrize("name", PLANS)
def test_no_line_ends_inside_a_value(name: str, width: int) -> None:
    plan = PLANS[name]()
    lines = printed(plan, width).splitlines()
    names = "params|grads|optimizer|activations|temporaries|buffers|host|nvme|sent|batch"
    starts = re.compile(rf"(^|[ ,])({names}|<?\d[\d.]*)$")
    values = re.compile(r"^ *(<?\d[\d.]*( x \d+)?(,|$)|([KMGT]i?B|ms)\b|ms/sample)")
    split = [pair for pair in itertools.pairwise(lines) if starts.search(pair[0]) and values.match(pair[1])]
    assert split == []
    assert [line for line in lines if len(line) > width and "https:" not in line] == []
    if any("ms/sample," in line or line.strip().endswith("ms/sample") for line in lines):
        figures = [line for line in lines if re.search(r"\d (MiB|GiB),? +\S+ ms/sample$", line)]
        assert len(figures) == len(entries(plan)), "the total and the time of each strategy are in one line"


def test_parts_and_units_have_headings() -> None:
    text = printed(planned(8), 200)
    for word in ("params", "grads", "optimizer", "activations", "temporaries", "buffers", "total", "ms/sample"):
        assert word in text
    assert "in GiB, traced; limit 73.6 GiB of 80 GiB" in text


def test_temporaries_of_the_optimizer_are_a_part_of_their_own() -> None:
    ddp = next(entry["memory"] for entry in entries(planned(8)) if entry["name"] == "ddp")
    # The optimizer's step is the peak, where no activation is alive: 4 bytes of temporaries for each parameter.
    assert (ddp["phase"], ddp["activations"]) == ("step", 0)
    assert ddp["temporaries"] == pytest.approx(4 * 7e9, rel=0.01)


def test_time_is_for_each_sample_of_all_ranks() -> None:
    plan = planned(8)
    single, ddp = entries(plan)[:2]
    assert (single["samples"], ddp["samples"]) == (2, 16)
    assert ddp["step"]["seconds_per_sample"] == pytest.approx(ddp["step"]["seconds"] / 16)
    # One rank does an eighth of the work in a step of the same time.
    assert single["step"]["seconds_per_sample"] > 7 * ddp["step"]["seconds_per_sample"]


def test_time_below_the_floor_of_a_step_is_shown_as_a_limit() -> None:
    plan = planned(8, billions=0.001)
    assert entries(plan)[1]["step"]["seconds"] < STEP_FLOOR
    row = next(line for line in printed(plan, 200).splitlines() if line.startswith(">"))
    assert row.split()[-1] == f"<{STEP_FLOOR / 16 * 1e3:.3g}"
    assert f"estimated less than {STEP_FLOOR / 16 * 1e3:.3g} ms a sample" in printed(plan, WIDTHS[-1])


def test_one_rank_has_no_claim_about_other_strategies() -> None:
    text = printed(planned(1, CPU, 0.01), 200)
    assert "fits" not in text.partition("precision")[0]
    assert "deepspeed_stage_1, deepspeed_stage_2, deepspeed_stage_3: one rank has no other rank" in text


def test_requested_strategy_is_marked_and_the_automatic_choice_named() -> None:
    plan = planned(8, strategy="deepspeed_stage_3")
    reasons = {entry["name"]: entry["reason"] for entry in entries(plan)}
    assert plan.memory is not None
    assert reasons["deepspeed_stage_3"] == "requested"
    assert reasons[plan.memory["pick"]] == "fits; `strategy: auto` would choose it"


def test_plan_of_an_older_version_is_printed() -> None:
    plan = planned(8)
    old = json.loads(json.dumps(plan.to_dict()))
    for entry in old["memory"]["assessments"]:
        del entry["samples"], entry["ranks"], entry["step"]["seconds_per_sample"], entry["memory"]["temporaries"]
    assert "deepspeed_stage_3_offload_nvme" in printed(Plan.from_dict(old), 80)


def test_plan_without_a_profile_states_that_memory_is_not_known() -> None:
    out = io.StringIO()
    print_memory(make_plan(RunConfig(), Agreement((facts(0, CPU),))), Console(file=out, width=120))
    assert "memory: not known" in out.getvalue()
