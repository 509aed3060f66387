"""The text and the command after a run was stopped."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from launcher.checkpoint.manifest import write_manifest
from launcher.runs.continuation import Stop, describe_stop, find_command, find_free_name, format_command

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none"}
RESUME = {"--name": "it", "--resume": "auto"}


@pytest.mark.parametrize(
    ("own", "env", "parent", "command"),
    [
        (["python", "-m", "launcher", "fit", "--name", "a"], {}, ["bash"], "python -m launcher fit --name a"),
        (["/venv/bin/python", "/venv/bin/launcher", "--seed", "1"], {}, ["bash"], "launcher --seed 1"),
        (["python", "-u", "-m", "launcher"], TORCHRUN,
         ["/venv/bin/python", "/venv/bin/torchrun", "--nproc-per-node", "2", "-m", "launcher", "fit"],
         "torchrun --nproc-per-node 2 -m launcher fit"),
        (["python", "-u", "-m", "launcher"], TORCHRUN,
         ["python", "-m", "torch.distributed.run", "--standalone", "-m", "launcher"],
         "python -m torch.distributed.run --standalone -m launcher"),
        (["python", "train.py", "--data", "launcher"], {}, ["bash"], None),
    ],
)  # fmt: skip
def test_the_users_command_is_found(
    own: list[str], env: dict[str, str], parent: list[str], command: str | None
) -> None:
    found = find_command(own, env, parent)
    assert (None if found is None else " ".join(found)) == command


@pytest.mark.parametrize(
    ("given", "command"),
    [
        ("launcher fit", "launcher fit --name it --resume auto"),
        ("launcher --name other --seed 1 --resume=none", "launcher --seed 1 --name it --resume auto"),
        ("launcher --name=it --resume x.ckpt --seed 1", "launcher --seed 1 --name it --resume auto"),
        ("launcher --data.path 'a b' --model.api_key abc123def",
         "launcher --data.path 'a b' --model.api_key '(hidden)' --name it --resume auto"),
        ("launcher --resume", "launcher --name it --resume auto"),
    ],
)  # fmt: skip
def test_the_command_is_completed_and_can_be_pasted(given: str, command: str) -> None:
    completed = format_command(shlex.split(given), RESUME)
    assert completed == command
    assert format_command(shlex.split(completed), RESUME) == command


def _save(run: Path, step: int) -> Path:
    checkpoint = run / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"weights")
    write_manifest(checkpoint, checkpoint, step)
    return checkpoint


@pytest.mark.parametrize(
    ("number", "is_saved", "is_second", "text"),
    [
        (2, True, False, "stopped by Ctrl-C after step 9; saved runs/it/checkpoints/last.ckpt"),
        (15, True, False, "stopped by SIGTERM (for example from a scheduler) after step 9; saved runs/it"),
        (
            2,
            False,
            False,
            "stopped by Ctrl-C after step 9; the last checkpoint is runs/it/checkpoints/last.ckpt, step 7",
        ),
        (
            2,
            False,
            True,
            "second Ctrl-C: ended at once after step 9; the last checkpoint is runs/it/checkpoints/last.ckpt",
        ),
    ],
)
def test_a_stop_is_described_with_what_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, is_saved: bool, is_second: bool, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "it"
    saved = _save(run, 7)
    stop = Stop(number, 9, saved if is_saved else None, run, at_once=is_second, script='name="it"')
    assert describe_stop(stop).startswith(text)
    assert describe_stop(stop).endswith('\nto continue, run the script again with name="it"')


def test_a_stop_without_a_checkpoint_says_so_and_how_to_start_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.orig_argv", ["python", "-m", "launcher", "--name", "it"])
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    run = tmp_path / "it"
    run.mkdir()
    begin = "stopped by Ctrl-C before the first step; nothing was saved\nto start again:\n"
    assert describe_stop(Stop(2)) == describe_stop(Stop(2, run=run)) == f"{begin}python -m launcher --name it"
    # A run that has trained keeps its name.
    trained = describe_stop(Stop(2, 3, run=run))
    assert trained.endswith("nothing was saved\nto start again:\npython -m launcher --name it-2 --resume none")
    (tmp_path / "it-2").mkdir()
    assert find_free_name(run) == "it-3"
