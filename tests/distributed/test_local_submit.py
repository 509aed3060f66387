"""`launcher submit --cluster local`: a background run on this machine, inspected and cancelled by its name."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from launcher.process.background import is_running
from launcher.runs.submission_record import read_records
from tests.support.processes import Finished, launcher, run_warm
from tests.support.runs import REPOSITORY, TOY, events_of, read_trace
from tests.support.slurm_cluster import wait_until

pytestmark = pytest.mark.slow
MODEL = (*TOY, "--model", "tests.support.slurm_paced.PacedToy", "--accelerator", "cpu", "--devices", "2", "--name",
         "it",
         "--global_batch_size", "8", "--trainer.max_epochs", "3")  # fmt: skip


def _launch(cwd: Path, *given: str, pace: str = "0") -> Finished:
    own = {"TRACE": str(cwd / "trace"), "PACE": pace, "PYTHONPATH": str(REPOSITORY)}
    return run_warm(launcher(*given), cwd, env=own, timeout=120)


def _ended(cwd: Path) -> None:
    """Wait for the background process, which no fixture tracks; end it if it takes too long."""
    record = read_records(cwd / "runs" / "it")[-1]
    try:
        wait_until("the end", lambda: not is_running(record["pid"], record["started"]), 150)
    finally:
        if is_running(record["pid"], record["started"]):
            os.killpg(record["pid"], signal.SIGKILL)
    assert (cwd / "runs" / "it" / "submissions").exists()


def test_a_background_run_is_cancelled_saved_and_resumed(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    assert "runs in the background" in _launch(whole, "submit", "--cluster", "local", *MODEL).check().output
    _ended(whole)
    status = json.loads(_launch(whole, "status", "it", "--json").check().output)
    assert (status["state"], status["step"], status["attempts"]) == ("done", 24, 1)
    assert "Plan" in _launch(whole, "logs", "it").check().output
    # The copied user code keeps its file modes.
    (here := tmp_path / "here").touch()
    assert (whole / "trace-0").stat().st_mode == here.stat().st_mode

    _launch(parts, "submit", "--cluster", "local", *MODEL, pace="0.5").check()
    trace = parts / "trace-0"
    wait_until("the second epoch", lambda: trace.exists() and trace.read_text().count("\n") > 9, 120)
    assert json.loads(_launch(parts, "status", "it", "--json").check().output)["state"] == "running"
    again = _launch(parts, "submit", "--cluster", "local", *MODEL, "--resume", "auto").check(2)
    assert "run 'it' is running already" in again.output
    assert "asked to save and stop" in _launch(parts, "cancel", "it").check().output
    _ended(parts)
    status = json.loads(_launch(parts, "status", "it", "--json").check().output)
    assert (status["state"], status["checkpoint_step"]) == ("stopped", status["step"])
    _launch(parts, "submit", "--cluster", "local", *MODEL, "--resume", "auto").check()
    _ended(parts)
    for rank in range(2):
        # Dropout continues too: the generators of both ranks were saved.
        assert read_trace(parts / "trace", rank) == read_trace(whole / "trace", rank)
    assert len({event["wandb_id"] for event in events_of(parts / "runs" / "it", "run_started")}) == 1


def test_status_logs_and_report_have_the_reason_of_a_job_with_a_config_error(tmp_path: Path) -> None:
    # Mistakes of the model and the data are found before a job is queued, those of callbacks by the job.
    callbacks = '[{"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitr": "loss"}}]'
    _launch(tmp_path, "submit", "--cluster", "local", *MODEL, "--trainer.callbacks", callbacks).check()
    _ended(tmp_path)
    reason, file = "EarlyStopping takes no monitr", "runs/it/submissions/1/output.log"
    status = json.loads(_launch(tmp_path, "status", "it", "--json").check().output)
    assert status["state"] == "failed"
    for text in (status["detail"], _launch(tmp_path, "logs", "it").check().output,
                 _launch(tmp_path, "report", "it").check(2).output):  # fmt: skip
        assert reason in text
        assert file in text
