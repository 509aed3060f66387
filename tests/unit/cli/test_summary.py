"""The summary at the end of a run."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from rich.console import Console

from launcher.cli.summary import print_summary
from launcher.training.result import FitResult


def print_to_text(tmp_path: Path) -> str:
    stream = io.StringIO()
    none: Any = None  # the plan is not used
    result = FitResult(run=tmp_path / "runs" / "it", plan=none, steps=3, metrics={"loss": 0.5}, checkpoint=None)
    print_summary(result, Console(file=stream, width=200))
    return stream.getvalue()


@pytest.mark.parametrize("installed", [True, False])
def test_the_command_for_the_report_can_be_pasted_with_and_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    (line,) = [line for line in print_to_text(tmp_path).splitlines() if line.startswith("report")]
    command = "python -m launcher report runs/it"
    assert line.split(maxsplit=1)[1].rstrip() == (
        command if installed else f'pip install "training-launcher[plot]" && {command}'
    )


NAMES = ["loss", "train_regression_mean_absolute_error", "validation_regression_root_mean_squared_error", "val_loss",
         "train_gradient_norm_of_the_encoder_part", "learning_rate_of_the_first_group"]  # fmt: skip


@pytest.mark.parametrize("width", [40, 80, 100_000])
@pytest.mark.parametrize("count", [0, 1, 6])
def test_no_metric_is_divided_and_no_command_has_a_line_break(tmp_path: Path, width: int, count: int) -> None:
    stream = io.StringIO()
    none: Any = None  # the plan is not used
    run = tmp_path / "a run with a long name that was given by a user"
    metrics = dict.fromkeys(NAMES[:count], 0.123456)
    print_summary(FitResult(run, none, metrics, 3, run / "checkpoints" / "last.ckpt"),
                  Console(file=stream, width=width))  # fmt: skip
    lines = stream.getvalue().splitlines()
    places = [next(i for i, line in enumerate(lines) if line.startswith(each)) for each in ("metrics", "run ")]
    shown = [item for line in lines[slice(*places)] for item in line[12:].split("  ")]
    assert shown == ([f"{name} 0.1235" for name in metrics] or ["none logged"])
    assert all(len(line) <= max(min(width, 160), 12 + 53) for line in lines[slice(*places)])
    (last,) = [line for line in lines if line.startswith("continue")]
    assert last[12:] == (f"python -m launcher fit --config '{run}/config.yaml' --resume auto --trainer.max_epochs N")


def test_the_problem_of_a_training_is_in_its_summary(tmp_path: Path) -> None:
    stream = io.StringIO()
    none: Any = None  # the plan is not used
    print_summary(FitResult(tmp_path, none, {}, 3, None, problem="the loss is not finite"), Console(file=stream))
    assert "\nproblem     the loss is not finite\n" in stream.getvalue()
    assert "\nproblem" not in print_to_text(tmp_path)


@pytest.mark.parametrize(("max_steps", "limit"), [(3, "max_steps"), (4, "max_epochs"), (-1, "max_epochs")])
def test_the_command_that_continues_raises_the_limit_that_was_reached(
    tmp_path: Path, max_steps: int, limit: str
) -> None:
    stream = io.StringIO()
    none: Any = None  # the plan is not used
    trainer = pl.Trainer(max_steps=max_steps, max_epochs=2, logger=False, accelerator="cpu")
    print_summary(FitResult(tmp_path, none, {}, 3, tmp_path / "last.ckpt", trainer=trainer), Console(file=stream))
    assert stream.getvalue().rstrip().endswith(f"--resume auto --trainer.{limit} N")


@pytest.mark.parametrize(("folders", "shown"), [
    ([], None),
    (["run-1-id", "run-2-id"], "runs/it/wandb/run-2-id"),
    (["offline-run-1-id"], "wandb sync runs/it/wandb/offline-run-1-id"),
    (["offline-run-1-id", "offline-run-2-id", "run-3-id"],
     'for run in runs/it/wandb/offline-run-*; do wandb sync "$run"; done'),
])  # fmt: skip
def test_a_run_has_one_line_of_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folders: list[str], shown: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in folders:
        place = tmp_path / "runs" / "it" / "wandb" / name
        place.mkdir(parents=True)
        (place / "run-id.wandb").write_bytes(b"x" * 100)
    lines = [line[12:] for line in print_to_text(tmp_path).splitlines() if line.startswith("W&B")]
    assert lines == ([] if shown is None else [shown])
