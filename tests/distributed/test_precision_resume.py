"""Real runs that resume in the checkpoint's precision or in another one: notices and loss scale."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import launcher, run_warm
from tests.support.runs import TOY, toy_env

pytestmark = pytest.mark.slow

# All runs in one process, because imports take seconds in each.
_SCRIPT = """
import json, sys
from pathlib import Path
import lightning.pytorch as pl
import torch
from launcher import TrainingCoordinator
from launcher.config.schema import WandbOptions
from launcher.core.errors import UsageError
from launcher.core.events import read_events
from tests.support.toy import Toy, ToyData

class State(pl.Callback):
    def on_train_start(self, trainer, pl_module):
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.state = None if scaler is None else scaler.state_dict()

def train(name, precision, checkpoint=None, steps=8, on_change="notice", use_amp=None):
    state = State()
    coordinator = TrainingCoordinator("runs", False, precision, callbacks=[state], wandb=WandbOptions("disabled"),
                                      on_precision_change=on_change)
    found = {"name": name, "error": None}
    try:
        end = coordinator.train(Toy(), ToyData(), max_steps=steps, max_epochs=-1, name=name, use_amp=use_amp,
                                resume_from_checkpoint=checkpoint, enable_progress_bar=False,
                                enable_model_summary=False)
        found |= {"precision": end["trainer"].precision, "plan": end["plan"].precision, "state": state.state,
                  "steps": end["trainer"].global_step, "reason": end["plan"].precision_reasons[0]}
    except UsageError as error:
        found["error"] = str(error)
    events = list(read_events(Path("runs") / name / "events.jsonl")) if Path("runs", name).exists() else []
    found["notices"] = [e["message"] for e in events if e["kind"] == "notice"]
    found["changed"] = [[e["checkpoint"], e["run"]] for e in events if e["kind"] == "precision_changed"]
    found["made"] = Path("runs", name).exists()
    print("FOUND", json.dumps(found), flush=True)
    return f"runs/{name}/checkpoints/last.ckpt"

def changed(checkpoint, name, **values):
    content = torch.load(checkpoint, weights_only=True)
    for key, value in values.items():
        content.pop(key) if value is None else content.update({key: value})
    torch.save(content, name)
    return name

fp16 = train("fp16", "16-mixed", steps=4)
bf16 = train("bf16", "bf16-mixed", steps=4)
saved = torch.load(fp16, weights_only=True)
scale = {**saved["MixedPrecision"], "scale": 2048.0, "_growth_tracker": 5, "growth_interval": 77,
         "counts": {"skipped_steps": 3, "overflows": 4, "floor_steps": 0}}
print("SAVED", json.dumps([saved["MixedPrecision"], scale, saved["launcher"]]), flush=True)
moved = changed(fp16, "moved.ckpt", MixedPrecision=scale)
train("same", "16-mixed", fp16)
train("same-moved", "16-mixed", moved)
train("to-bf16", "bf16-mixed", fp16)
train("to-fp16", "16-mixed", bf16)
train("to-32", "auto", fp16, use_amp=False)
train("auto-fp16", "auto", moved)
train("auto-bf16", "auto", bf16)
train("refused", "bf16-mixed", fp16, on_change="error")
train("not-refused", "16-mixed", fp16, on_change="error")
for name, state in json.loads(sys.argv[1]).items():
    broken = {**scale, **state} if isinstance(state, dict) else state
    train(name, "16-mixed", changed(fp16, "broken.ckpt", MixedPrecision={} if state == {} else broken))
train("scale-missing", "16-mixed", changed(fp16, "missing.ckpt", MixedPrecision=None))
for name, record in json.loads(sys.argv[2]).items():
    train(name, "auto", changed(moved, "odd.ckpt", launcher=record))
