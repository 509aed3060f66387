"""The completion scripts in real shells."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from launcher.cli.main import run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "runs" / "first run").mkdir(parents=True)
    # A name that a shell would run.
    (tmp_path / "runs" / "$(touch made)").mkdir()
    return tmp_path


def _shell(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        reason = f"needs {name}: apt-get install {name}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


def _script(shell: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert run(["completion", shell]) == 0
    script = folder / f"script.{shell}"
    script.write_text(capsys.readouterr().out)
    return script


def _output(command: list[str], folder: Path) -> list[str]:
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    assert not (folder / "made").exists()
    return ended.stdout.splitlines()


CASES = [
    ("re", ["report"]),
    ("report --op", ["--open"]),
    ("report --o", ["--output", "--open"]),
    ("doctor --js", ["--json"]),
    ("plan --js", ["--json"]),
    ("fit --trainer.max_e", ["--trainer.max_epochs"]),
    ("fit --wandb.mode o", ["online", "offline"]),
    ("convert --format s", ["safetensors", "sharded"]),
    ("init --preset fs", ["fsdp2-node"]),
    ("--global_b", ["--global_batch_size"]),
    ("fit --key", []),
    ("help pl", ["plan"]),
    ("validate --ckpt", ["--ckpt-path", "--ckpt_path"]),
]


@pytest.mark.parametrize(("typed", "offered"), CASES)
def test_bash_offers(folder: Path, capsys: pytest.CaptureFixture[str], typed: str, offered: list[str]) -> None:
    script = _script("bash", folder, capsys)
    arguments = ["launcher", *typed.split()]
    ask = 'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _launcher; printf "%s\\n" "${COMPREPLY[@]}"'
    assert [w for w in _output([_shell("bash"), "-c", ask, "bash", str(script), *arguments], folder) if w] == offered


def test_bash_offers_run_directories_and_does_not_run_their_names(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = _script("bash", folder, capsys)
    ask = 'source "$1"; COMP_WORDS=(launcher report runs/); COMP_CWORD=2; _launcher; printf "%s\\n" "${COMPREPLY[@]}"'
    offered = _output([_shell("bash"), "-c", ask, "bash", str(script)], folder)
    assert sorted(offered) == ["runs/$(touch made)", "runs/first run"]


@pytest.mark.parametrize(("typed", "offered"), [case for case in CASES if not case[0].startswith("-")])
def test_fish_offers(folder: Path, capsys: pytest.CaptureFixture[str], typed: str, offered: list[str]) -> None:
    script = _script("fish", folder, capsys)
    lines = _output([_shell("fish"), "--no-config", "-c", f"source {script}; complete -C 'launcher {typed}'"], folder)
    assert sorted(line.partition("\t")[0] for line in lines) == sorted(offered)


def test_zsh_reads_the_script(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = _script("zsh", folder, capsys)
    asked = f"autoload -U compinit; compinit -u -d dump; source {script}; whence -w _launcher; print $_comps[launcher]"
    assert _output([_shell("zsh"), "-f", "-c", asked], folder) == ["_launcher: function", "_launcher"]
