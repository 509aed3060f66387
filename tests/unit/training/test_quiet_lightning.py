"""Lightning's warnings in a run: advice about the user's code is a short notice, once, without Lightning's paths."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader

from launcher.training.quiet_lightning import _ADVICE, EVALUATION_WARNINGS, quiet_lightning, shorten_advice

_SYNC = (
    "It is recommended to use `self.log({!r}, ..., sync_dist=True)` when logging on epoch level in distributed "
    "setting to accumulate the metric across devices."
)


@pytest.fixture
def shown() -> Iterator[list[Any]]:
    """The warnings that Python itself shows."""
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        yield shown


def test_another_directory_of_checkpoints_is_not_reported(tmp_path: Path, shown: list[Any]) -> None:
    before, now = ModelCheckpoint(tmp_path / "version_1"), ModelCheckpoint(tmp_path / "version_3")
    now.load_state_dict(before.state_dict())
    assert len(shown) == 1, "Lightning warns of it"
    notices: list[str] = []
    with quiet_lightning(*EVALUATION_WARNINGS, notice=notices.append):
        now.load_state_dict(before.state_dict())
    assert (len(shown), notices) == (1, [])


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_advice_of_a_training_is_one_short_notice_each(shown: list[Any], tmp_path: Path) -> None:
    notices: list[str] = []
    loader = DataLoader(torch.ones(6, 1), batch_size=2)  # type: ignore[arg-type]
    with quiet_lightning(notice=notices.append):
        for _ in range(2):
            quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
            trainer = pl.Trainer(accelerator="cpu", max_epochs=1, default_root_dir=str(tmp_path), **quiet)
            trainer.fit(Net(), loader, loader)
        rank_zero_warn("the user's own")
        warnings.warn("also the user's own", stacklevel=1)
    assert "val_dataloader is not used: the model has no validation_step" in notices
    assert ("an epoch has 3 training batches, fewer than trainer.log_every_n_steps 50: lower it to see more metrics"
            in notices)  # fmt: skip
    assert len(set(notices)) == len(notices)
    assert not any("site-packages" in text for text in notices)
    assert [str(each.message) for each in shown if each.filename == __file__] == [
        "the user's own", "also the user's own"
    ]  # fmt: skip


def test_each_kind_is_reported_once_whatever_it_names() -> None:
    texts = [_SYNC.format(name) for name in ("val_loss", "val/acc@1", "x" * 300, "it's")]
    texts += [f"The '{name}_dataloader' does not have many workers which may be a bottleneck." for name in "ab"]
    texts += [f"Trying to infer the `batch_size` from an ambiguous collection. The batch size we found is {n}. To "
              "avoid any miscalculations, use `self.log(..., batch_size=batch_size)`." for n in (1, 23)]  # fmt: skip
    assert len({shorten_advice(text)[0] for text in texts}) == 3


@pytest.mark.parametrize(
    "text", [_SYNC.format("a"), "one word", "a sentence. " * 60, "word " * 100, "lines\n of\ntext"]
)
def test_a_notice_is_one_line_of_bounded_length(text: str) -> None:
    _, short = shorten_advice(text)
    assert 0 < len(short) <= 220
    assert "\n" not in short
    assert short.startswith("Lightning: ") or text.startswith("It is")


def test_lightning_still_gives_the_advice_that_has_texts_of_its_own() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in Path(pl.__file__).parent.rglob("*.py"))
    for start in ("It is recommended to use `self.log(", "is smaller than the logging interval",
                  "does not have many workers", "but have no `validation_step`", "but have no `val_dataloader`",
                  "Couldn't infer the batch indices"):  # fmt: skip
        assert start in sources
        assert any(start.split("`")[0].strip() in pattern for pattern, _ in _ADVICE)


def test_settings_of_the_users_code_stay_and_the_own_ones_end() -> None:
    before = warnings.showwarning
    with quiet_lightning(notice=print):
        assert warnings.showwarning != before
    assert warnings.showwarning == before
    with quiet_lightning():
        assert warnings.showwarning == before, "a rank without notices shows them as they are"

    def users(*_: Any) -> None:
        """A replacement."""

    try:
        with quiet_lightning(notice=print):
            warnings.showwarning = users
        assert warnings.showwarning is users
    finally:
        warnings.showwarning = before
