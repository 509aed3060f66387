"""`launcher init`: the set-up wizard on the command line; with --yes, it asks nothing."""

from __future__ import annotations

import argparse
import shlex
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from launcher.config.loading import read_sources
from launcher.config.presets import preset_names, preset_summary
from launcher.core.command_parser import CommandParser
from launcher.core.errors import ConfigError, UsageError
from launcher.wizard.answers import WizardConfig

_DEFAULT_OUTPUT = Path("run.yaml")
# The exit code if the user cancels, as after Ctrl-C.
_CANCELLED = 130


def build_parser() -> argparse.ArgumentParser:
    """The parser of `launcher init`."""
    presets = "\n".join(
        textwrap.fill(f"{name:18}{preset_summary(name)}", 79, initial_indent="  ", subsequent_indent=" " * 20)
        for name in preset_names()
    )
    parser = CommandParser(
        "launcher init",
        usage="launcher init [options] [--key value ...]",
        description="Write a config in five steps: model and data, hardware and cluster, precision\nand strategy, "
        "logging, review.\nCtrl-C at any question cancels, and nothing is written.",
        epilog=f"presets:\n{presets}\n\nfurther settings, with the keys of the config file:\n"
        "  --model my_pkg.MyModule   --model.lr 1e-4   --trainer.max_epochs 3",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--preset", metavar="NAME", help="preset for the settings that are not given")
    parser.add_argument("--yes", "-y", action="store_true", help="ask nothing: use preset, file and settings as given")
    parser.add_argument("--from", dest="source", metavar="FILE", type=Path, help="config to start from")
    parser.add_argument("--output", "-o", metavar="FILE", type=Path,
                        help="file to write, as YAML or JSON (default: FILE of --from, else run.yaml)")  # fmt: skip
    return parser


def run(arguments: Sequence[str]) -> int:
    """Run the command.

    Returns:
        0, or 130 if the user cancelled at the review.

    Raises:
        UsageError: the input is invalid, or there is no terminal; nothing was written.
    """
    options, overrides = build_parser().parse_known_args(list(arguments))
    output: Path = options.output or options.source or _DEFAULT_OUTPUT
    config = _load_answers(options.source, options.preset, overrides)
    edits = options.source is not None and options.source.absolute() == output.absolute()
    if options.yes:
        if output.exists() and not edits:
            raise UsageError(f"{output} exists; give another --output, or start from it with `--from {output}`")
        _check_answers(config)
    else:
        answered = _ask_questions(config, output)
        if answered is None:
            sys.stderr.write("cancelled; nothing was written\n")
            return _CANCELLED
        config = answered
    copy = _back_up(output)
    quoted = shlex.quote(str(output))
    commands = {"see the plan": f"launcher plan --config {quoted}", "train": f"launcher fit --config {quoted}"}
    config.save(output, tuple(f"To {what}: {command}" for what, command in commands.items()))
    sys.stdout.write(f"wrote {output}" + (f"; the previous file is {copy}" if copy else "") + "\n")
    sys.stdout.writelines(f"  {command}\n" for command in commands.values())
    return 0


def _load_answers(source: Path | None, preset: str | None, overrides: Sequence[str]) -> WizardConfig:
    """The config file with the given settings; the preset fills in the rest."""
    if source is not None:
        config = WizardConfig.load(source, overrides)
    else:
        config = WizardConfig.from_values(read_sources([], overrides))
    return config.with_preset(preset) if preset else config


def _check_answers(config: WizardConfig) -> None:
    """Check the answers as the questions of the wizard do.

    Raises:
        ConfigError: a class cannot be imported, or does not take an argument.
    """
    if config.model is not None:
        from launcher.user_code.classes import import_classes

        import_classes(config.to_run_config())
    result = config.validate()
    if result.errors:
        raise ConfigError(result.errors)
    for warning in result.warnings:
        sys.stderr.write(f"warning: {warning.path}: {warning.message}\n")


def _ask_questions(config: WizardConfig, output: Path) -> WizardConfig | None:
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        message = "init needs a terminal for its questions; run it in one, or give --yes to ask nothing (see --help)"
        raise UsageError(message)
    from launcher.wizard.wizard import SetupWizard

    note = ", and keeps a copy of the existing file" if output.exists() else ""
    sys.stdout.write(f"This writes {output} at the end{note}. Ctrl-C cancels, and nothing is written.\n")
    return SetupWizard().run(config)


def _back_up(output: Path) -> Path | None:
    """Copy an existing file to an unused name; returns the copy, or None if there is no file.

    Raises:
        UsageError: the copy cannot be written; the file is unchanged.
    """
    if not output.exists():
        return None
    copies = (output.with_name(f"{output.name}.{number}.bak") for number in range(1, 1000))
    try:
        text = output.read_bytes()
        for copy in copies:
            try:
                with copy.open("xb") as file:
                    copy.chmod(output.stat().st_mode & 0o777)
                    file.write(text)
                return copy
            except FileExistsError:
                continue
    except OSError as error:
        raise UsageError(f"cannot copy {output} before replacing it: {error}; give another --output") from error
    raise UsageError(f"{output} has 999 copies; remove some of them, or give another --output")
