"""The README says what is so."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from launcher.cli.job_parser import JOB_COMMANDS, build_job_parser
from launcher.cli.main import build_parser, run
from launcher.config.loading import load_config
from launcher.config.presets import preset_names
from launcher.doctor.command import build_parser as build_doctor_parser
from launcher.report.command import build_parser as build_report_parser
from launcher.wizard.command import build_parser as build_init_parser

REPOSITORY = Path(__file__).resolve().parents[3]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def _commands() -> list[list[str]]:
    """The words behind `launcher` of every command in a code block or between backticks."""
    blocks = re.findall(r"^    (?:.*&& )?(?:torchrun [^|]*?-m|python -m) (launcher.*)$", README, re.M)
    quoted = re.findall(r"`(?:python -m )?(launcher [^`]+)`", README)
    return [shlex.split(text, comments=True)[1:] for text in blocks + quoted]


def test_the_two_commands_stand_in_the_readme_and_ci_runs_the_second() -> None:
    assert "    pip install -e . && torchrun --nproc-per-node 2 -m launcher\n" in README
    assert '    pip install -e ".[test]" && pytest\n' in README
    assert '".[test]" && pytest' in (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize("words", _commands(), ids=" ".join)
def test_every_launcher_command_in_the_readme_is_accepted(words: list[str], tmp_path: Path) -> None:
    if "--help" in words:
        with pytest.raises(SystemExit, match=r"^0$"):
            run(words)
        return
    if words[:1] == ["init"]:
        options, overrides = build_init_parser().parse_known_args(words[1:])
        assert options.preset in (None, *preset_names())
        assert str(options.source) in ("None", "run.yaml")
        load_config([], overrides)
        return
    if words[:1] == ["convert"]:
        assert words[1:] == ["CKPT", "OUT"]
        return
    if words[:1] == ["report"]:
        assert len(build_report_parser().parse_args(words[1:]).runs) in (1, 2)
        return
    if words[:1] == ["completion"]:
        assert run(words) == 0
        return
    if words[:1] == ["doctor"]:
        build_doctor_parser().parse_args(words[1:])
        return
    if words and words[0] in JOB_COMMANDS:
        options, overrides = build_job_parser(words[0]).parse_known_args(words[1:])
        assert getattr(options, "config", []) in ([], ["run.yaml"])
        load_config([], overrides)
        return
    command = words.pop(0) if words and not words[0].startswith("-") else "fit"
    options, overrides = build_parser(command).parse_known_args(words)
    assert options.config in ([], ["run.yaml"])
    load_config([], overrides)


def test_the_config_in_the_readme_is_accepted(tmp_path: Path) -> None:
    lines = README.partition("    # run.yaml\n")[2].partition("\n\n")[0]
    file = tmp_path / "run.yaml"
    file.write_text("\n".join(line.removeprefix("    ") for line in lines.splitlines()))
    config = load_config([file])
    assert config.global_batch_size == 256
    assert config.model == {"class_path": "my_pkg.MyModule", "init_args": {"lr": 1e-4}}
