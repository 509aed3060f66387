"""Pages of many kinds of runs in a real browser, on a wide screen and on a phone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.report.command import render
from launcher.report.source import read_run
from launcher.report.sweep_source import read_sweep
from tests.support.browser import Page, browser
from tests.support.made_run import START, MadeRun, with_memory

pytestmark = pytest.mark.slow
PARTS = {"parameters": 2**30, "gradients": 2**30, "optimizer_states": 2**31, "activations": 2**29, "buffers": 0}
ERROR = "ValueError: Expected input batch_size (32) to match target batch_size (31)."

# Elements beyond the right edge, except in boxes that scroll.
OVERFLOW = """[...document.body.querySelectorAll('*')].filter(e => !e.closest('.scroll, pre, svg')
    && e.getBoundingClientRect().width && e.getBoundingClientRect().right > innerWidth + 1)
    .map(e => e.outerHTML.slice(0, 200))"""
# Words of up to 20 letters that are not on one line: their column is narrower than its longest word.
BROKEN = """(() => { const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode());) {
    if (node.parentElement.closest('svg')) continue;
    for (const word of node.data.matchAll(/[\\p{L}\\p{N}_]+/gu)) {
      if (word[0].length > 20) continue;
      const range = document.createRange();
      range.setStart(node, word.index); range.setEnd(node, word.index + word[0].length);
      if (new Set([...range.getClientRects()].map(r => Math.round(r.top))).size > 1)
        found.push(word[0] + ' in ' + node.data.slice(0, 80));
    } }
  return found; })()"""
# The smallest text of the visible plots in pixels of the screen, and the widest plot.
PLOTS = """(() => {
  const shown = [...document.querySelectorAll('.plot svg')].filter(e => e.getBoundingClientRect().width);
  return [shown.length, Math.max(...shown.map(e => e.getBoundingClientRect().right)),
    Math.min(...shown.map(e => parseFloat(getComputedStyle(e.querySelector('text')).fontSize)
      * e.getBoundingClientRect().width / e.viewBox.baseVal.width))]; })()"""


def _train(run: MadeRun, begin: int, end: int, metrics: int = 0, **ranks: Any) -> None:
    for step in range(begin + 20, end + 1, 20):
        loss = 4 * math.exp(-step / 200) + 0.5
        more = {f"grad_norm/layer_{i}": loss * i for i in range(metrics)}
        logged = {"train_loss": loss, "train_acc": 1 - loss / 5, **more}
        run.write_event("step", 1, step=step, seconds_per_step=0.1, metrics=logged, learning_rate=[1e-3])
        run.ranks(step, **{key: value(step) if callable(value) else value for key, value in ranks.items()})
        if step % 100 == 0:
            run.write_event("validation", 1, step=step, metrics={"val_loss": loss + 0.2, "val_acc": 1 - loss / 4})
            run.write_event("checkpoint", step=step)


def _make(runs: Path, name: str, world_size: int = 2, **config: Any) -> MadeRun:
    run = MadeRun(runs / name, world_size, **config)
    run.plan = with_memory(run.plan, PARTS, 70 * 2**30)
    run.start()
    return run


def _finish(run: MadeRun, step: int) -> None:
    run.write_event("memory", step=step, planned={"total": sum(PARTS.values())}, ranks=list(range(run.world_size)),
                    measured=[2**31] * run.world_size, measured_by="bytes of torch's allocator")  # fmt: skip
    run.write_event("finished", step=step, metrics={})


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    runs = tmp_path_factory.mktemp("runs")
    model = {"class_path": "my_project.models.TransformerClassifier",
             "init_args": {"layers": [64, 128], "options": [{"bias": True, "init": None}]}}  # fmt: skip
    normal = _make(runs, "normal", model=model)
    _train(normal, 0, 400)
    _finish(normal, 400)
    fp16 = _make(runs, "fp16", 4, precision="16-mixed")
    _train(fp16, 0, 400, scale=lambda step: 65536.0 / 2 ** (step // 100), skipped=lambda step: step // 100)
    text = "The loss scale of ranks 0 to 3 has been at its floor for 20 steps: gradients overflow again and again."
    fp16.write_event("alert", alert="scale_at_floor", step=300, ranks=[0, 1, 2, 3], title="loss scale low", text=text)
    _finish(fp16, 400)
    restarts = _make(runs, "restarts")
    _train(restarts, 0, 200)
    restarts.write_event("rank_failed", 1, rank=1, host="gpu-node-0017.cluster.example.org", exit_code=-9, restart=True)
    restarts.start(at_step=200)
    _train(restarts, 200, 300)
    restarts.write_event("interrupted", 1, step=300, signal=15, checkpoint="last.ckpt")
    failed = _make(runs, "failed")
    _train(failed, 0, 200)
    failed.write_event("failed", 1, rank=1, host="node2", error=ERROR)
    (failed.path / "logs/rank-1.log").write_text(f'  File "/home/me/a/long/path/train.py", line 210\n{ERROR}\n')
    many = _make(runs, "many", 1)
    _train(many, 0, 400, metrics=40)
    _finish(many, 400)
    members = [{"index": i, "name": f"s-{i}", "overrides": {"model.init_args.lr": 10.0**-i}} for i in range(6)]
    for member in members[:5]:
        run = _make(runs, member["name"], seed=member["index"])
        _train(run, 0, 200)
        if member["index"] == 3:
            run.write_event("failed", 1, rank=0, host="n1", error=ERROR)
        else:
            _finish(run, 200)
    (runs / "s").mkdir()
    (runs / "s" / "sweep.json").write_text(json.dumps(members))
    shown = {name: [read_run(runs / name)] for name in ("normal", "fp16", "restarts", "failed", "many")}
    shown["compared"] = [read_run(runs / name) for name in ("normal", "fp16", "restarts", "failed")]
    made = {name: render(found, START) for name, found in shown.items()}
    made["sweep"] = render(read_sweep(runs / "s"), START)
    files = {name: runs / f"{name}.html" for name in made}
    for name, page in made.items():
        files[name].write_text(page)
    return files


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("browser") / "profile") as opened:
        yield opened


@pytest.mark.parametrize("name", ["normal", "fp16", "restarts", "failed", "many", "compared", "sweep"])
def test_a_page_fits_a_phone(pages: dict[str, Path], page: Page, name: str) -> None:
    page.open(pages[name])
    page.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    for width, smallest in ((390, 8.5), (1280, 9.0)):
        page.show_as(width=width)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(OVERFLOW) == []
        assert page.evaluate(BROKEN) == []
        count, right, text = page.evaluate(PLOTS)
        assert (count > 3, right <= width, text >= smallest) == (True, True, True), (count, right, text)
    # A reason of the plan names the setting of the user's code.
    text = page.evaluate("document.body.textContent").replace("`static_graph = True`", "")
    assert not [word for word in ("None", "True", "False", "{'", "['", "datetime") if word in text]
    assert page.complaints == []


def test_the_titles_of_columns_are_explained_without_a_pointer(pages: dict[str, Path], page: Page) -> None:
    page.open(pages["sweep"])
    page.show_as(width=390)
    assert "best, last: values of val_loss; the lowest is the best" in page.evaluate("document.body.innerText")
    assert page.evaluate("document.querySelectorAll('[title]').length") == 0
    page.open(pages["fp16"])
    assert "\u00d7 others: own time divided by the median of the other ranks" in page.evaluate(
        "document.body.innerText"
    )
