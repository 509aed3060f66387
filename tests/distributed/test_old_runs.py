"""Run directories that version 0.1.0 wrote before its modules were packages: they resume and report as before.

`expected.json` holds what that version itself made of them: figures of `report` and `status`, and the metrics and
weights after six more steps.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.checkpoint.deepspeed import read_consolidated
from launcher.core.events import read_events
from tests.support.processes import launcher, run_warm
from tests.support.runs import train_on

OLD = Path(__file__).resolve().parents[1] / "fixtures" / "runs_of_0_1"
EXPECTED = json.loads((OLD / "expected.json").read_text())
# Folder in which they were trained.
HOME = "/home/anna/project"
# Texts may change, numbers may not.
TEXTS = ("path", "detail")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the old project's folder."""
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "runs", *(tmp_path / "runs").rglob("*")):
        path.chmod(0o700 if path.is_dir() else 0o600)
        if path.is_file() and path.suffix in (".yaml", ".json", ".jsonl", ".log"):
            path.write_text(path.read_text().replace(HOME, str(tmp_path)))
    return tmp_path


def _read_json(project: Path, *arguments: str) -> Any:
    return json.loads(run_warm(launcher(*arguments), project).check().output)


def _figures(value: Any, expected: Any) -> Any:
    """The values without texts, and without fields that later versions have added to the expected ones."""
    if isinstance(expected, dict) and isinstance(value, dict):
        return {key: _figures(value.get(key), each) for key, each in expected.items() if key not in TEXTS}
    if isinstance(expected, list) and isinstance(value, list) and len(value) == len(expected):
        return [_figures(*pair) for pair in zip(value, expected, strict=True)]
    return value


@pytest.mark.parametrize("name", ["ddp-fp16", "zero-bf16"])
def test_an_old_run_is_reported_with_the_same_figures(name: str, project: Path) -> None:
    for command in ("report", "status"):
        expected = EXPECTED[name][command]
        assert _figures(_read_json(project, command, name, "--json"), expected) == _figures(expected, expected)
    page = run_warm(launcher("report", name), project).check()
    assert (project / "runs" / name / "report.html").stat().st_size > 10_000, page.output


@pytest.mark.parametrize("name", ["ddp-fp16", "zero-bf16"])
def test_an_old_run_resumes_as_before(name: str, project: Path) -> None:
    length = ("--trainer.max_epochs", "3", "--trainer.max_steps", "14")
    arguments = ("fit", "--config", f"runs/{name}/config.yaml", "--resume", "auto", *length)
    output = train_on(2, arguments, project, {"OMP_NUM_THREADS": "1"}).check().output
    last = project / "runs" / name / "checkpoints" / "last.ckpt"
    assert f"resuming from {last}" in output
    [*_, finished] = [e for e in read_events(project / "runs" / name / "events.jsonl") if e["kind"] == "finished"]
    assert finished["step"] == 14
    # The last digits depend on the CPU.
    assert finished["metrics"] == pytest.approx(EXPECTED[name]["metrics"], rel=2e-2)
    content = read_consolidated(last) if last.is_dir() else torch.load(last, weights_only=False)
    sums = {key: float(value.detach().float().abs().sum()) for key, value in content["state_dict"].items()}
    assert sums == pytest.approx(EXPECTED[name]["weights"], rel=1e-2)
    plan = json.loads((project / "runs" / name / "plan.json").read_text())
    assert plan["precision"] == EXPECTED[name]["report"]["figures"]["precision"]
    # The W&B run is the same.
    assert (project / "runs" / name / "wandb" / "run_id").read_text() == (
        OLD / "runs" / name / "wandb" / "run_id"
    ).read_text()


def test_old_submissions_and_sweeps_are_found(project: Path) -> None:
    status = _read_json(project, "status", "submitted", "--json")
    assert (status["state"], status["step"], status["job"]) == ("done", 8, "local 5047")
    members = _read_json(project, "status", "sw", "--json")
    assert [member["run"]["name"] for member in members] == ["sw-0", "sw-1"]
    assert [member["settings"] for member in members] == [{"model.init_args.lr": 0.01}, {"model.init_args.lr": 0.1}]
    assert "step 8/8" in run_warm(launcher("logs", "submitted"), project).check().output
