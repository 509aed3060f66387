"""`launcher submit --sweep`; SLURM's commands are scripts on PATH."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from tests.support.processes import Finished, launcher, run_here
from tests.support.stand_ins import TAKEN, StandIns

# Processes start.
pytestmark = pytest.mark.slow

SWEEP = ("--model", "my_pkg.Model", "--name", "grid", "--time", "60", "--sweep", "model.init_args.lr=1e-3,3e-4",
         "--sweep", "model.init_args.width=64,128")  # fmt: skip


@pytest.fixture
def slurm(tmp_path: Path) -> StandIns:
    answers = {"sbatch": TAKEN, "squeue": (0, "", ""), "sacct": (0, "", ""), "scancel": (0, "", ""),
               "scontrol": (0, "MaxArraySize            = 1001\n", "")}  # fmt: skip
    return StandIns(tmp_path / "bin", answers)


@pytest.fixture
def cwd(tmp_path: Path) -> Path:
    (tmp_path / "cwd").mkdir()
    return tmp_path / "cwd"


def launch(command: str, cwd: Path, slurm: StandIns, *given: str) -> Finished:
    return run_here(launcher(command, *given), cwd, env=slurm.env, timeout=60)


def test_a_sweep_is_one_array_with_a_run_for_each_member(cwd: Path, slurm: StandIns) -> None:
    dry = launch("submit", cwd, slurm, *SWEEP, "--array", "%2", "--dry-run").check()
    assert "grid-3: lr=0.0003, width=128" in dry.output
    assert list(cwd.iterdir()) == []
    assert slurm.calls("sbatch") == []

    output = launch("submit", cwd, slurm, *SWEEP, "--array", "%2", "--no-snapshot").check().output
    assert "array 42 of 4 jobs is queued\nsweep grid: launcher status grid, cancel\n" in output
    script = (slurm.folder / "script").read_text()
    assert script in dry.output
    assert "#SBATCH --array=0-3%2\n" in script
    assert "#SBATCH --job-name=grid\n" in script
    array = cwd / "runs/grid/arrays/1"
    for index in range(4):
        assert (array / f"42_{index}_submitted.pkl").exists()
        folder = cwd / f"runs/grid-{index}/submissions/1"
        record = json.loads((folder / "submission.json").read_text())
        assert (record["job_id"], record["sweep"]) == (f"42_{index}", "grid")
        assert f"name: grid-{index}\n" in (folder / "config.yaml").read_text()
    task = pickle.loads((array / "42_2_submitted.pkl").read_bytes())  # noqa: S301 -- written above
    assert task.function.__getstate__().run == str(cwd / "runs/grid-2")
    for path in (cwd / "runs/grid", *(cwd / "runs/grid").rglob("*")):
        assert path.stat().st_mode & 0o077 == 0, path


def test_status_and_cancel_accept_the_sweep_and_each_member(cwd: Path, slurm: StandIns) -> None:
    launch("submit", cwd, slurm, *SWEEP, "--array", "0-2", "--no-snapshot").check()
    slurm.answer(squeue=(0, "42_0|RUNNING|n1\n42_[1-2%1]|PENDING|(JobArrayTaskLimit)\n", ""))
    events = [{"kind": "validation", "time": 1.0, "step": n, "rank": 0, "metrics": {"val_loss": loss}}
              for n, loss in ((5, 2.0), (10, 1.5), (15, 1.75))]  # fmt: skip
    (cwd / "runs/grid-0/events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    members = json.loads(launch("status", cwd, slurm, "grid", "--json").check().output)
    assert [member["run"] and member["run"]["state"] for member in members] == ["running", "queued", "queued", None]
    assert (members[0]["last"], members[0]["best"], members[0]["run"]["step"]) == (1.75, 1.5, 15)
    assert members[3]["settings"] == {"model.init_args.lr": 3e-4, "model.init_args.width": 128}
    assert len(slurm.calls("squeue")) == 1, "one query for all members"
    table = launch("status", cwd, slurm, "grid").check().output
    assert "lr=0.001, width=64" in table
    assert "not queued" in table
    assert "is a sweep" in launch("logs", cwd, slurm, "grid").check(2).output

    assert "array 42 is cancelled" in launch("cancel", cwd, slurm, "grid").check().output
    assert slurm.calls("scancel")[-1][-1] == "42"
    slurm.answer(squeue=(0, "RUNNING|n1\n", ""))
    launch("cancel", cwd, slurm, "grid-1").check()
    assert slurm.calls("scancel")[-1][-1] == "42_1"


def test_problems_are_reported_before_anything_is_created(cwd: Path, slurm: StandIns) -> None:
    def error(*arguments: str) -> str:
        output = launch("submit", cwd, slurm, *arguments).check(2).output
        assert list(cwd.iterdir()) == []
        return output

    assert "given '0-1' without --sweep" in error("--model", "my_pkg.Model", "--array", "0-1")
    assert "the sweep's members are 0 to 3" in error(*SWEEP, "--array", "4")
    assert "did you mean trainer.max_epochs" in error(*SWEEP, "--sweep", "trainer.max_epoch=1,2")
    assert "--model.init_args.lr is given for all members too" in error(*SWEEP, "--model.init_args.lr", "1")
    slurm.answer(scontrol=(0, "MaxArraySize = 3\n", ""))
    assert "this cluster's arrays end at 2" in error(*SWEEP)
    assert slurm.calls("sbatch") == []


def test_no_file_stays_if_sbatch_refuses(cwd: Path, slurm: StandIns) -> None:
    slurm.answer(sbatch=(1, "", "sbatch: error: Invalid job array specification\n"))
    ended = launch("submit", cwd, slurm, *SWEEP, "--no-snapshot").check(1)
    assert "sbatch refused the array: sbatch: error: Invalid job array specification" in ended.output
    assert list(cwd.iterdir()) == []


def test_a_sweep_changes_no_existing_files_of_its_name(cwd: Path, slurm: StandIns) -> None:
    slurm.answer(sbatch=(1, "", "sbatch: error: no\n"))
    (cwd / "runs" / "grid").mkdir(parents=True)
    (cwd / "runs" / "grid" / "notes.txt").write_text("mine")
    launch("submit", cwd, slurm, *SWEEP, "--no-snapshot").check(1)
    assert [path.name for path in (cwd / "runs").rglob("*")] == ["grid", "notes.txt"]

    slurm.answer(sbatch=TAKEN)
    launch("submit", cwd, slurm, "--model", "my_pkg.Model", "--name", "queued", "--no-snapshot").check()
    model = ("--model", "my_pkg.Model", "--no-snapshot")
    ended = launch("submit", cwd, slurm, *model, "--name", "queued", "--sweep", "seed=1").check(2)
    assert "is already a run" in ended.output

    launch("submit", cwd, slurm, *model, "--name", "s", "--sweep", "seed=1,2").check()
    slurm.answer(squeue=(0, "", ""), sacct=(0, "CANCELLED|0:15|n1|42_1\n", ""))
    for other in ("seed=1,3", "seed=1", "seed=2,1"):
        output = launch("submit", cwd, slurm, *model, "--name", "s", "--sweep", other, "--array", "0").check(2).output
        assert "sweep 's' exists already" in output
        assert "choose another --name, or give its values in the same order, new ones last" in output
    assert "is a sweep at" in launch("submit", cwd, slurm, *model, "--name", "s").check(2).output
    before = (cwd / "runs/s/sweep.json").read_text()
    launch("submit", cwd, slurm, *model, "--name", "s", "--sweep", "seed=1,2,3", "--array", "2").check()
    assert json.loads((cwd / "runs/s/sweep.json").read_text())[:2] == json.loads(before)


def test_members_can_be_submitted_again_only_after_they_have_ended(cwd: Path, slurm: StandIns) -> None:
    launch("submit", cwd, slurm, *SWEEP, "--no-snapshot").check()
    slurm.answer(squeue=(0, "RUNNING|n1\n", ""))
    assert "run 'grid-1' is running already" in launch("submit", cwd, slurm, *SWEEP, "--array", "1").check(2).output
    slurm.answer(squeue=(0, "", ""), sacct=(0, "FAILED|1:0|n1|42_1\n", ""))
    launch("submit", cwd, slurm, *SWEEP, "--array", "1", "--no-snapshot").check()
    assert (cwd / "runs/grid/arrays/2/42_1_submitted.pkl").exists()
    assert sorted(path.name for path in (cwd / "runs/grid-1/submissions").iterdir()) == ["1", "2"]
    assert sorted(path.name for path in (cwd / "runs/grid-0/submissions").iterdir()) == ["1"]
