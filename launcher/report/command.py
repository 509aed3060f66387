"""`launcher report RUN`: a page about a run; `launcher report A B`: a page that compares two runs."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launcher.core.atomic_write import write_file
from launcher.core.command_parser import CommandParser
from launcher.core.distribution import __version__
from launcher.core.errors import MissingLibraryError, ReportError
from launcher.core.gc_paused import quick_imports
from launcher.report.overview import BADGES, list_figures, to_values
from launcher.report.page import MARK, render_page
from launcher.report.source import Run, find_run_directory, list_runs, read_run
from launcher.report.units import format_plural, format_time

_FILE = "report.html"


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = CommandParser(
        "launcher report",
        description="Write one HTML page about a run: loss, loss scale, ranks, memory, restarts, plan and config. "
        "The page needs no network and no script. The run may have failed, or may still be training.",
        epilog="With two runs, the page compares them.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help="name or directory of a run; give two to compare them")
    parser.add_argument("--runs-dir", "--runs_dir", default="runs", type=Path, metavar="DIR",
                        help="folder of the runs (default: runs)")  # fmt: skip
    parser.add_argument("--output", "-o", type=Path, metavar="FILE",
                        help="output file (default: report.html in the run directory)")  # fmt: skip
    parser.add_argument("--json", action="store_true",
                        help="print outcome, figures and attempts as JSON instead of a page")  # fmt: skip
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    return parser


def run(arguments: Sequence[str]) -> int:
    """Run the command.

    Raises:
        ReportError: there is no such run, or the report cannot be written.
    """
    options = build_parser().parse_args(arguments)
    if not 1 <= len(options.runs) <= 2:
        known = list_runs(options.runs_dir)
        raise ReportError(f"given {len(options.runs)} runs; expected one, or two to compare; {known}")
    # A long run has a million events in memory; the garbage collector would scan them again and again.
    with quick_imports():
        return _create_report(options)


def _create_report(options: argparse.Namespace) -> int:
    if options.json and (options.open or options.output is not None):
        raise ReportError("given --json with --open or --output; --json writes no page, so remove one of them")
    runs = [read_run(find_run_directory(name, options.runs_dir)) for name in options.runs]
    if options.json:
        values = [to_values(one) for one in runs]
        sys.stdout.write(json.dumps(values if len(values) > 1 else values[0], allow_nan=False) + "\n")
        return 0
    output = options.output or runs[0].path / (_FILE if len(runs) == 1 else f"report-with-{runs[1].name}.html")
    write_report(runs, output)
    sys.stdout.write(f"{_summarize(runs)}\n{output}\n")
    if options.open:
        _open_in_browser(output)
    return 0


def write_report(runs: Sequence[Run], output: Path, now: float | None = None) -> None:
    """Write the page about one run, or about two to compare; only an earlier report is replaced.

    Raises:
        ReportError: the file exists and is not a report, or cannot be written.
        MissingLibraryError: matplotlib is not installed.
    """
    try:
        if output.is_dir():
            raise ReportError(f"--output: {output} is a folder; give a file, such as {output / _FILE}")
        if output.exists() and not _is_report(output):
            raise ReportError(f"--output: {output} exists and is not a report; give another file, or remove this one")
        write_file(output, render(runs, time.time() if now is None else now))
    except OSError as error:
        reason = error.strerror or error
        raise ReportError(f"{output} cannot be written: {reason}; give another file with --output") from error


def render(runs: Sequence[Run], now: float) -> str:
    """The page about one run, or about two to compare, as text; `now` (seconds since the epoch) is in the footer.

    Raises:
        MissingLibraryError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401 -- the modules below need it
    except ImportError as error:
        raise MissingLibraryError('launcher report needs matplotlib: pip install "launcher[plot]"') from error
    # It logs when it builds its font cache.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from launcher.report.compare import label_runs, list_compared_sections
    from launcher.report.sections import list_sections

    badges = [BADGES[one.history.outcome] if one.history.attempts else ("nothing recorded", "quiet") for one in runs]
    paths = " and ".join(str(one.path) for one in runs)
    footer = f"Written by launcher {__version__} on {format_time(now)}, from the events of {paths}"
    if len(runs) == 1:
        (only,) = runs
        return render_page("run.html.j2", only.name, list_sections(only), footer, run=only, badge=badges[0],
                           figures=list_figures(only))  # fmt: skip
    one, two = runs
    headers = list(zip(label_runs(one, two), runs, badges, strict=True))
    sections = list_compared_sections(one, two)
    return render_page("comparison.html.j2", f"{one.name} and {two.name}", sections, footer, runs=headers)


def _is_report(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(MARK)) == MARK.encode()


def _summarize(runs: Sequence[Run]) -> str:
    """One line for each run: how it ended, restarts and alerts."""
    lines: list[str] = []
    for one in runs:
        history = one.history
        parts = [format_plural(history.last_step, "step"), history.outcome if history.attempts else "nothing recorded"]
        if len(history.attempts) > 1:
            parts.append(format_plural(len(history.attempts), "attempt"))
        if history.alerts:
            parts.append(format_plural(len(history.alerts), "alert"))
        lines.append(f"{one.name}: {', '.join(parts)}")
        lines += [f"  notice: {problem}" for problem in one.problems]
    return "\n".join(lines)


def _open_in_browser(output: Path) -> None:
    import webbrowser

    if not webbrowser.open(output.absolute().as_uri()):
        sys.stderr.write("notice: no browser found; open the file above, or copy it to your machine\n")
