"""A resumed run continues its log files, with the same rows as an uninterrupted run."""

from __future__ import annotations

import csv
import functools
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.support.runs import toy_env, train_on

pytestmark = pytest.mark.slow

_LOGGERS = "lightning.pytorch.loggers"
_CONFIG = {
    "model": {"class_path": "tests.support.toy.Noisy"},
    "data": {"class_path": "tests.support.toy.NoisyData"},
    "global_batch_size": 8,
    "wandb": {"mode": "disabled"},
    "trainer": {
        "max_epochs": 3,
        "log_every_n_steps": 1,
        "val_check_interval": 0.5,
        "logger": [
            {"class_path": f"{_LOGGERS}.CSVLogger", "init_args": {"save_dir": "logs"}},
            {"class_path": f"{_LOGGERS}.TensorBoardLogger", "init_args": {"save_dir": "board", "name": "mine"}},
        ],
        "callbacks": [
            {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
             "init_args": {"monitor": "val_loss", "save_top_k": 2}},
            {"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"},
        ],
    },
}  # fmt: skip


def _train(folder: Path, ranks: int, *arguments: str, code: int = 0) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "c.yaml").write_text(yaml.safe_dump(_CONFIG))
    arguments = ("--config", "c.yaml", "--name", "it", *arguments)
    train_on(ranks, arguments, folder, toy_env(folder / "trace")).check(code)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Folder of an uninterrupted run."""

    @functools.cache
    def train(ranks: int) -> Path:
        folder = tmp_path_factory.mktemp("uninterrupted")
        _train(folder, ranks)
        return folder

    return train


# The use of time over all attempts.
_OF_ATTEMPTS = "goodput/"


def _is_measured(name: str) -> bool:
    """Whether it differs from run to run: a time, or the memory of the process."""
    return name.startswith("perf/")


def _rows(folder: Path) -> list[dict[str, str]]:
    """The rows, with times only as present or not."""
    (file,) = folder.glob("logs/lightning_logs/*/metrics.csv")
    with file.open() as lines:
        rows = list(csv.DictReader(lines))
    assert any(row["perf/step_seconds"] for row in rows)
    # The final row is written again at the end of each attempt that ends well.
    return [{name: str(bool(value)) if _is_measured(name) else value for name, value in row.items()
             if not name.startswith(_OF_ATTEMPTS)} for row in rows if not row["final/best_checkpoint"]]  # fmt: skip


def _scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (place,) = folder.glob("board/mine/*")
    events = accumulator.EventAccumulator(str(place))
    events.Reload()
    assert "perf/step_seconds" in events.Tags()["scalars"]
    return {tag: [(each.step, 0.0 if _is_measured(tag) else each.value) for each in events.Scalars(tag)]
            for tag in events.Tags()["scalars"] if not tag.startswith(_OF_ATTEMPTS)}  # fmt: skip


# After 12 steps: in the second epoch, which has a validation in the middle. A kill goes back to the end of the first.
@pytest.mark.parametrize(
    ("ranks", "arguments", "code"),
    [(1, ("--model.kill_at", "12"), -signal.SIGKILL), (2, ("--model.signal_at", "12"), 128 + signal.SIGINT)],
)
def test_rows_and_checkpoints_of_a_resumed_run_equal_those_of_an_uninterrupted_one(
    tmp_path: Path, uninterrupted: Callable[[int], Path], ranks: int, arguments: tuple[str, ...], code: int
) -> None:
    parts = tmp_path / "parts"
    _train(parts, ranks, *arguments, code=code)
    _train(parts, ranks, "--resume", "auto")
    assert _rows(parts) == _rows(uninterrupted(ranks))
    assert _scalars(parts) == _scalars(uninterrupted(ranks))

    def checkpoints(folder: Path) -> list[str]:
        return sorted(str(each.relative_to(folder)) for each in folder.glob("logs/**/*.ckpt"))

    assert len(checkpoints(parts)) == 2, "save_top_k over the attempts"
    assert checkpoints(parts) == checkpoints(uninterrupted(ranks))
    places = parts / "runs" / "it" / "loggers.json"
    assert places.stat().st_mode & 0o777 == 0o600
