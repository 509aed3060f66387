"""W&B data of real runs: the same keys offline and online, and a directory that `wandb sync` accepts."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import run, run_warm
from tests.support.runs import events_of, toy_env
from tests.support.wandb_file import config_of, history_rows, records, summary_of
from tests.support.wandb_server import WandbServer, wandb_server

pytestmark = pytest.mark.slow

KEY = "0123456789abcdef0123456789abcdef01234567"
_SCRIPT = """
import json
from launcher import TrainingCoordinator
from launcher.config.schema import WandbOptions
from tests.support.toy import Toy, ToyData

for mode in ("offline", "online"):
    model = Toy()
    model.config = {"vocab_size": 9, "n_embd": 16}
    coordinator = TrainingCoordinator("runs", False, "16-mixed", wandb=WandbOptions(mode))
    end = coordinator.train(model, ToyData(), max_epochs=2, name=mode, log_every_n_steps=4,
                            enable_progress_bar=False, enable_model_summary=False)
    scaler = end["trainer"].precision_plugin.scaler
    print("FOUND", json.dumps([scaler.get_scale(), scaler.counts()["skipped_steps"]]), flush=True)
"""


@dataclass(frozen=True)
class WandbFile:
    """W&B's file of one run."""

    run_id: str
    config: dict[str, Any]
    summary: dict[str, Any]
    history: list[dict[str, Any]]
    exit_code: int


def read_wandb_file(file: Path) -> WandbFile:
    folder, whole = file.parent, list(records(file))
    (run_id,) = {record.run.run_id for record in whole if record.HasField("run")}
    (exit_code,) = (record.exit.exit_code for record in whole if record.HasField("exit"))
    return WandbFile(run_id, config_of(folder), summary_of(folder), history_rows(folder), exit_code)


@dataclass(frozen=True)
class Trained:
    """One run offline and one online, of the same training."""

    folder: Path
    server: WandbServer
    offline: WandbFile
    scales: list[Any]

    @property
    def directory(self) -> Path:
        (found,) = (self.folder / "runs" / "offline" / "wandb").glob("offline-run-*")
        return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("wandb")
    with wandb_server() as server:
        env = {**toy_env(folder / "trace"), "WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY, "HOME": str(folder),
               "OMP_NUM_THREADS": "1"}  # fmt: skip
        output = run_warm([sys.executable, "-c", _SCRIPT], folder, env=env, timeout=240).check().output
    (file,) = (folder / "runs" / "offline" / "wandb").glob("offline-run-*/run-*.wandb")
    scales = [json.loads(line.split(" ", 1)[1]) for line in output.splitlines() if line.startswith("FOUND")]
    return Trained(folder, server, read_wandb_file(file), scales)


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """The values without W&B's own keys."""
    return {key: value for key, value in values.items() if not key.startswith("_")}


@pytest.mark.case(27)
def test_a_runs_config_holds_precision_and_model(trained: Trained) -> None:
    config = plain(trained.offline.config)
    expected = {"mixed_precision": True, "precision": "16-mixed", "use_amp": True, "model_class": "Toy",
                "model_type": "custom", "total_parameters": 161, "vocab_size": 9, "hidden_size": 16,
                "num_layers": None, "strategy": "single_device", "world_size": 1, "global_batch_size": 4}  # fmt: skip
    assert {key: config[key] for key in expected} == expected
    assert config["plan"]["precision"] == "16-mixed"
    assert config["config"]["seed"] == 42


@pytest.mark.case(29)
def test_the_summary_of_a_run_holds_final_scale_skipped_steps_and_precision(trained: Trained) -> None:
    scale, skipped = trained.scales[0]
    summary = trained.offline.summary
    assert (summary["amp/loss_scale"], summary["amp/skipped_steps"]) == (scale, skipped)
    assert summary["amp/precision"] == "16-mixed"
    assert skipped > 0, "the scale of 65536 is too large for this net: there is something to count"
    assert scale == 65536 / 2**skipped
    assert trained.offline.exit_code == 0


@pytest.mark.case(29)
def test_every_row_has_its_step_and_is_logged_once(trained: Trained) -> None:
    rows = [row for row in trained.offline.history if "amp/loss_scale" in row]
    # Lightning's logger counts the same steps from 0, in separate rows.
    assert [row["trainer/global_step"] for row in rows] == [*range(4, 33, 4)]
    assert not [row for row in rows if "loss" in row]
    assert {row["amp/precision"] for row in rows} == {"16-mixed"}


@pytest.mark.case(47)
def test_the_same_keys_are_logged_online(trained: Trained) -> None:
    server, offline = trained.server, trained.offline
    assert server.exit_code() == 0
    assert plain(server.config()).keys() == plain(offline.config).keys()
    assert plain(server.summary()).keys() == plain(offline.summary).keys()
    for rows in (server.rows("wandb-history.jsonl"), offline.history):
        logged = {key for row in rows for key in plain(row)}
        final = {key for key in plain(offline.summary) if key.startswith(("final/", "goodput/"))}
        assert final >= {"final/loss", "final/steps", "final/best_checkpoint", "goodput/ettr"}
        assert logged | final == plain(offline.summary).keys()
        assert [row["trainer/global_step"] for row in rows if "amp/loss_scale" in row] == [*range(4, 33, 4)]
    assert server.summary()["amp/skipped_steps"] == trained.scales[1][1]


@pytest.mark.case(47)
def test_wandb_sync_accepts_the_complete_offline_directory(trained: Trained, tmp_path: Path) -> None:
    with wandb_server() as server:
        env = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY, "HOME": str(tmp_path)}
        command = [sys.executable, "-m", "wandb", "sync", str(trained.directory)]
        output = run(command, tmp_path, env=env).check().output
    assert "Finished syncing" in output
    offline = trained.offline
    assert {each["name"] for each in server.runs} == {offline.run_id}
    assert (trained.directory.parent / "run_id").read_text().strip() == offline.run_id
    assert server.exit_code() == 0
    assert plain(server.config()) == plain(offline.config)
    assert plain(server.summary()) == plain(offline.summary)
    assert [plain(row) for row in server.rows("wandb-history.jsonl")] == [plain(row) for row in offline.history]


def test_the_key_is_in_no_file_and_wandb_prints_nothing(trained: Trained) -> None:
    files = [file for file in trained.folder.rglob("*") if file.is_file()]
    assert files
    assert not [file for file in files if KEY.encode() in file.read_bytes()]
    for name in ("offline", "online"):
        notices = [event["message"] for event in events_of(trained.folder / "runs" / name, "notice")]
        assert not [text for text in notices if "W&B" in text]
