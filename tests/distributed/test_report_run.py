"""Reports on real runs, shown by a real browser."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from tests.support.browser import Page, browser
from tests.support.made_run import MadeRun
from tests.support.processes import launcher, run_warm
from tests.support.runs import TOY, events_of, toy_env, train_on

pytestmark = pytest.mark.slow
SETTINGS = (*TOY, "--name", "it", "--global_batch_size", "8", "--trainer.log_every_n_steps", "1")
NASTY = '"><script>document.title="run"</script><img src="http://192.0.2.1/x" onerror="document.title=1"></svg>'


def _report(cwd: Path, *arguments: str) -> Path:
    output = run_warm(launcher("report", *arguments), cwd).check().output
    return Path(output.splitlines()[-1])


def _contrast(page: Page, selector: str, attribute: str) -> float:
    """The smallest WCAG 2 contrast of these elements with their section; there must be some."""
    found: Sequence[Sequence[str]] = page.evaluate(
        f"""[...document.querySelectorAll({selector!r})].map(e => [getComputedStyle(e)[{attribute!r}],
             getComputedStyle(e.closest('section')).backgroundColor])"""
    )
    assert found, selector

    def luminance(color: str) -> float:
        shares = [int(part) / 255 for part in color[color.index("(") + 1 : -1].split(",")[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in shares]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    ratios: list[float] = []
    for one, other in found:
        if one != "none":
            low, high = sorted((luminance(one), luminance(other)))
            ratios.append((high + 0.05) / (low + 0.05))
    return min(ratios)


def _pictures(page: Page, file: Path) -> list[float]:
    """For each visible plot the share of pixels that are not background."""
    boxes = page.evaluate(
        """[...document.querySelectorAll('.plot svg')].map(e => { const b = e.getBoundingClientRect();
             return [b.x + scrollX, b.y + scrollY, b.width, b.height] }).filter(b => b[2])"""
    )
    page.screenshot(file)
    pixels = matplotlib.image.imread(file)[:, :, :3]
    shares: list[float] = []
    for x, y, width, height in boxes:
        part = pixels[int(y) : int(y + height), int(x) : int(x + width)]
        shares.append(float((np.abs(part - part[0, 0]).max(axis=2) > 0.1).mean()))
    return shares


def test_a_resumed_fp16_run_of_two_ranks_is_reported_in_a_browser(tmp_path: Path) -> None:
    arguments = (*SETTINGS, "--precision", "16-mixed", "--trainer.max_epochs", "3")
    env = toy_env(tmp_path / "trace")
    train_on(2, (*arguments, "--model.signal_at", "7"), tmp_path, env).check(130)
    train_on(2, (*arguments, "--resume", "auto"), tmp_path, env).check()
    directory = tmp_path / "runs" / "it"
    skipped = events_of(directory, "ranks")[-1]["skipped_steps"][0]
    assert skipped > 0, "the toy overflows"
    report = _report(tmp_path, "it")
    stopped_at = events_of(directory, "interrupted")[0]["step"]
    first = events_of(directory, "first_step")
    assert [len(event["metrics"]) == len(event["learning_rate"]) == 1 for event in first] == [True, True]

    with browser(tmp_path / "profile") as page:
        page.open(report)
        text = page.evaluate("document.body.innerText")
        for wanted in (
            "it finished", "optimizer steps\n24", "precision\n16-mixed", "strategy\nddp\n2 ranks",
            f"skipped steps\n{skipped}\n", f"stopped by Ctrl-C after step {stopped_at}; saved a checkpoint",
            f"{stopped_at} to 24", "ranks 0\u20131", "all ranks always had the same loss scale",
            "a later attempt starts", "The learning rate for the next step was between", "rank 1", "data.class_path",
            "tests.support.toy.ToyData", "lightning\t2.",
        ):  # fmt: skip
            assert wanted in text, f"{wanted!r} is not in\n{text}"
        for scheme in ("light", "dark"):
            page.show_as(scheme)
            assert _contrast(page, ".plot text", "fill") >= 4.5, scheme
            assert _contrast(page, "section p, section td, section th, figcaption, caption", "color") >= 4.5, scheme
            assert _contrast(page, ".legend .swatch path, .legend .swatch [fill^=var]", "stroke") >= 3, scheme
            shares = _pictures(page, tmp_path / f"{scheme}.png")
            assert len(shares) == 9
            assert min(shares) > 0.01, shares
        light, dark = (matplotlib.image.imread(tmp_path / f"{s}.png")[:, :, :3].mean() for s in ("light", "dark"))
        assert light > 0.8
        assert dark < 0.3
        # Collapsed parts are printed, and a narrow window has no horizontal overflow.
        assert page.evaluate("document.querySelector('details table').getBoundingClientRect().height") == 0
        page.show_as("dark", media="print")
        assert page.evaluate("document.querySelector('details table').getBoundingClientRect().height") > 20
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        page.print(tmp_path / "report.pdf")
        assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
        page.show_as("light", width=420)
        assert page.evaluate("document.documentElement.scrollWidth") <= 420
        assert page.complaints == []
        assert page.requests == [report.as_uri()]


def test_a_failed_run_and_a_run_with_markup_in_its_names_are_compared_in_a_browser(tmp_path: Path) -> None:
    arguments = (*SETTINGS, "--trainer.max_epochs", "1", "--model.raise_at", "3", "--model.by_rank", "1")
    train_on(2, arguments, tmp_path, toy_env(tmp_path / "trace")).check(1)
    made = MadeRun(tmp_path / "runs" / "<b>made", model={"class_path": NASTY})
    made.start(versions={NASTY: NASTY}, host=NASTY)
    for step in (10, 20, 30):
        made.write_event("step", 1, step=step, seconds_per_step=0.1, metrics={"loss" + NASTY: 2.0})
        made.ranks(step)
    made.write_event("failed", error=NASTY)

    with browser(tmp_path / "profile") as page:
        page.open(_report(tmp_path, "it"))
        text = page.evaluate("document.body.innerText")
        assert "What went wrong" in text
        assert "ValueError: the user's own mistake" in text
        assert "logs/rank-1.log" in text
        assert "raise ValueError(" in page.evaluate("document.querySelector('pre').innerText")
        for report in (_report(tmp_path, "<b>made"), _report(tmp_path, "it", "<b>made")):
            page.open(report)
            assert page.evaluate("document.querySelectorAll('script, img, b').length") == 0
            assert NASTY in page.evaluate("document.body.textContent")
            assert page.evaluate("document.title").endswith("\u00b7 launcher report")
            page.show_as()
            assert min(_pictures(page, tmp_path / "page.png")) > 0.01
        assert page.complaints == []
        assert all(address.startswith("file:") for address in page.requests)
