"""`launcher submit` in real processes; SLURM's commands are scripts on PATH."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.cli import main as cli
from launcher.config.schema import SlurmOptions
from launcher.jobs.backends.slurm import describe_refusal
from slurm.job import list_job_options
from tests.support.processes import Finished, launcher, run, run_here
from tests.support.run_directories import fill, small_disk
from tests.support.stand_ins import TAKEN, StandIns

# Processes start.
pytestmark = pytest.mark.slow

MODEL = ("--model", "my_pkg.Model", "--name", "it")
JOB = ("--nodes", "2", "--gpus-per-node", "8", "--time", "1:00:00", "--partition", "gpu")
_HEAVY = re.compile(r"^import time:.*\|\s+(torch|lightning|deepspeed|wandb|pytorch_lightning)$", re.MULTILINE)


@pytest.fixture
def slurm(tmp_path: Path) -> StandIns:
    return StandIns(tmp_path / "bin", {"sbatch": TAKEN, "squeue": (0, "RUNNING|n[1-2]\n", ""), "sacct": (0, "", ""),
                                       "scancel": (0, "", "")})  # fmt: skip


@pytest.fixture
def cwd(tmp_path: Path) -> Path:
    (tmp_path / "cwd").mkdir()
    return tmp_path / "cwd"


def submit(
    cwd: Path, slurm: StandIns | None, *given: str, start: Callable[..., Finished] = run_here, **env: str
) -> Finished:
    path = {"PATH": "/nowhere"} if slurm is None else slurm.env
    return start(launcher("submit", *MODEL, *given), cwd, env={**path, **env}, timeout=60)


def test_a_dry_run_prints_the_submitted_script_and_creates_nothing(cwd: Path, slurm: StandIns) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "launcher", "submit", *MODEL, *JOB, "--dry-run"]
    dry = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **slurm.env},
        capture_output=True,
        check=True,
        timeout=60,
    )
    assert list(cwd.iterdir()) == []
    assert slurm.calls("sbatch") == []
    printed = dry.stderr.decode()
    assert "launcher.cli.main" in printed, "the import times are there"
    assert _HEAVY.findall(printed) == []
    assert re.search(r"ranks +16 x GPU of the nodes on 2 nodes", printed)
    assert re.search(r"strategy +ddp ", printed)

    submit(cwd, slurm, *JOB, "--no-snapshot", start=run).check()
    assert (slurm.folder / "script").read_bytes() == dry.stdout
    assert (cwd / "runs/it/submissions/1/42_submission.sh").read_bytes() == dry.stdout


def test_the_submission_is_private_and_prints_the_next_commands(cwd: Path, slurm: StandIns) -> None:
    before = os.umask(0o027)
    try:
        output = submit(cwd, slurm, *JOB, start=run).check().output
    finally:
        os.umask(before)
    # The job inherits the user's umask.
    assert (slurm.folder / "umask").read_text() == oct(0o027)
    assert "job 42 is queued\nrun it: launcher status it, logs, cancel\n" in output
    assert "this is not a git repository, so the code is not copied" in output
    for path in (cwd / "runs/it", *(cwd / "runs/it").rglob("*")):
        assert path.is_symlink() or path.stat().st_mode & 0o077 == 0, path
    config = (cwd / "runs/it/submissions/1/config.yaml").read_text()
    for line in ("name: it", f"runs_dir: {cwd}/runs", "devices: 8", "num_nodes: 2", "accelerator: gpu", "resume: none"):
        assert line in config.splitlines()


def test_no_secret_is_in_a_file_or_an_argument(cwd: Path, slurm: StandIns) -> None:
    ended = submit(cwd, slurm, *JOB, "--export-env", "MY_SECRET", "--model.hf_token", "planted-three",
                  WANDB_API_KEY="planted-key", MY_SECRET="planted-too")  # fmt: skip
    assert "planted" not in ended.check().output
    files = [path for path in [*cwd.rglob("*"), *slurm.folder.rglob("*")] if path.is_file()]
    assert any(path.suffix == ".pkl" for path in files)
    assert [path for path in files if b"planted" in path.read_bytes()] == []
    (names,) = re.findall(r"#SBATCH --export=(\S+)", (slurm.folder / "script").read_text())
    assert {"MY_SECRET", "PATH", "WANDB_API_KEY", "LAUNCHER_SECRET_MODEL_INIT_ARGS_HF_TOKEN"} <= set(names.split(","))


def test_all_problems_are_reported_at_once_and_nothing_is_created(cwd: Path, slurm: StandIns) -> None:
    ended = submit(cwd, slurm, "--nodes", "3", "--gpus-per-node", "8", "--devices", "4", "--num_nodes", "2",
                   "--global_batch_size", "32", "--time", "1", "--export-env", "NOT_SET").check(2)  # fmt: skip
    options = re.findall(r"^  --([\w-]+): ", ended.output, re.MULTILINE)
    assert options == ["export-env", "gpus-per-node", "nodes", "nodes", "time"]
    assert list(cwd.iterdir()) == []
    assert slurm.calls("sbatch") == []


def test_slurm_options_of_the_config_are_used_unless_a_flag_overrides_them(cwd: Path, slurm: StandIns) -> None:
    (cwd / "run.yaml").write_text(
        "slurm: {partition: slow, account: us, time: 12:00:00, mem: 64G, nodes: 2, gpus_per_node: 8, mail_type: END}\n"
    )
    done = submit(cwd, slurm, "--config", "run.yaml", "--partition", "gpu", "--slurm.qos", "high", "--dry-run").check()
    requested = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", done.output, re.MULTILINE))
    expected = {"partition": "gpu", "account": "us", "time": "720", "mem": "64G", "nodes": "2", "gpus-per-node": "8",
              "mail-type": "END", "qos": "high"}  # fmt: skip
    assert {name: requested.get(name) for name in expected} == expected

    (cwd / "run.yaml").write_text("slurm: {partition: a b, time: soon, signal_delay: 60}\n")
    ended = submit(cwd, slurm, "--config", "run.yaml", "--time", "1").check(2)
    assert re.findall(r"^  (\S+): ", ended.output, re.MULTILINE) == ["slurm.partition"]
    ended = submit(cwd, slurm, "--config", "run.yaml", "--partition", "gpu", "--time", "1").check(2)
    assert re.findall(r"^  (\S+): ", ended.output, re.MULTILINE) == ["--time"]
    (cwd / "run.yaml").write_text("slurm: {partitions: a, signal: TERM}\n")
    ended = submit(cwd, slurm, "--config", "run.yaml").check(2)
    assert "slurm.partitions: unknown key; did you mean slurm.partition?" in ended.output
    assert "slurm.signal: given 'TERM'; expected one of USR1, USR2" in ended.output


def test_the_config_has_every_option_of_a_job() -> None:
    known = {field.name.replace("_", "-") for field in dataclasses.fields(SlurmOptions)}
    assert known == set(list_job_options())


def test_shell_syntax_in_a_value_is_rejected(
    cwd: Path, slurm: StandIns, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # In this process, since rejected commands start nothing.
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name, value in slurm.env.items():
        monkeypatch.setenv(name, value)
    for option in (("--partition", "a; touch x"), ("--mail-user", "$(touch x)"), ("--name", "a b"), ("--name", "a\nb"),
                  ("--name", "a;touch x"), ("--name", "$(touch x)"), ("--name", "a'b"),
                  ("--name", 'a"b'), ("--name", "né"),
                  ("--runs_dir", "a%jb"), ("--account", "é")):  # fmt: skip
        assert cli.run(["submit", *MODEL, *option]) == 2
        assert f"{option[1]!r}" in capsys.readouterr().err
    assert list(cwd.iterdir()) == []


def test_the_error_has_the_message_of_sbatch_and_no_file_stays(cwd: Path, slurm: StandIns) -> None:
    slurm.answer(sbatch=(1, "", "sbatch: error: invalid partition specified: gpu\n"))
    ended = submit(cwd, slurm, *JOB, "--no-snapshot").check(1)
    assert ended.output == (
        "error: sbatch refused the job: sbatch: error: invalid partition specified: gpu; change the options and submit "
        "again\n"
    )
    assert list(cwd.iterdir()) == []


def test_a_silent_cluster_is_reported_in_one_line_with_the_local_back_end() -> None:
    begin = "sbatch: error: resolve_ctls_from_dns_srv: res_nsearch error: Unknown host\n"
    for line in (
        "sbatch: fatal: Could not establish a configuration source",
        "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)",
    ):
        assert describe_refusal("job", f"{begin}{line}\nsbatch: more\n") == (
            f"no SLURM cluster answered: {line}; check it with `sinfo`, or submit to this machine with --cluster local"
        )
    both = "sbatch: error: invalid account\nsbatch: error: failed"
    assert describe_refusal("array", both) == f"sbatch refused the array: {both}; change the options and submit again"


@pytest.mark.parametrize("place", ["file/runs", "/proc/runs"])
@pytest.mark.parametrize("sweep", [(), ("--sweep", "seed=1,2")])
def test_nothing_is_queued_if_the_run_directory_cannot_be_created(
    cwd: Path, slurm: StandIns, place: str, sweep: tuple[str, ...]
) -> None:
    (cwd / "file").write_text("not a folder")
    ended = submit(cwd, slurm, *JOB, *sweep, "--runs_dir", place, "--no-snapshot").check(2)
    assert "cannot be written" in ended.output
    assert "where you may write" in ended.output
    assert "Traceback" not in ended.output
    assert slurm.calls("sbatch") == []
    assert [path.name for path in cwd.iterdir()] == ["file"]


@pytest.mark.parametrize("more", [(), ("--sweep", "seed=1,2")], ids=["job", "array"])
def test_a_job_that_cannot_be_recorded_is_cancelled(tmp_path: Path, slurm: StandIns, more: tuple[str, ...]) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, "256k"):
        # The disk is full when sbatch has taken the job.
        sbatch = slurm.folder / "sbatch"
        sbatch.write_text(f"#!/bin/sh\ncat /dev/zero > {disk}/filler 2>/dev/null\necho Submitted batch job 42\n")
        ended = submit(disk, slurm, "--no-snapshot", *more).check(2)
        assert "No space left on device; job slurm 42 was accepted and is now cancelled; choose" in ended.output
        assert slurm.calls("scancel") == [["42"]]
        assert [path.name for path in disk.iterdir()] == ["filler"]

        (disk / "filler").unlink()
        slurm.answer(scancel=(1, "", "scancel: error: Access denied"))
        ended = submit(disk, slurm, "--no-snapshot", *more).check(1)
        assert "job slurm 42 was accepted, but cannot be recorded" in ended.output
        assert ended.output.endswith("(scancel: scancel: error: Access denied); cancel it manually\n")


def test_on_a_full_or_read_only_disk_nothing_is_queued_and_no_file_is_lost(tmp_path: Path, slurm: StandIns) -> None:
    disk = tmp_path / "disk"
    (tmp_path / "cwd").mkdir()

    def refused(*more: str) -> str:
        output = (
            submit(tmp_path / "cwd", slurm, "--no-snapshot", "--runs_dir", str(disk / "runs"), *more).check(2).output
        )
        assert "choose a folder with space where you may write" in output
        assert [path.name for path in disk.iterdir()] == ["filler"]
        return output

    with small_disk(disk, "64k"):
        fill(disk)
        for more in (
            (),
            ("--sweep", "seed=1,2"),
            ("--cluster", "local"),
            ("--cluster", "local", "--sweep", "seed=1,2"),
        ):
            assert "No space left on device" in refused(*more)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for more in ((), ("--sweep", "seed=1,2")):
            assert "Read-only file system" in refused(*more)
    assert slurm.calls("sbatch") == []


def test_without_slurm_the_error_suggests_the_local_back_end(cwd: Path) -> None:
    ended = submit(cwd, None, *JOB).check(2)
    assert "there is no sbatch on this machine" in ended.output
    assert "--cluster local" in ended.output
    assert list(cwd.iterdir()) == []


def test_the_local_back_end_rejects_several_nodes(cwd: Path, slurm: StandIns) -> None:
    assert "--cluster local is one machine" in submit(cwd, slurm, *JOB, "--cluster", "local").check(2).output


def test_a_run_can_be_submitted_again_only_after_it_has_ended(cwd: Path, slurm: StandIns) -> None:
    submit(cwd, slurm, *JOB).check()
    ended = submit(cwd, slurm, *JOB).check(2)
    assert "run 'it' is running already (slurm 42)" in ended.output
    slurm.answer(squeue=(0, "", ""), sacct=(0, "CANCELLED by 0|0:15|n1\n", ""))
    submit(cwd, slurm, *JOB).check()
    assert sorted(path.name for path in (cwd / "runs/it/submissions").iterdir()) == ["1", "2"]


def _git(cwd: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main")
    subprocess.run(["git", *identity, *arguments], cwd=cwd, check=True, capture_output=True)


def test_later_edits_do_not_reach_the_job(cwd: Path, slurm: StandIns) -> None:
    here = cwd / "inner"
    here.mkdir()
    (cwd / ".gitignore").write_text("data/\n.env\nruns/\n")
    (cwd / "shared.py").write_text("committed\n")
    _git(cwd, "init")
    _git(cwd, "add", ".")
    _git(cwd, "commit", "-m", "first")
    (cwd / "shared.py").write_text("edited, not committed\n")
    (here / "new.py").write_text("not added\n")
    (here / "data").mkdir()
    (here / ".env").write_text("planted-key")

    submit(here, slurm, *JOB).check()
    code = here / "runs/it/submissions/1/code"
    (cwd / "shared.py").write_text("edited later\n")
    assert (code / "shared.py").read_text() == "edited, not committed\n"
    assert (code / "inner/new.py").read_text() == "not added\n"
    assert (code / "inner/data").readlink() == here / "data", "relative paths to data are valid"
    assert (code / "inner/.env").is_symlink(), "a secret is not copied"
    assert not (code / "inner/runs").exists()
    assert not (code / ".git").exists()
    pickle = (here / "runs/it/submissions/1/42_submitted.pkl").read_bytes()
    assert str(code / "inner").encode() in pickle, "that is where the ranks run"


def test_no_snapshot_runs_the_code_in_place(cwd: Path, slurm: StandIns) -> None:
    _git(cwd, "init")
    submit(cwd, slurm, *JOB, "--no-snapshot").check()
    assert not (cwd / "runs/it/submissions/1/code").exists()


def test_the_record_has_the_job(cwd: Path, slurm: StandIns) -> None:
    submit(cwd, slurm, *JOB).check()
    record = json.loads((cwd / "runs/it/submissions/1/submission.json").read_text())
    assert (record["cluster"], record["job_id"], record["nodes"]) == ("slurm", "42", 2)


def test_a_plain_script_is_submitted_without_a_config(cwd: Path, slurm: StandIns) -> None:
    (cwd / "train.py").write_text("")
    given = ("--script", "train.py", *JOB, "--name", "it", "--max-restarts", "1", "--no-snapshot")
    path = {**slurm.env}
    dry = run(launcher("submit", *given, "--dry-run", "--", "--lr", "1"), cwd, env=path, timeout=60).check()
    assert "#SBATCH --nodes=2" in dry.output
    assert f"launcher run --name it --runs-dir {cwd / 'runs'} --max-restarts 1 train.py --lr 1\n" in dry.output
    assert sorted(file.name for file in cwd.iterdir()) == ["train.py"]
    run(launcher("submit", *given, "--", "--lr", "1"), cwd, env=path, timeout=60).check()
    assert not (cwd / "runs" / "it" / "submissions" / "1" / "config.yaml").exists()
    again = run(launcher("submit", *given), cwd, env=path, timeout=60).check(2)
    assert "run 'it' is running already" in again.output
    for wrong, message in (
        (("--script", "train.py", "--sweep", "a=1"), "--sweep: given with a script, which has no config"),
        (("--script", "train.py", "-m", "pkg"), "-m: given with --script"),
        (("--name", "x", "--", "--lr"), "--: given without --script or -m"),
        (("--script", "missing.py"), "given 'missing.py', which does not exist"),
    ):
        assert message in run(launcher("submit", *wrong), cwd, env=path, timeout=60).check(2).output
