"""The built-in demo: text and model fit together, and the bigram baseline is correct."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.demos.boring_classes import BoringModel

from launcher.demo.data import DemoText, TextWindows
from launcher.demo.model import DemoGPT, DemoReport, lr_factor


@pytest.fixture(scope="module")
def text() -> DemoText:
    made = DemoText()
    made.setup()
    return made


def positions(windows: TextWindows | None) -> set[int]:
    """Of every character that a window shows, as an input or as the last target."""
    assert windows is not None
    return {at for start in windows.starts for at in range(start, start + windows.block_size + 1)}


def test_model_and_text_have_the_same_vocabulary(text: DemoText) -> None:
    assert DemoGPT().head.out_features == text.vocab_size
    assert text.train_windows is not None
    assert 0 <= int(text.train_windows.ids.min()) <= int(text.train_windows.ids.max()) < text.vocab_size


@pytest.mark.parametrize("block_size", [1, 64, 999])
def test_training_and_validation_share_no_character(block_size: int) -> None:
    text = DemoText(block_size=block_size)
    text.setup()
    train, validation = positions(text.train_windows), positions(text.validation_windows)
    assert train
    assert validation
    assert not train & validation
    assert text.train_windows is not None
    assert max(train | validation) < len(text.train_windows.ids)


def test_the_bigram_model_is_a_fair_baseline(text: DemoText) -> None:
    assert 2 < text.bigram_loss() < 3 < math.log(text.vocab_size)


def test_the_learning_rate_rises_then_falls_to_a_tenth() -> None:
    factors = [lr_factor(step, 50, 1000) for step in range(1001)]
    assert factors[:50] == pytest.approx([(step + 1) / 50 for step in range(50)])
    assert factors[50] == 1
    assert all(later < earlier for earlier, later in itertools.pairwise(factors[50:]))
    assert factors[525] == pytest.approx(0.55), "half-way down in the middle"
    assert factors[1000] == pytest.approx(0.1)
    assert lr_factor(5000, 50, 1000) == pytest.approx(0.1), "it stays there"


def test_a_short_run_warms_up_for_a_tenth_of_it() -> None:
    assert [lr_factor(step, 50, 100) for step in (0, 9, 10)] == pytest.approx([0.1, 1, 1])
    assert lr_factor(0, 50, 1) == 1


def test_a_run_of_unknown_length_stays_at_the_peak() -> None:
    assert [lr_factor(step, 50, math.inf) for step in (0, 49, 50, 10**6)] == pytest.approx([0.02, 1, 1, 1])


def printed_report(text: DemoText, model: Any, capsys: pytest.CaptureFixture[str], *, rank_zero: bool) -> str:
    trainer: Any = SimpleNamespace(datamodule=text, callback_metrics={"val_loss": 1.25}, is_global_zero=rank_zero)
    DemoReport().on_fit_end(trainer, model)
    return capsys.readouterr().out


def test_only_rank_zero_prints_the_report(text: DemoText, capsys: pytest.CaptureFixture[str]) -> None:
    model = DemoGPT(block_size=8, n_layer=1, n_head=1, n_embd=4)
    assert printed_report(text, model, capsys, rank_zero=False) == ""
    bigram, own, sample = printed_report(text, model, capsys, rank_zero=True).splitlines()
    assert bigram == f"a bigram model of the same text: val_loss {text.bigram_loss():.3f} nats per character"
    assert own == "this model:                      val_loss 1.250"
    assert sample.startswith("a sample: The ")


def test_there_is_no_report_on_another_model(text: DemoText, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed_report(text, BoringModel(), capsys, rank_zero=True) == ""
