"""README and docs: what they name exists, and every command, config and Python block is accepted."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from docs.generate.cli import commands as subcommands
from docs.generate.cli import find_parser
from launcher.cli.run import prepare_script_submission
from launcher.cli.submit import split_arguments
from launcher.config.loading import load_config
from launcher.config.presets import preset_names
from tests.support.documentation import (
    REPOSITORY,
    Block,
    arguments_of,
    blocks,
    commands,
    pages,
    quoted_commands,
    write_user_files,
)

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
_PATH = re.compile(r"`((?:launcher|strategies|slurm|tests|docs)/[\w/.-]+)`")
_LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)(?:#[\w-]+)?\)")


def test_the_two_commands_are_in_the_readme_and_ci_runs_the_second() -> None:
    assert "\npip install -e . && torchrun --nproc-per-node 2 -m launcher\n" in README
    assert '\npip install -e ".[test]" && pytest\n' in README
    assert '".[test]" && pytest' in (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8")


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


@pytest.fixture(autouse=True)
def forget_user_modules(tmp_path: Path) -> Iterator[None]:
    """Modules of a page's files are not imported in later tests, which have others of the same name."""
    path = list(sys.path)
    yield
    sys.path[:] = path
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_named_paths_and_links_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert [path for path in _PATH.findall(text) if not (REPOSITORY / path).exists()] == []
    # The rest of a site's links is checked by `mkdocs build --strict`.
    if page.name == "README.md":
        assert [link for link in _LINK.findall(text) if not (REPOSITORY / link).exists()] == []


def test_every_page_is_in_the_navigation() -> None:
    # Tags such as `!!python/name` are mkdocs' own; this file has none.
    nav = str(yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    docs = REPOSITORY / "docs"
    assert [str(page) for page in docs.rglob("*.md") if page.relative_to(docs).as_posix() not in nav] == []


def test_the_architecture_page_answers_ten_questions_with_paths() -> None:
    text = (REPOSITORY / "docs" / "explanation" / "architecture.md").read_text(encoding="utf-8")
    answers = re.findall(r"^\| ((?:Where|How) [^|]+\?) \| (.*) \|$", text, re.MULTILINE)
    assert len(answers) >= 10
    assert [question for question, answer in answers if not _PATH.search(answer)] == []


def test_ci_installs_the_docs_extra_and_builds_the_site_strictly() -> None:
    script = (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8")
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert "docs" in extras
    assert re.search(r"pip install .*docs", script)
    assert "mkdocs build --strict" in script


@pytest.mark.parametrize(("page", "command"), dict.fromkeys(commands()), ids=" ".join)
def test_every_command_of_a_block_is_accepted(
    page: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = arguments_of(command)
    if words is None:
        assert command.startswith(("pip install", "python3 -m venv")), f"{page}: not a command of the launcher"
        return
    monkeypatch.chdir(tmp_path)
    write_user_files(tmp_path)
    assert_accepted(list(words))


@pytest.mark.parametrize(("page", "command"), dict.fromkeys(quoted_commands()), ids=" ".join)
def test_every_quoted_command_is_accepted(
    page: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = list(arguments_of(command) or ())
    if words[0] == "COMMAND":
        return
    if len(words) == 1 or words[-1] == "--help":
        assert words[0] in subcommands() or words == ["--help"], page
        return
    monkeypatch.chdir(tmp_path)
    write_user_files(tmp_path)
    assert_accepted(words)


def assert_accepted(words: list[str]) -> None:
    """The subcommand's own parser takes the options, and the rest are settings."""
    command = words.pop(0) if words and not words[0].startswith("-") else "fit"
    if command == "submit" and {"--script", "-m"} & set(words):
        own, script = split_arguments(words)
        options, overrides = find_parser(command).parse_known_args(own)
        prepare_script_submission(
            overrides, [*(["-m", options.module] if options.module else [options.script]), *script]
        )
        return
    options, overrides = find_parser(command).parse_known_args(words)
    known = vars(options)
    assert known.get("preset") in (None, *preset_names())
    files = known.get("config") or []
    if command in ("run", "status", "logs", "cancel", "report", "convert", "doctor", "completion"):
        assert overrides == []
        return
    load_config(files, overrides)
    for sweep in known.get("sweep") or []:
        assert "=" in sweep or Path(sweep).is_file()


@pytest.mark.parametrize("block", [block for block in blocks("yaml") if block.title != "settings.yaml"],
                         ids=lambda block: f"{block.page}:{block.title}")  # fmt: skip
def test_every_config_is_accepted(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "made-up-token")
    file = tmp_path / "run.yaml"
    file.write_text(block.text)
    load_config([file])


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: f"{block.page}:{block.text[:40].splitlines()[0]}")
def test_every_python_block_imports_public_names_only(block: Block) -> None:
    import launcher

    tree = ast.parse(block.text)
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "launcher"
             for alias in node.names]  # fmt: skip
    assert set(names) <= set(launcher.__all__)