train("no-record", "auto", changed(moved, "none.ckpt", launcher=None))
train("nothing-known", "auto", changed(moved, "less.ckpt", launcher=None, MixedPrecision=None))
"""
DAMAGED = {
    "scale-list": [1, 2],
    "scale-text": {"scale": "65536"},
    "scale-nan": {"scale": float("nan")},
    "scale-negative": {"scale": -2.0},
    "scale-huge": {"scale": 1e300},
    "scale-empty": {},
    "interval-fraction": {"growth_interval": 2000.0},
}
RECORDS = {"record-number": 3, "record-list": ["16-mixed"], "record-nonsense": {"precision": "nonsense"}}
FRESH = 65536.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resumes")


@pytest.fixture(scope="module")
def output(folder: Path) -> str:
    command = [sys.executable, "-c", _SCRIPT, json.dumps(DAMAGED), json.dumps(RECORDS)]
    env = {**toy_env(folder / "trace"), "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    return run_warm(command, folder, env=env, timeout=280).check().output


@pytest.fixture(scope="module")
def runs(output: str) -> Mapping[str, dict[str, Any]]:
    found = [json.loads(line.split(" ", 1)[1]) for line in output.splitlines() if line.startswith("FOUND")]
    return {each["name"]: each for each in found}


@pytest.fixture(scope="module")
def saved(output: str) -> list[Any]:
    """The loss scale of the first run's checkpoint, a changed copy, and the checkpoint's precision record."""
    (line,) = (line for line in output.splitlines() if line.startswith("SAVED"))
    return json.loads(line.split(" ", 1)[1])


@pytest.mark.case(21)
def test_a_checkpoint_records_its_precision(saved: list[Any]) -> None:
    assert saved[2] == {"precision": "16-mixed", "strategy": "single_device", "world_size": 1}


@pytest.mark.case(21)
@pytest.mark.parametrize(("name", "which"), [("same", 0), ("same-moved", 1), ("not-refused", 0)])
def test_the_loss_scale_is_restored_exactly(runs: Mapping[str, Any], saved: list[Any], name: str, which: int) -> None:
    found = runs[name]
    assert (found["precision"], found["steps"], found["error"]) == ("16-mixed", 8, None)
    assert found["state"] == saved[which]
    assert (found["notices"], found["changed"]) == ([], [])


@pytest.mark.case(21)
@pytest.mark.parametrize(
    ("name", "before", "now", "scale"),
    [
        ("to-bf16", "16-mixed", "bf16-mixed", "; its loss scale is no longer needed"),
        ("to-fp16", "bf16-mixed", "16-mixed", "; the loss scale starts at its initial value"),
        ("to-32", "16-mixed", "32-true", "; its loss scale is no longer needed"),
    ],
)
def test_another_precision_is_one_notice_and_one_event_with_both(
    runs: Mapping[str, Any], output: str, name: str, before: str, now: str, scale: str
) -> None:
    found = runs[name]
    assert (found["precision"], found["plan"], found["steps"]) == (now, now, 8)
    assert found["changed"] == [[before, now]]
    text = f"the checkpoint was trained in {before}, this run trains in {now}{scale}"
    assert found["notices"] == [text]
    assert text in " ".join(output.split())
    assert found["state"] is None if now != "16-mixed" else found["state"]["scale"] == FRESH


@pytest.mark.case(21)
def test_an_invalid_change_stops_before_files_are_written(runs: Mapping[str, Any]) -> None:
    found = runs["refused"]
    assert "the checkpoint was trained in 16-mixed, this run trains in bf16-mixed" in found["error"]
    assert found["made"] is False


def contents(folder: Path) -> dict[str, tuple[int, str]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


@pytest.mark.case(21)
@pytest.mark.usefixtures("output")
def test_an_invalid_change_on_the_command_line_is_exit_code_2_and_the_run_is_unchanged(folder: Path) -> None:
    before = contents(folder / "runs")
    arguments = (
        *TOY,
        "--name",
        "fp16",
        "--resume",
        "auto",
        "--precision",
        "bf16-mixed",
        "--on_precision_change",
        "error",
    )
    text = run_warm(launcher(*arguments), folder, env=toy_env(folder / "trace-of-none")).check(2).output
    assert "the checkpoint was trained in 16-mixed, this run trains in bf16-mixed" in text
    assert "Traceback" not in text
    assert contents(folder / "runs") == before


@pytest.mark.case(22)
@pytest.mark.parametrize(("name", "before"), [("auto-fp16", "16-mixed"), ("auto-bf16", "bf16-mixed")])
def test_auto_resumes_in_the_checkpoints_precision(
    runs: Mapping[str, Any], saved: list[Any], name: str, before: str
) -> None:
    found = runs[name]
    assert (found["precision"], found["plan"], found["changed"], found["notices"]) == (before, before, [], [])
    assert found["reason"] == f"precision auto: the checkpoint was trained in {before}, and every rank can"
    assert found["state"] == (saved[1] if before == "16-mixed" else None)


@pytest.mark.case(21)
@pytest.mark.parametrize("name", [*DAMAGED, "scale-missing"])
def test_a_damaged_or_missing_loss_scale_is_one_notice_and_starts_at_the_initial_one(
    runs: Mapping[str, Any], name: str
) -> None:
    found = runs[name]
    assert (found["error"], found["precision"], found["steps"]) == (None, "16-mixed", 8)
    assert found["state"]["scale"] == FRESH
    assert found["state"]["_growth_tracker"] == 0
    (notice,) = found["notices"]
    assert notice.startswith("cannot restore the checkpoint's loss scale (")
    assert notice.endswith("); it starts at its initial value")


@pytest.mark.parametrize("name", RECORDS)
def test_a_damaged_precision_record_is_one_notice_and_the_contents_decide(
    runs: Mapping[str, Any], saved: list[Any], name: str
) -> None:
    found = runs[name]
    assert (found["error"], found["precision"], found["steps"]) == (None, "16-mixed", 8)
    assert found["state"] == saved[1]
    (notice,) = found["notices"]
    assert notice.startswith("the checkpoint's record of its precision is damaged (")
    assert notice.endswith("; its content shows 16-mixed")


def test_the_precision_of_a_checkpoint_without_a_record_comes_from_its_loss_scale(
    runs: Mapping[str, Any], saved: list[Any]
) -> None:
    found = runs["no-record"]
    assert (found["precision"], found["state"], found["notices"]) == ("16-mixed", saved[1], [])


def test_a_checkpoint_without_a_known_precision_resumes_in_autos_precision(runs: Mapping[str, Any]) -> None:
    found = runs["nothing-known"]
    assert (found["precision"], found["steps"], found["notices"], found["changed"]) == ("32-true", 8, [], [])
