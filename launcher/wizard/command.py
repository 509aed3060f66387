"""`launcher init`: the set-up wizard on the command line, or its defaults without a question."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.config.loading import read_sources
from launcher.config.presets import preset_names, preset_summary
from launcher.core.errors import UsageError
from launcher.wizard.answers import WizardConfig

_DEFAULT_OUTPUT = Path("run.yaml")
_LEFT = 130


def build_parser() -> argparse.ArgumentParser:
    """The parser of `launcher init`."""
    presets = "\n".join(f"  {name:18}{preset_summary(name)}" for name in preset_names())
    parser = argparse.ArgumentParser(
        "launcher init",
        usage="launcher init [options] [--key value ...]",
        description="Write a config in five steps: model and data, hardware and cluster, precision and strategy, "
        "logging, review.\nCtrl-C leaves at any question, and nothing is written.",
        epilog=f"presets:\n{presets}\n\nsettings on top, each of them a key of the config file too:\n"
        "  --model my_pkg.MyModule   --model.lr 1e-4   --trainer.max_epochs 3",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--preset", metavar="NAME", help="fills in what is not given")
    parser.add_argument("--yes", "-y", action="store_true", help="no questions: preset, file and settings as they are")
    parser.add_argument("--from", dest="source", metavar="FILE", type=Path, help="a config to begin with")
    parser.add_argument(
        "--output",
        "-o",
        metavar="FILE",
        type=Path,
        help="where to write, as YAML or JSON (run.yaml; or FILE of --from)",
    )
    return parser


def run(words: Sequence[str]) -> int:
    """Run `launcher init`.

    Returns:
        0, or 130 if the user left at the review.

    Raises:
        UsageError: bad input, or nobody to ask; nothing was written.
    """
    options, overrides = build_parser().parse_known_args(list(words))
    output: Path = options.output or options.source or _DEFAULT_OUTPUT
    config = _start(options.source, options.preset, overrides)
    edits = options.source is not None and options.source.absolute() == output.absolute()
    if options.yes:
        if output.exists() and not edits:
            raise UsageError(
                f"{output} is there already; give another --output, or `--from {output}` to begin with what it says"
            )
        _check(config)
    else:
        answered = _ask(config, output)
        if answered is None:
            sys.stderr.write("left; nothing was written\n")
            return _LEFT
        config = answered
    kept = _keep(output)
    quoted = shlex.quote(str(output))
    commands = {"see the plan": f"launcher plan --config {quoted}", "train": f"launcher fit --config {quoted}"}
    config.save(output, tuple(f"To {what}: {command}" for what, command in commands.items()))
    sys.stdout.write(f"wrote {output}" + (f"; what it was is {kept}" if kept else "") + "\n")
    sys.stdout.writelines(f"  {command}\n" for command in commands.values())
    return 0


def _start(source: Path | None, preset: str | None, overrides: Sequence[str]) -> WizardConfig:
    """The file, the settings on top of it, and the preset below both."""
    if source is not None:
        config = WizardConfig.load(source, overrides)
    else:
        config = WizardConfig.from_values(read_sources([], overrides))
    return config.with_preset(preset) if preset else config


def _check(config: WizardConfig) -> None:
    """What the questions would have checked on the way.

    Raises:
        ConfigError: a class does not import, or takes no such argument.
    """
    if config.model is not None:
        from launcher.user_code.classes import import_classes

        import_classes(config.to_run_config())
    for warning in config.validate().warnings:
        sys.stderr.write(f"warning: {warning.path}: {warning.message}\n")


def _ask(config: WizardConfig, output: Path) -> WizardConfig | None:
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError("init asks its questions on a terminal, and here is none; --yes asks nothing (see --help)")
    from launcher.wizard.wizard import SetupWizard

    note = " (what it is now is kept beside it)" if output.exists() else ""
    sys.stdout.write(f"This writes {output}{note} at the end. Ctrl-C leaves, and nothing is written.\n")
    return SetupWizard().run(config)


def _keep(output: Path) -> Path | None:
    """A copy of what is there, under a name that nothing has; None where nothing is.

    Raises:
        UsageError: the copy cannot be written; what is there stays.
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
        raise UsageError(f"{output} cannot be kept before it is replaced: {error}; give another --output") from error
    raise UsageError(f"{output} has a thousand copies already; move them away, or give another --output")
