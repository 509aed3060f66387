"""submitit alone requeues a job: Lightning, which would by itself where it sees SLURM's variables, sets no handler."""

from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import LightningModule
from rich.console import Console

from launcher.config.schema import RunConfig
from launcher.config.validation import parse_config
from launcher.core.events import EventLog
from launcher.core.output import RunOutput
from launcher.hardware.topology import Topology
from launcher.planning.plan import make_plan
from launcher.process.rank_status import RankStatusWriter
from launcher.training.context import RunContext
from launcher.training.trainer import build_trainer
from launcher.user_code.objects import UserObjects
from tests.support.rank_threads import CPU, ranks


@pytest.mark.parametrize("strategy", ["single_device", "ddp"])
def test_a_training_inside_a_job_is_not_requeued_by_lightning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    # As a script of a user's own has them.
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train"}.items():
        monkeypatch.setenv(name, value)
    assert SLURMEnvironment.detect(), "without the launcher Lightning would take itself for the owner"
    config: RunConfig = parse_config({"trainer": {"enable_checkpointing": False, "enable_progress_bar": False}})
    plan = make_plan(parse_config({"strategy": strategy, "precision": "32-true"}), ranks(CPU))
    run: Any = SimpleNamespace(path=tmp_path, checkpoints=tmp_path, resume_from=None)
    output = RunOutput(EventLog(tmp_path / "events.jsonl", 0), Console(), is_rank_zero=True)
    topology = Topology.from_env({}, "here")
    ctx = RunContext(config, topology, plan, run, None, "0", output, RankStatusWriter.from_env({}))
    trainer = build_trainer(ctx, UserObjects(LightningModule()), [], [])
    before = signal.getsignal(signal.SIGUSR1)
    connector = cast(Any, trainer)._signal_connector
    connector.register_signal_handlers()
    try:
        assert signal.getsignal(signal.SIGUSR1) is before
    finally:
        connector.teardown()
