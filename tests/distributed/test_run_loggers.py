"""The loggers of a real run, on one rank and on two, receive the monitor's rows, alerts and the final summary."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.runs import REPOSITORY, only_run, train_on
from tests.support.wandb_file import alerts, history_rows, summary_of

pytestmark = pytest.mark.slow

_LOGGERS = "lightning.pytorch.loggers"
_CONFIG: dict[str, Any] = {
    "model": {"class_path": "tests.support.callback_user.Net", "init_args": {"lr": 0.125}},
    "data": {"class_path": "tests.support.callback_user.Data"},
    "accelerator": "cpu",
    "precision": "16-mixed",
    # Every scale is below this floor: an alert at the first sample.
    "watch": {"floor": 1e9, "floor_steps": 1},
    "trainer": {
        "max_epochs": 1,
        "log_every_n_steps": 2,
        "logger": [
            {"class_path": f"{_LOGGERS}.CSVLogger", "init_args": {"save_dir": "csv"}},
            {"class_path": f"{_LOGGERS}.TensorBoardLogger", "init_args": {"save_dir": "board"}},
            {"class_path": f"{_LOGGERS}.MLFlowLogger", "init_args": {"tracking_uri": "file:mlruns"}},
        ],
    },
}


def _table(folder: Path) -> list[dict[str, str]]:
    (file,) = folder.glob("csv/lightning_logs/*/metrics.csv")
    with file.open() as lines:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(lines)]


def _board(folder: Path) -> tuple[dict[str, list[int]], dict[str, str]]:
    """The steps of each scalar, and the texts."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (place,) = folder.glob("board/lightning_logs/*")
    events = accumulator.EventAccumulator(str(place))
    events.Reload()
    texts = {tag.removesuffix("/text_summary"): events.Tensors(tag)[0].tensor_proto.string_val[0].decode()
             for tag in events.Tags()["tensors"] if tag.endswith("/text_summary")}  # fmt: skip
    return {tag: [each.step for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]}, texts


def _mlflow(folder: Path) -> tuple[dict[str, list[int]], dict[str, str]]:
    """The steps of each metric, and the tags, of the one run."""
    (run,) = (path.parent for path in folder.glob("mlruns/*/*/meta.yaml"))
    metrics = {str(file.relative_to(run / "metrics")): [int(line.split()[2]) for line in file.read_text().splitlines()]
               for file in run.glob("metrics/**/*") if file.is_file()}  # fmt: skip
    tags = {str(file.relative_to(run / "tags")): file.read_text() for file in run.glob("tags/**/*") if file.is_file()}
    return metrics, tags


@pytest.mark.parametrize(("ranks", "mode"), [(1, "disabled"), (2, "offline")])
def test_each_logger_receives_rows_alerts_and_the_summary(tmp_path: Path, ranks: int, mode: str) -> None:
    pytest.importorskip("mlflow")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(_CONFIG))
    env = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "WANDB_MODE": mode, "MLFLOW_ALLOW_FILE_STORE": "true"}
    ended = train_on(ranks, ("fit", "--config", "c.yaml"), tmp_path, env).check()
    assert "did not accept" not in ended.output
    # 16 samples in batches of 2: the rows have the steps of the user's rows.
    steps = list(range(1, 16 // 2 // ranks, 2))
    best = str(next((only_run(tmp_path) / "checkpoints").glob("epoch*.ckpt")))
    alert = "step 2: the loss scale stays at its floor: "

    table = _table(tmp_path)
    assert [int(row["step"]) for row in table if "amp/loss_scale" in row] == steps
    assert [int(row["step"]) for row in table if "loss" in row] == steps, "the user's own column"
    assert {row["amp/precision"] for row in table if "amp/loss_scale" in row} == {"16-mixed"}
    assert [row["alert/scale_at_floor"][: len(alert)] for row in table if "alert/scale_at_floor" in row] == [alert]
    assert (table[-1]["final/best_checkpoint"], int(table[-1]["final/steps"])) == (best, 8 // ranks)
    assert "final/loss" in table[-1]

    for numbers, texts in (_board(tmp_path), _mlflow(tmp_path)):
        assert numbers["amp/loss_scale"] == numbers["perf/step_seconds"] == numbers["loss"] == steps
        assert numbers["final/steps"] == numbers["final/val_loss"] == [8 // ranks - 1]
        assert texts["alert/scale_at_floor"].startswith(alert)
        assert (texts["final/best_checkpoint"], texts["amp/precision"]) == (best, "16-mixed")

    if mode == "offline":
        rows = [row for row in history_rows(tmp_path) if "amp/loss_scale" in row]
        assert [row["trainer/global_step"] for row in rows] == [step + 1 for step in steps]
        assert [title for title, _ in alerts(tmp_path)] == ["the loss scale stays at its floor"]
        summary = summary_of(tmp_path)
        assert (summary["final/best_checkpoint"], summary["final/steps"]) == (best, 8 // ranks)
    else:
        assert not list(tmp_path.glob("**/*.wandb"))
