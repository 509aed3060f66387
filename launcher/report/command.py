"""`launcher report RUN`: one page about a run; `launcher report A B`: two runs beside each other."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launcher.core.atomic_write import write_file
from launcher.core.distribution import __version__
from launcher.core.errors import MissingLibraryError, ReportError
from launcher.core.gc_paused import quick_imports
from launcher.report.source import Run, find_run_directory, read_run, run_names
from launcher.report.units import many, moment
from launcher.report.values import to_values

_FILE = "report.html"


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        "launcher report",
        description="Write one HTML page about a run: loss, loss scale, ranks, memory, restarts, plan and config. "
        "It needs no network and no script, and works for a run that failed or still trains.",
        epilog="With two runs, they stand beside each other with their differences.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help="a run's name or directory; two to compare them")
    parser.add_argument("--runs-dir", "--runs_dir", default="runs", type=Path, metavar="DIR",
                        help="folder of the runs (default: runs)")  # fmt: skip
    parser.add_argument("--output", "-o", type=Path, metavar="FILE",
                        help="where to write (default: report.html in the run's directory)")  # fmt: skip
    parser.add_argument("--json", action="store_true",
                        help="print outcome, figures and attempts as JSON, and write no page")  # fmt: skip
    parser.add_argument("--open", action="store_true", help="show it in the browser")
    return parser


def run(arguments: Sequence[str]) -> int:
    """Run the command.

    Args:
        arguments: the words after `launcher report`.

    Returns:
        The exit code.

    Raises:
        ReportError: there is no such run, or the report cannot be written.
    """
    options = build_parser().parse_args(arguments)
    if not 1 <= len(options.runs) <= 2:
        names = run_names(options.runs_dir)
        known = (
            f"the runs in {options.runs_dir}, newest first: {', '.join(names[:8])}" if names else "there is none yet"
        )
        raise ReportError(f"given {len(options.runs)} runs; expected one, or two to compare; {known}")
    # A long run's events are a million objects, all of which stay: the collector would walk them over and over.
    with quick_imports():
        return _report(options)


def _report(options: argparse.Namespace) -> int:
    if options.json and (options.open or options.output is not None):
        raise ReportError("given --json with --open or --output; --json writes no page, so leave out one of them")
    runs = [read_run(find_run_directory(word, options.runs_dir)) for word in options.runs]
    if options.json:
        told = [to_values(one) for one in runs]
        sys.stdout.write(json.dumps(told if len(told) > 1 else told[0], allow_nan=False) + "\n")
        return 0
    output = options.output or runs[0].path / (_FILE if len(runs) == 1 else f"report-with-{runs[1].name}.html")
    write_report(runs, output)
    sys.stdout.write(f"{_summary(runs)}\n{output}\n")
    if options.open:
        _open(output)
    return 0


def write_report(runs: Sequence[Run], output: Path, now: float | None = None) -> None:
    """Write the page about one run or two.

    Args:
        runs: one, or two to compare.
        output: the file; an earlier report there is replaced, anything else is left alone.
        now: seconds since the epoch, for the footer.

    Raises:
        ReportError: the file is no report, or cannot be written.
        MissingLibraryError: matplotlib is not installed.
    """
    from launcher.report.markup import MARK

    try:
        if output.is_dir():
            raise ReportError(f"--output: {output} is a folder; give a file, such as {output / _FILE}")
        if output.exists() and not _begins_with(output, MARK):
            raise ReportError(
                f"--output: {output} exists and is no report; give another file, or remove that one first"
            )
        page = render(runs, time.time() if now is None else now)
        write_file(output, page)
    except OSError as error:
        raise ReportError(f"{output} cannot be written: {error.strerror or error}; --output says where else") from error


def render(runs: Sequence[Run], now: float) -> str:
    """The page as text.

    Args:
        runs: one, or two to compare.
        now: seconds since the epoch, for the footer.

    Raises:
        MissingLibraryError: matplotlib is not installed.
    """
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise MissingLibraryError('launcher report needs matplotlib: pip install "launcher[plot]"') from error
    # It tells of its font cache, which is nobody's concern here.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from launcher.report.compare import compared_header, compared_sections
    from launcher.report.markup import page
    from launcher.report.overview import header_of
    from launcher.report.sections import sections_of

    footer = f"Written by launcher {__version__} on {moment(now)}, from the events of "
    if len(runs) == 1:
        (only,) = runs
        return page(f"{only.name} \u00b7 launcher report", header_of(only), sections_of(only), footer + str(only.path))
    one, two = runs
    title = f"{one.name} and {two.name} \u00b7 launcher report"
    sections = compared_sections(one, two)
    return page(title, compared_header(one, two), sections, f"{footer}{one.path} and {two.path}")


def _begins_with(file: Path, mark: str) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(mark)) == mark.encode()


def _summary(runs: Sequence[Run]) -> str:
    """One line a run: how it ended, and what is worth a look."""
    lines: list[str] = []
    for one in runs:
        history = one.history
        found = [many(history.last_step, "step"), history.outcome if history.attempts else "nothing recorded"]
        if len(history.attempts) > 1:
            found.append(many(len(history.attempts), "attempt"))
        if history.alerts:
            found.append(many(len(history.alerts), "alert"))
        lines.append(f"{one.name}: {', '.join(found)}")
        lines += [f"  notice: {problem}" for problem in one.problems]
    return "\n".join(lines)


def _open(output: Path) -> None:
    import webbrowser

    if not webbrowser.open(output.absolute().as_uri()):
        sys.stderr.write("notice: no browser was found here; open the file above, or copy it to your own machine\n")
