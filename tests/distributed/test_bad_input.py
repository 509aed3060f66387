"""Every error in the input has a clear message, exit code 2 and no traceback, and changes no earlier run."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import Finished, launcher, run_warm
from tests.support.runs import REPOSITORY, TOY, toy_env

pytestmark = pytest.mark.slow
SETTINGS = (*TOY, "--global_batch_size", "8", "--trainer.max_epochs", "1")


def _refused(cwd: Path, *arguments: str, env: dict[str, str] | None = None) -> str:
    finished = run_warm(launcher(*arguments), cwd, env={**toy_env(cwd / "trace"), **(env or {})}).check(2)
    assert "Traceback" not in finished.output
    assert finished.output.startswith("error: ") or "\nerror: " in finished.output
    assert not list(cwd.glob("trace-*")), "nothing was trained"
    assert not list(cwd.glob("runs/.pending*")), "no log without a run remains"
    return finished.output


def _contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with one finished run, `earlier`, which must be unchanged at the end."""
    folder = tmp_path_factory.mktemp("earlier")
    run_warm(launcher(*SETTINGS, "--name", "earlier"), folder, env={"PYTHONPATH": str(REPOSITORY)}).check()
    before = _contents(folder)
    yield folder
    assert _contents(folder) == before


def test_a_missing_config_file(tmp_path: Path) -> None:
    assert "nowhere.yaml: no such file" in _refused(tmp_path, "--config", "nowhere.yaml")


def test_broken_yaml_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("seed: 1\nmodel: [\n")
    assert "run.yaml, line 3" in _refused(tmp_path, "--config", "run.yaml")


