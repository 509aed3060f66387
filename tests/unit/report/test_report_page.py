"""The page as text: its content, that it is valid, and that nothing in it can run."""

from __future__ import annotations

import datetime
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from launcher.cli.main import run as run_command
from launcher.core.events import EventLog
from launcher.report.command import render
from launcher.report.history import read_history
from launcher.report.overview import to_values
from launcher.report.plots import draw_attempts
from launcher.report.source import read_run
from tests.support.made_run import START, MadeRun, with_memory

NASTY = '"><script>alert(1)</script><img src=x onerror=alert(2)>$\\alpha$</svg></style>&amp;\x1b[31m'
VOID = {"meta", "link", "br", "img", "path", "rect", "circle", "use"}


class Outline(HTMLParser):
    """Checks nesting, and keeps tags with attributes and the visible text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)
        assert self.open == [], self.open
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)

    def ids(self) -> list[str]:
        return [attrs["id"] or "" for _, attrs in self.tags if "id" in attrs]


def written(run: MadeRun) -> Outline:
    return Outline(render([read_run(run.path)], START))


def trained(run: MadeRun, steps: int = 100, **ranks: Any) -> MadeRun:
    run.start()
    for step in range(10, steps + 1, 10):
        run.step(step)
        run.ranks(step, **ranks)
    run.write_event("finished", step=steps, metrics={})
    return run


@pytest.fixture
def run(tmp_path: Path) -> MadeRun:
    return MadeRun(tmp_path / "first", precision="16-mixed")


def test_a_page_is_valid_self_contained_and_reproducible(run: MadeRun) -> None:
    trained(run, scale=65536.0, skipped=0)
    text = render([read_run(run.path)], START)
    page = Outline(text)
    assert len(set(page.ids())) == len(page.ids())
    wanted = {i for _, attrs in page.tags for i in (attrs.get("aria-labelledby") or "").split()}
    links = {(attrs.get("href") or "").removeprefix("#") for tag, attrs in page.tags if tag in ("a", "use")}
    assert wanted | links <= set(page.ids())
    assert not {"script", "iframe", "object", "embed", "form", "base"} & {tag for tag, _ in page.tags}
    addresses = [v or "" for _, attrs in page.tags for k, v in attrs.items() if k in ("href", "src", "xlink:href")]
    assert all(address.startswith(("#", "data:")) for address in addresses)
    assert [attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert text == render([read_run(run.path)], START)
    body = text.partition("<body>")[2]
    assert "var(--s1)" in body, "plots take their colours from the page"
    assert "#0a0" not in body
    assert "#000000" not in body
    assert "http:" not in text.replace('xmlns="http://www.w3.org/2000/svg"', "").replace(
        'xmlns:xlink="http://www.w3.org/1999/xlink"', ""
    )
    assert "https:" not in text


def test_every_plot_has_a_title_a_caption_and_a_legend(run: MadeRun) -> None:
    page = written(trained(run, scale=65536.0, skipped=0))
    pictures = [attrs for tag, attrs in page.tags if tag == "svg" and attrs.get("role") == "img"]
    names = [attrs["aria-labelledby"] for attrs in pictures]
    expected = ["loss", "rate", "scale-plot", "time", "own", "bars", "memory-plot", "timeline"]
    assert names == [f"{name}{kind}-t {name}-d" for name in expected for kind in ("", "-narrow")]
    assert [tag for tag, _ in page.tags].count("figcaption") == len(expected)
    assert sum(attrs.get("class") == "legend" for _, attrs in page.tags) == len(expected)
    # Every table has headers and a caption.
    tags = [tag for tag, _ in page.tags]
    assert tags.count("caption") == tags.count("thead") == tags.count("table") > 5


def test_texts_of_users_are_shown_and_escaped(tmp_path: Path) -> None:
    class_path = {"class_path": NASTY, "init_args": {NASTY: NASTY}}
    run = MadeRun(tmp_path / "<b>first<b>", model=class_path, precision="16-mixed")
    run.plan["devices"] = {NASTY: 2}
    run.plan["strategy"]["reasons"] = [NASTY]
    run.plan["precision_reasons"] = run.plan["notices"] = run.plan["hosts"] = [NASTY]
    run.start(versions={NASTY: NASTY}, host=NASTY, source=NASTY)
    for step in (10, 20):
        run.write_event("step", 1, step=step, seconds_per_step=0.1, metrics={NASTY: 1.0, "loss" + NASTY: 2.0})
        run.write_event("validation", 1, step=step, metrics={"val_loss" + NASTY: 2.0})
        run.ranks(step, scale=[1.0, 2.0], skipped=step)
    run.write_event("alert", alert=NASTY, step=3, ranks=[0], title=NASTY, text=NASTY)
    run.write_event(NASTY, **{NASTY: NASTY})
    run.write_event("failed", host=NASTY, error=NASTY)
    (run.path / "logs/rank-0.log").write_text(NASTY)
    page = written(run)
    assert not {"script", "img", "b"} & {tag for tag, _ in page.tags}
    assert not [attrs for _, attrs in page.tags if any(name.startswith("on") for name in attrs)]
    # 16 places above, and more that repeat them.
    assert page.text.count("<script>alert(1)</script>") > 16
    assert "\x1b" not in page.text
    both = Outline(render([read_run(run.path), read_run(run.path)], START))
    assert not {"script", "img", "b"} & {tag for tag, _ in both.tags}


def test_values_of_secret_names_are_hidden(tmp_path: Path) -> None:
    keys = {"api_key": "s3cret", "hub": {"auth_token": "s3cret"}, "several": [{"password": "s3cret"}], "lr": 0.1}
    run = MadeRun(tmp_path / "first", model={"class_path": "my.Model", "init_args": keys})
    trained(run)
    page = written(run).text
    assert "s3cret" not in page
    assert page.count("(hidden)") >= 2
    assert "model.init_args.lr 0.1" in page


def test_planned_memory_and_the_measured_peak_are_shown(run: MadeRun) -> None:
    parts = {"parameters": 2**30, "gradients": 2**30, "optimizer_states": 2**31, "activations": 0, "buffers": 0}
    run.plan = with_memory(run.plan, parts, 70 * 2**30)
    page = written(trained(run, memory=3 * 2**30)).text
    assert "The highest peak was 3 GiB (rank 0), 75% of the planned 4 GiB (traced). A rank may use 70 GiB." in page
    assert "plan: optimizer states" in page
    assert "no memory estimate" not in page


def test_skipped_steps_and_different_loss_scales_are_reported(run: MadeRun) -> None:
    run.start()
    for step, skipped, scales in ((10, 0, [8.0, 8.0]), (20, 2, [4.0, 4.0]), (30, 2, [4.0, 8.0])):
        run.step(step)
        run.ranks(step, scale=scales, skipped=skipped)
    page = written(run).text
    assert "2 optimizer steps skipped because gradients were not finite; the loss scale was between 4 and 8." in page
    assert "ranks differ" in page
    assert "11 to 20 2" in page
    assert "all ranks always had the same loss scale" not in page


def test_equal_loss_scales_are_reported(run: MadeRun) -> None:
    page = written(trained(run, scale=64.0, skipped=0)).text
    assert "all ranks always had the same loss scale" in page
    assert "ranks 0\u20131" in page
    assert "ranks differ" not in page


def test_a_straggler_is_named(tmp_path: Path) -> None:
    run = MadeRun(tmp_path / "first", 12)
    page = written(trained(run, own=[0.02] * 7 + [0.05] + [0.02] * 4)).text
    assert "Rank 7 slowed the other ranks down." in page
    assert "Rank 7 had the longest own time (median), 2.5 times the median of the other ranks; it" in page
    assert "it was the slowest in 100% of the intervals." in page
    assert "80% of all ranks" in page


def test_the_rank_that_was_slowest_most_often_is_named_too(run: MadeRun) -> None:
    run.start()
    for number, own in enumerate([(0.011, 0.01)] * 3 + [(0.031, 0.03)] * 2 + [(0.02, 0.025)] * 4, 1):
        run.step(10 * number)
        run.ranks(10 * number, own=list(own))
    page = written(run).text
    assert "it was the slowest" not in page
    text = (
        "Rank 1 had the longest own time (median), 1.25 times the median of the other ranks, but rank 0 was the "
        "slowest in more intervals: 56%, and rank 1 in 44%."
    )
    assert text in page


def test_attempts_are_listed_with_their_ends_and_repeated_steps(run: MadeRun) -> None:
    run.start()
    for step in (10, 20, 30):
        run.step(step)
    run.write_event("checkpoint", step=20)
    run.write_event("interrupted", 5, step=30, signal=15, checkpoint="last.ckpt")
    run.clock.now += 3600
    run.start(at_step=20, versions={"torch": "2.99"})
    run.step(30)
    page = written(run).text
    assert "stopped by SIGTERM after step 30; saved a checkpoint" in page
    assert "20 to 30" in page
    assert "10 steps repeated" in page
    assert "1 restart" in page
    # The second attempt was killed.
    assert "ended without a record" in page
    assert "no report at its end: killed, or the node was lost Next: --resume auto continues it." in page
    assert f"launcher fit --config {run.path}/config.yaml --resume auto" in page
    assert "torch 2.13.0 2.99" in page


@pytest.mark.parametrize("steps", [0, 1])
def test_a_run_with_no_step_or_one_step_is_reported(run: MadeRun, steps: int) -> None:
    run.start(has_step=steps > 0)
    for step in range(1, steps + 1):
        run.step(step, loss=math.nan)
    run.write_event("finished", step=steps, metrics={})
    page = written(run).text
    assert f"optimizer steps {steps}" in page
    assert ("No optimizer step was logged." in page) == (steps == 0)
    assert ("not finite" in page) == (steps == 1)


def test_a_directory_with_only_a_config_is_reported(run: MadeRun) -> None:
    page = written(run).text
    assert "nothing recorded" in page
    assert "events.jsonl is missing: the run ended before its first event" in page
    assert "plan.json is missing" in page


@pytest.mark.parametrize("damage", ["", "[1]", "{", "a: [", "\x00", "- 1", "&a [*a]"])
def test_damaged_files_are_named_and_the_rest_is_shown(run: MadeRun, damage: str) -> None:
    trained(run, steps=10)
    (run.path / "config.yaml").write_text(damage)
    (run.path / "plan.json").write_text(damage)
    page = written(run).text
    assert "config.yaml is damaged" in page
    assert "optimizer steps 10 " in page


def test_a_plan_of_another_version_is_shown_as_far_as_possible(run: MadeRun) -> None:
    run.plan = {"strategy": "ddp", "precision": 5, "batch": [], "devices": None, "memory": {"assessments": [3]},
                "precision_reasons": "none", "world_size": "two"}  # fmt: skip
    assert "optimizer steps 100" in written(trained(run)).text


def test_the_last_lines_of_the_rank_that_failed_are_shown(run: MadeRun) -> None:
    run.start()
    lines = [f"line {n}" for n in range(100)]
    (run.path / "logs/rank-1.log").write_text(
        "\n".join([*lines, "bar 1%\rbar 2%\rbar 3%", "\x1b[31mValueError: no\x1b[0m"])
    )
    run.write_event("failed", rank=1, host="node1", error="ValueError: no")
    page = written(run).text
    assert "rank 1 on node1: ValueError: no Next: fix it; then run it again." in page
    assert "line 99 bar 3% ValueError: no" in page
    assert "line 50" not in page
    assert "bar 1%" not in page


def test_two_runs_are_compared(tmp_path: Path) -> None:
    one = trained(MadeRun(tmp_path / "a" / "same", precision="16-mixed", seed=1), scale=8.0, skipped=2)
    two = trained(MadeRun(tmp_path / "b" / "same", 4, precision="32-true", seed=2), steps=200)
    page = Outline(render([read_run(one.path), read_run(two.path)], START))
    assert "same (A) and same (B)" in page.text
    assert "optimizer steps 100 200 2 \u00d7" in page.text
    assert "precision 16-mixed 32-true differs" in page.text
    assert "seed 1 2" in page.text
    assert "world_size 2 4" in page.text
    assert "skipped steps 2 (gradients not finite) \u2013" in page.text
    assert len(set(page.ids())) == len(page.ids())
    pictures = [attrs["aria-labelledby"] for tag, attrs in page.tags if tag == "svg" and attrs.get("role") == "img"]
    assert [name for name in pictures if "narrow" not in name] == [
        f"{name}-t {name}-d" for name in ("loss", "rate", "scale", "time", "metric-0")
    ]
    # Steps, loss and precision; the time is near, all else is the same or missing in one.
    assert [attrs for tag, attrs in page.tags if tag == "tr"].count({"class": "marked"}) == 3


def test_several_runs_are_compared_with_every_metric(tmp_path: Path) -> None:
    runs = [trained(MadeRun(tmp_path / name, seed=seed)) for seed, name in enumerate("abcd")]
    runs[2].write_event("validation", step=100, metrics={"val_acc": 0.75})
    page = Outline(render([read_run(run.path) for run in runs], START))
    assert "a, b, c and d" in page.text
    assert "optimizer steps 100 100 100 100" in page.text
    assert "seed 0 1 2 3" in page.text
    assert "val_acc \u2013 \u2013 0.75 \u2013" in page.text
    assert "Not logged by a, b, d." in page.text
    assert "loss 0.8283 (0.8283 to 3.615)" in page.text
    assert len(set(page.ids())) == len(page.ids())


def test_a_comparison_of_many_runs_has_colors_for_the_first(tmp_path: Path) -> None:
    runs = [read_run(trained(MadeRun(tmp_path / f"run-{i}"), steps=20).path) for i in range(12)]
    page = Outline(render(runs, START)).text
    assert "run-0, run-1, run-2, run-3, run-4 and 7 more" in page
    assert "The first 8 runs have a color each; the other 4 are thin gray lines." in page


def test_a_run_compared_with_itself_has_no_difference(run: MadeRun) -> None:
    read = read_run(trained(run).path)
    page = Outline(render([read, read], START))
    assert page.text.count("No difference.") == 3
    assert "differs" not in page.text


def test_values_are_shown_as_in_yaml_and_not_as_in_python(tmp_path: Path) -> None:
    when = datetime.datetime(2026, 11, 25, 1, 44, tzinfo=datetime.UTC)
    options = {
        "layers": [64, 128],
        "options": [{"bias": True, "init": None}],
        "mean": 0.1 + 0.2,
        "lr": 1e-05,
        "empty": [],
    }
    run = MadeRun(tmp_path / "first", model={"class_path": "my.Model", "init_args": options})
    run.start()
    run.step(10)
    run.write_event("straggler", ranks=[1], steps=9, own_seconds=[0.1, None], text=None)
    run.write_event("a_kind_of_a_later_version", values={"a": None, "b": [True, {"c": when.isoformat()}]})
    run.write_event("evaluated", command="test", checkpoint="last.ckpt", metrics=[{"test_acc": 0.5}, {"x": "nan"}])
    run.write_event("finished", step=10, metrics={})
    page = written(run).text
    for shown in ("layers [64, 128]", "options [{bias: true, init: null}]", "mean 0.3", "lr 1e-05", "empty []",
                  "own_seconds [0.1, null]", "values {a: null, b: [true, {c: 2026-11-25T01:44:00+00:00}]}",
                  "test of last.ckpt: test_acc 0.5, x nan"):  # fmt: skip
        assert shown in page
    assert not re.search(r"None|True|False|\{'|\['|0\.30000", page.replace("`static_graph = True`", ""))


def test_every_metric_has_a_plot_and_a_row_and_pairs_share_one(run: MadeRun) -> None:
    run.start()
    for step in (10, 20):
        logged = {"train/acc": 0.1 * step, "train_loss": 1.0, "lr_scale": 1.0, **{f"m/{i}": step for i in range(30)}}
        run.write_event("step", 1, step=step, metrics=logged)
        run.write_event("validation", 1, step=step, metrics={"val/acc": 0.5 / step, "val_loss": 2.0 + step})
    run.write_event("finished", step=20, metrics={"total": 7.0})
    run.write_event("evaluated", command="test", checkpoint="c", metrics=[{"test/acc": 0.25}])
    outline = written(run)
    titles = [text for text in outline.texts if text.strip()]
    for name in ("train/acc", "val/acc", "test/acc", "lr_scale", "total", *(f"m/{i}" for i in range(30))):
        assert name in titles
    assert "acc" in titles, "the title of the pair"
    assert outline.text.count("acc train/acc val/acc test/acc") == 1, "the legend of the pair"
    assert "37 metrics, all but those of the loss in 33 plots" in outline.text
    assert "the plots after the first 12 open on a click" in outline.text
    assert "total 7 7 (step 20) 7 (step 20) 1 at the end" in outline.text


def test_a_run_with_many_metrics_stays_small_and_starts_with_a_few_plots(tmp_path: Path) -> None:
    run = MadeRun(tmp_path / "first")
    run.start()
    for step in range(10, 1010, 10):
        run.write_event("step", 1, step=step, metrics={f"metric_{i}": math.sin(step * i) for i in range(80)})
    page = render([read_run(run.path)], START)
    assert len(page) < 600_000, "1.5 MB with 200 metrics"
    assert page.count('class="small"') == 79
    assert page.partition("<details>")[0].count('class="small"') == 12


def test_peak_memory_is_the_same_everywhere(tmp_path: Path) -> None:
    run = MadeRun(tmp_path / "first")
    run.start()
    run.step(10)
    run.ranks(10, memory=3 * 2**30)
    run.write_event("memory", step=10, planned={"total": 2**32}, ranks=[0, 1], measured=[7 * 2**29, 2**30],
                    measured_by="most bytes that torch's allocator had in use on the device")  # fmt: skip
    run.write_event("finished", step=10, metrics={})
    read = read_run(run.path)
    values, page = to_values(read), written(run).text
    assert values["peak_memory"] == {"highest": 7 * 2**29, "by_rank": {"0": 7 * 2**29, "1": 3 * 2**30},
                                     "of": "allocated by torch on the device; it reserves more"}  # fmt: skip
    assert (values["figures"]["peak memory"], read.status.peak_memory) == (7 * 2**29, 7 * 2**29)
    assert "peak memory 3.5 GiB of one rank; allocated by torch on the device; it reserves more" in page
    assert "peak memory : allocated by torch on the device; it reserves more." in page
    both = Outline(render([read, read], START)).text
    assert "peak memory 3.5 GiB (of one rank; allocated by torch on the device; it reserves more)" in both


def test_the_growth_of_memory_on_a_cpu_is_not_the_peak(tmp_path: Path) -> None:
    run = MadeRun(tmp_path / "first")
    run.plan["device_kind"] = "cpu"
    run.start()
    run.step(10)
    run.ranks(10, memory=3 * 2**30)
    run.write_event("memory", step=10, planned={"total": 2**20}, ranks=[0, 1], measured=[2**20, 2**19],
                    measured_by="growth of the process's resident memory since before the model was made")  # fmt: skip
    run.write_event("finished", step=10, metrics={})
    read, page = read_run(run.path), written(run).text
    assert (read.status.peak_memory, read.status.peak_memory_of) == (3 * 2**30, "resident memory of the process (RSS)")
    assert "peak memory 3 GiB of one rank; resident memory of the process (RSS)" in page
    assert (
        "The process of a rank had at most 3 GiB: resident memory of the process (RSS). Compared with the plan" in page
    )
    assert "The highest growth was 1 MiB (rank 0)" in page


def test_the_reason_of_the_end_is_the_same_in_the_page_the_status_and_the_json(run: MadeRun) -> None:
    run.start()
    run.step(10)
    run.write_event("checkpoint", step=10)
    run.write_event("finished", step=10, metrics={}, reason="max_time")
    status = read_run(run.path).status
    assert status.detail == "trainer.max_time is over, after 10 steps"
    page = written(run).text
    assert f"{status.detail} Next: {status.advice}." in page
    assert to_values(read_run(run.path))["ending"] == {
        "state": "done", "reason": "max_time", "detail": status.detail, "advice": status.advice, "command": "",
    }  # fmt: skip


@pytest.mark.parametrize("events", [[], ["run_started"], ["run_started", "rank_failed"]])
def test_a_run_of_a_script_without_config_plan_and_metrics_is_shown(tmp_path: Path, events: list[str]) -> None:
    path = tmp_path / "script"
    (path / "logs").mkdir(parents=True)
    for kind in events:
        EventLog(path / "events.jsonl", 0).write(kind, exit_code=3, host="n1", restart=False)
    read = read_run(path)
    page = Outline(render([read], START)).text
    assert Outline(render([read, read, read], START)).text
    assert json.dumps(to_values(read), allow_nan=False)
    if "rank_failed" in events:
        assert "rank 0 on n1 ended with exit code 3" in page
        assert read.status.advice == "see: launcher logs script --rank 0; then run it again"


def test_the_report_of_a_script_has_what_is_known_of_it_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "script"
    (path / "logs").mkdir(parents=True)
    (path / "logs" / "rank-1.log").write_text("first line\nValueError: bad batch\n")
    record = {
        "kind": "module",
        "target": "pkg.train",
        "arguments": ["--lr", "1 e"],
        "cwd": "/data/me",
        "nproc_per_node": 2,
    }
    (path / "script.json").write_text(json.dumps(record))
    for rank, kind, values in (
        (0, "run_started", {"source": "launcher run", "versions": {"torch": "2.13.0"}}),
        (1, "rank_failed", {"exit_code": -9, "host": "n1", "restart": False, "error": None, "reason": "killed"}),
    ):
        EventLog(path / "events.jsonl", rank).write(kind, **values)
    read = read_run(path)
    page = Outline(render([read], START)).text
    for text in ("-m pkg.train --lr '1 e'", "/data/me", f"{path}/logs/rank-<r>.log", "exit code 137",
                 "ValueError: bad batch", "ranks on each node 2", "ranks created by launcher run", "running",
                 "torch 2.13.0"):  # fmt: skip
        assert text in page, text
    both = Outline(render([read, read], START)).text
    for text in ("optimizer step", "loss", "Loss", "precision", "strategy", "Plan", "Config", "start-up", "first step",
                 "checkpoint", "one logging interval"):  # fmt: skip
        assert text not in page, text
        assert text not in both, text
    plots = (draw_attempts(read.history.attempts, has_steps=has_steps) for has_steps in (True, False))
    assert [[bar.get_width() > 0 for bar in plot.axes[0].patches] for plot in plots] == [[True, False], [False, True]]
    figures = to_values(read)["figures"]
    assert (figures["exit code"], figures["ranks on each node"], figures["attempts"]) == (137, "2", 1)
    assert run_command(["report", str(path)]) == 0
    assert capsys.readouterr().out.startswith("script: failed\n")


@pytest.mark.parametrize(
    ("kind", "values", "code"),
    [
        ("finished", {}, 0),
        ("interrupted", {"signal": 2}, 130),
        ("rank_failed", {"exit_code": 7}, 7),
        ("failed", {}, None),
    ],
)
def test_the_exit_code_of_an_attempt_is_as_a_shell_shows_it(
    kind: str, values: dict[str, Any], code: int | None
) -> None:
    started = {"time": 1.0, "rank": 0, "kind": "run_started"}
    history = read_history([started, {**started, "kind": kind, **values}])
    assert history.attempts[0].exit_code == code
