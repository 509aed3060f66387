"""The plot of memory over ranks: a line per strategy, and axes that can be read for models of every size."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from pathlib import Path

import pytest

from launcher.agreement.facts import Agreement, make_identical_ranks
from launcher.cli.config_commands import PLAN
from launcher.config.schema import RunConfig
from launcher.core.errors import UsageError
from launcher.hardware.topology import Topology
from launcher.planning.dry_run import DryRun
from launcher.planning.memory import plan_with_memory
from launcher.planning.plot import byte_ticks, memory_by_gpus, plot_memory, rank_ticks
from tests.support.rank_threads import H100, facts
from tests.unit.strategies.test_comparison import profile

UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40, "PiB": 1 << 50}


def dry_run(billions: float = 7, ranks: int = 8) -> DryRun:
    first = dataclasses.replace(facts(0, H100, traits={"batch_size": 2}), local_world_size=8)
    agreement, found = Agreement(make_identical_ranks(first, ranks), assumed=True), profile(billions)
    return DryRun(plan_with_memory(RunConfig(), agreement, found), agreement, found)


def test_plot_has_a_line_per_strategy_and_zero_decreases_with_ranks() -> None:
    counts, lines = memory_by_gpus(dry_run(), RunConfig())
    assert counts[:3] == [1, 2, 4]
    assert set(lines) >= {"ddp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3"}
    assert len(set(lines["ddp"])) == 1
    assert lines["deepspeed_stage_3"] == sorted(lines["deepspeed_stage_3"], reverse=True)


def test_plot_marks_the_chosen_strategy_and_shows_sizes_with_units(tmp_path: Path) -> None:
    plot_memory(dry_run(), RunConfig(), tmp_path / "memory.svg")
    # Text is drawn as shapes, and each text is kept in a comment.
    texts = re.findall("<!-- (.*) -->", (tmp_path / "memory.svg").read_text())
    assert "fsdp2 (chosen)" in texts
    assert {"10 GiB", "100 GiB", "limit 73.6 GiB of 80 GiB"} <= set(texts)


@pytest.mark.parametrize("high", [10 * 10**power for power in range(3, 15)])
@pytest.mark.parametrize("ratio", [1.0, 3.0, 50.0, 1e3, 1e6, 1e9])
def test_sizes_have_few_round_ticks_with_units(high: int, ratio: float) -> None:
    low = max(1, int(high / ratio))
    sizes, labels = byte_ticks([low, high])
    assert 1 <= len(sizes) <= 12
    if ratio >= 3:
        assert len(sizes) >= 2, "one tick shows no scale"
    assert sizes == sorted(sizes)
    for size, label in zip(sizes, labels, strict=True):
        number, unit = label.split()
        assert int(number) * UNITS[unit] == size
        assert int(number) <= 500
    assert sizes[-1] <= 2 * high
    assert sizes[0] >= low / 2


@pytest.mark.parametrize("last", [6, 9, 13, 22])
def test_ranks_have_few_labels(last: int) -> None:
    shown, labels = rank_ticks([1 << power for power in range(last + 1)])
    assert 4 <= len(shown) <= 8
    assert shown[0] == 1
    assert [int(label.replace(",", "")) for label in labels] == shown


@pytest.mark.parametrize(("name", "message"), [("a.txt", "ends in .png"), ("no/a.png", "does not exist")])
def test_plot_that_cannot_be_written_is_a_usage_error(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plot_memory(dry_run(), RunConfig(), tmp_path / name)


@pytest.mark.parametrize("as_json", [False, True])
def test_path_of_the_plot_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    config = RunConfig(
        model={"class_path": "tests.support.toy.Toy"}, data={"class_path": "tests.support.toy.ToyData"},
        accelerator="cpu", devices=1,
    )  # fmt: skip
    options = argparse.Namespace(json=as_json, plot="memory.png", gpus=None, gpus_per_node=None, gpu=None,
                                 gpu_memory=None)  # fmt: skip
    assert PLAN.execute(config, Topology.single("host"), options) == 0
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    if as_json:
        json.loads(out)
    else:
        assert out.splitlines()[-1] == f"plot: {tmp_path / 'memory.png'}"