def test_unknown_keys_wrong_types_and_wrong_sizes_are_reported_together(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("sede: 1\nglobal_batch_size: 0\ntrainer:\n  max_epochs: -7\n  max_step: 3\n")
    output = _refused(tmp_path, "--config", "run.yaml", "--devices", "none")
    for message in ("sede: unknown key; did you mean seed?", "global_batch_size: given 0; expected at least 1",
                    "trainer.max_epochs: given -7", "did you mean trainer.max_steps?", "devices: given 'none'",
                    "5 problems"):  # fmt: skip
        assert message in output


def test_a_class_that_fails_to_import_is_reported_with_its_error(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import math\nraise RuntimeError('needs a licence')\n")
    output = _refused(tmp_path, "--model", "mine.Model")
    assert "model.class_path: mine.Model does not import: RuntimeError: needs a licence" in output
    assert "mine.py, line 2" in output


def test_a_class_that_is_not_a_lightning_module(tmp_path: Path) -> None:
    assert "tests.support.toy.NoModule is not a LightningModule" in _refused(
        tmp_path, "--model", "tests.support.toy.NoModule"
    )


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_a_missing_loader_is_reported_once_for_all_ranks(tmp_path: Path, ranks: str) -> None:
    output = _refused(tmp_path, "--model", "tests.support.toy.Toy", "--nproc-per-node", ranks)
    assert output.count("data: not given, and Toy has no train_dataloader; give --data my_pkg.MyData, or ") == 1


def test_a_misspelt_module_of_the_folder_is_suggested(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("")
    assert "No module named 'mnie'; did you mean mine?" in _refused(tmp_path, "--model", "mnie.Model")


def test_an_empty_dataset(tmp_path: Path) -> None:
    assert "the training data is empty" in _refused(tmp_path, *SETTINGS, "--data.size", "0")


def test_a_dataset_smaller_than_the_global_batch(tmp_path: Path) -> None:
    assert "7 samples, fewer than one global_batch_size 8" in _refused(tmp_path, *SETTINGS, "--data.size", "7")


def test_a_batch_that_the_ranks_cannot_share_lists_the_nearest(tmp_path: Path) -> None:
    output = _refused(tmp_path, *SETTINGS, "--trainer.accumulate_grad_batches", "3")
    assert "nearest: global_batch_size 6 or 9" in output


def test_incomplete_torchrun_variables_are_all_reported(tmp_path: Path) -> None:
    output = _refused(tmp_path, *SETTINGS, env={"RANK": "0", "LOCAL_RANK": "0"})
    assert "RANK=0, LOCAL_RANK=0 set, but WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT missing" in output


def test_several_tasks_of_srun_are_rejected(tmp_path: Path) -> None:
    slurm = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"}
    assert "srun started 4 tasks" in _refused(tmp_path, *SETTINGS, env=slurm)


def test_an_existing_run_name(earlier: Path) -> None:
    assert "run 'earlier' exists already" in _refused(earlier, *SETTINGS, "--name", "earlier")


def test_a_run_that_is_training_is_not_changed(tmp_path: Path) -> None:
    second: list[Finished] = []

    def start_second(line: str, first: int) -> None:
        if line.startswith("step 2/") and not second:
            second.append(run_warm(launcher(*SETTINGS, "--name", "busy", "--resume", "auto"), tmp_path, env=env))
            os.kill(first, signal.SIGINT)

    env = {"PYTHONPATH": str(REPOSITORY)}
    arguments = (*SETTINGS, "--name", "busy", "--trainer.log_every_n_steps", "1", "--trainer.max_epochs", "4000")
    run_warm(launcher(*arguments), tmp_path, env=env, on_line=start_second).check(130)
    assert second[0].check(2).output.count("run 'busy' is training now (process ") == 1


def test_resume_of_a_missing_file(earlier: Path) -> None:
    assert "nothing.ckpt does not exist" in _refused(earlier, *SETTINGS, "--resume", "nothing.ckpt")


def test_resume_of_a_foreign_file_creates_no_run(tmp_path: Path) -> None:
    (tmp_path / "foreign.ckpt").write_bytes(b"PK\x03\x04 not a checkpoint at all")
    assert "foreign.ckpt is not a checkpoint" in _refused(
        tmp_path, *SETTINGS, "--resume", "foreign.ckpt", "--name", "new"
    )
    assert not (tmp_path / "runs" / "new").exists()


def test_resume_of_another_models_checkpoint_lists_the_differences(earlier: Path, tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text(
        "import torch\nfrom tests.support.toy import Toy\n\n\nclass Other(Toy):\n"
        "    def __init__(self) -> None:\n        super().__init__()\n        self.more = torch.nn.Linear(2, 2)\n"
    )
    checkpoint = str(earlier / "runs" / "earlier" / "checkpoints" / "last.ckpt")
    arguments = (
        "--model",
        "other.Other",
        "--data",
        "tests.support.toy.ToyData",
        "--wandb.mode",
        "disabled",
        "--resume",
        checkpoint,
    )
    assert "is of another model than Other: more.weight is only in the model" in _refused(tmp_path, *arguments)


def test_a_read_only_runs_dir(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    for place in ("file/runs", "/proc/runs"):
        output = _refused(tmp_path, *SETTINGS, "--runs_dir", place)
        assert "cannot be created" in output
        assert "set runs_dir to a writable folder" in output


def test_a_runs_dir_on_a_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode and not os.environ.get("CI"):
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    mounted.check_returncode()
    try:
        with pytest.raises(OSError, match="No space left"):
            (disk / "filler").write_bytes(b"x" * 20_000)
        assert "No space left on device" in _refused(tmp_path, *SETTINGS, "--runs_dir", "disk/runs")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    output = run_warm(launcher("--config", "nowhere.yaml", "--debug"), tmp_path).check(2).output
    assert "Traceback" in output
    assert "error: the config has 1 problem" in output


def test_an_exception_in_user_code_is_a_training_failure_with_rank_and_traceback(tmp_path: Path) -> None:
    finished = run_warm(
        launcher(*SETTINGS, "--model.raise_at", "3", "--name", "r"), tmp_path, env=toy_env(tmp_path / "t")
    )
    finished.check(1)
    assert "tests/support/toy.py" in finished.output
    assert "error: rank 0 (" in finished.output
    assert "ValueError: the user's own mistake" in (tmp_path / "runs" / "r" / "logs" / "rank-0.log").read_text()
