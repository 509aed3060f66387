"""The goodput ledger of a real run on two ranks: each injected delay has its kind, and the failure its cost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.core.events import read_events
from launcher.runs.ledger_reader import LedgerReader
from tests.support import slow_parts
from tests.support.processes import launcher, run_warm
from tests.support.runs import events_of, toy_env

pytestmark = pytest.mark.slow


def test_each_delay_has_its_kind_and_the_failure_its_cost(tmp_path: Path) -> None:
    arguments = ("--model", "tests.support.slow_parts.SlowParts", "--data", "tests.support.slow_parts.SlowData",
                 "--wandb.mode", "disabled", "--name", "it", "--devices", "2", "--max-restarts", "1",
                 "--trainer.max_epochs", "3", "--trainer.val_check_interval", "4",
                 "--trainer.num_sanity_val_steps", "0", "--trainer.log_every_n_steps", "3",
                 "--checkpoint.every_n_steps", "10")  # fmt: skip
    run_warm(launcher("fit", *arguments), tmp_path, env=toy_env(tmp_path / "trace"), timeout=150).check()
    run = tmp_path / "runs" / "it"
    events = list(read_events(run / "events.jsonl"))
    ledger = LedgerReader(events).ledger()
    assert ledger is not None

    # 24 steps, of which those after the last checkpoint are done again; the first step's batch is a part of `data`.
    started = [event["step"] for event in events_of(run, "training_started")]
    assert started[0] == 0
    (failed,) = events_of(run, "rank_failed")
    again = failed["step"] - started[1]
    batches = 24 + again
    # Less than what was injected would be a delay of another kind; more is the machine's.
    assert ledger.seconds("data") + ledger.seconds("redone") >= slow_parts.BATCH * (batches - 2)
    assert ledger.seconds("validation") >= slow_parts.VALIDATION * len(events_of(run, "validation"))
    assert ledger.seconds("checkpoint") >= slow_parts.SAVE * len(events_of(run, "checkpoint")) * 0.8
    assert ledger.seconds("start") >= slow_parts.START
    assert ledger.seconds("restart") >= slow_parts.START
    assert ledger.seconds("productive") > 0
    assert ledger.seconds("queue") == ledger.seconds("stopped") == 0

    (failure,) = ledger.failures
    assert (failure.rank, failure.reason, failure.redone_steps) == (1, "killed", again)
    assert failure.seconds == pytest.approx(sum(map(ledger.seconds, ("detection", "restart", "redone"))))
    # From the launch, before the first event, to the last event.
    assert ledger.total >= events[-1]["time"] - events[0]["time"]

    shown = json.loads(run_warm(launcher("status", "it", "--json"), tmp_path).check().output.splitlines()[-1])
    assert shown["goodput"] == ledger.to_dict()
    text = run_warm(launcher("status", "it"), tmp_path).check().output
    assert f"effective training: {ledger.ratio:.1%}" in text
    assert "1 failure cost" in text
    report = json.loads(run_warm(launcher("report", "it", "--json"), tmp_path).check().output.splitlines()[-1])
    assert report["goodput"] == ledger.to_dict()
