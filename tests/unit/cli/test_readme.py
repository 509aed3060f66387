"""The commands and the config in the README work."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from launcher.cli.commands import COMMANDS
from launcher.cli.main import run
from launcher.config.loading import load_config
from launcher.config.presets import preset_names

REPOSITORY = Path(__file__).resolve().parents[3]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def _commands() -> list[list[str]]:
    """The arguments of every `launcher` command in a code block or between backticks."""
    blocks = re.findall(r"^    (?:.*&& )?(?:torchrun [^|]*?-m|python -m) (launcher.*)$", README, re.M)
    quoted = re.findall(r"`(?:python -m )?(launcher [^`]+)`", README)
    return [shlex.split(text, comments=True)[1:] for text in blocks + quoted]


def test_the_readme_has_the_two_commands_and_ci_runs_the_second() -> None:
    assert "    pip install -e . && torchrun --nproc-per-node 2 -m launcher\n" in README
    assert '    pip install -e ".[test]" && pytest\n' in README
    assert '".[test]" && pytest' in (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize("arguments", _commands(), ids=" ".join)
def test_every_launcher_command_in_the_readme_is_accepted(arguments: list[str]) -> None:
    if "--help" in arguments:
        with pytest.raises(SystemExit, match=r"^0$"):
            run(arguments)
        return
    name = arguments.pop(0) if arguments and not arguments[0].startswith("-") else "fit"
    options, overrides = COMMANDS[name].load().build_parser().parse_known_args(arguments)
    assert not overrides or COMMANDS[name].takes_settings
    assert getattr(options, "config", []) in ([], ["run.yaml"])
    assert getattr(options, "preset", None) in (None, *preset_names())
    load_config([], overrides)


def test_the_config_in_the_readme_is_accepted(tmp_path: Path) -> None:
    lines = README.partition("    # run.yaml\n")[2].partition("\n\n")[0]
    file = tmp_path / "run.yaml"
    file.write_text("\n".join(line.removeprefix("    ") for line in lines.splitlines()))
    config = load_config([file])
    assert config.global_batch_size == 256
    assert config.model == {"class_path": "my_pkg.MyModule", "init_args": {"lr": 1e-4}}
