"""`launcher report RUN`: a page about a run; `launcher report A B ...`: a page that compares runs."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.core.atomic_write import write_file
from launcher.core.command_parser import CommandParser
from launcher.core.distribution import __version__, describe_install
from launcher.core.errors import MissingLibraryError, ReportError
from launcher.core.gc_paused import quick_imports
from launcher.report.overview import BADGES, list_figures, to_values
from launcher.report.page import MARK, render_page
from launcher.report.source import Run, find_run_directory, find_sweep_folder, list_runs, read_run
from launcher.report.sweep_source import Sweep, read_sweep, summarize_states, to_sweep_values
from launcher.report.units import format_number, format_plural, format_time, join_names

_FILE = "report.html"
_MOST_NAMES = 5
# A file's name may have 255 bytes.
_LONGEST_NAME = 200


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = CommandParser(
        "launcher report",
        description="Write one HTML page about a run: loss, loss scale, ranks, memory, restarts, plan and config. "
        "The page needs no network and no script. The run may have failed, or may still be training.",
        epilog="With two or more runs, the page compares them; with a sweep, it compares its members.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs",
        nargs="*",
        metavar="RUN",
        help="name or directory of a run or a sweep; give two or more runs to compare them",
    )
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
    if not options.runs:
        known = list_runs(options.runs_dir)
        raise ReportError(f"given no run; expected one, or several to compare; {known}")
    # A long run has a million events in memory; the garbage collector would scan them again and again.
    with quick_imports():
        return _create_report(options)


def _create_report(options: argparse.Namespace) -> int:
    if options.json and (options.open or options.output is not None):
        raise ReportError("given --json with --open or --output; --json writes no page, so remove one of them")
    sweep = _find_sweep(options.runs, options.runs_dir)
    if sweep is not None:
        shown: Sequence[Run] | Sweep = sweep
        values: Any = to_sweep_values(sweep) if options.json else None
        output = sweep.path / _FILE
    else:
        runs = [read_run(find_run_directory(name, options.runs_dir)) for name in options.runs]
        shown = runs
        values = [to_values(one) for one in runs] if options.json else None
        values = values[0] if options.json and len(runs) == 1 else values
        output = runs[0].path / _name_file(runs)
    if options.json:
        sys.stdout.write(json.dumps(values, allow_nan=False) + "\n")
        return 0
    output = options.output or output
    write_report(shown, output)
    sys.stdout.write(f"{_summarize(shown)}\n{output}\n")
    if options.open:
        _open_in_browser(output)
    return 0


def _find_sweep(names: Sequence[str], runs_dir: Path) -> Sweep | None:
    """The sweep, if one name is given and it is that of a sweep."""
    folders = {name: folder for name in names if (folder := find_sweep_folder(name, runs_dir)) is not None}
    if folders and len(names) > 1:
        sweep = next(iter(folders))
        raise ReportError(
            f"given the sweep {sweep!r} with other names; a sweep has a page of its own, so give it alone"
        )
    return read_sweep(next(iter(folders.values()))) if folders else None


def _name_file(runs: Sequence[Run]) -> str:
    """The name of a page in the first run's folder, with the names of the others."""
    others = [run.name for run in runs[1:]]
    if not others:
        return _FILE
    name = f"report-with-{'-'.join(others)}.html"
    return name if len(name) <= _LONGEST_NAME else f"report-with-{others[0]}-and-{len(others) - 1}-more.html"


def write_report(shown: Sequence[Run] | Sweep, output: Path, now: float | None = None) -> None:
    """Write the page about one run, about several to compare, or about a sweep; only an earlier report is replaced.

    Raises:
        ReportError: the file exists and is not a report, or cannot be written.
        MissingLibraryError: matplotlib is not installed.
    """
    try:
        if output.is_dir():
            raise ReportError(f"--output: {output} is a folder; give a file, such as {output / _FILE}")
        if output.exists() and not _is_report(output):
            raise ReportError(f"--output: {output} exists and is not a report; give another file, or remove this one")
        write_file(output, render(shown, time.time() if now is None else now))
    except OSError as error:
        reason = error.strerror or error
        raise ReportError(f"{output} cannot be written: {reason}; give another file with --output") from error


def render(shown: Sequence[Run] | Sweep, now: float) -> str:
    """The page about one run, several runs or a sweep, as text; `now` (seconds since the epoch) is in the footer.

    Raises:
        MissingLibraryError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401 -- the modules below need it
    except ImportError as error:
        raise MissingLibraryError(f"launcher report needs matplotlib: {describe_install('plot')}") from error
    # It logs when it builds its font cache.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from launcher.report.compare import label_runs, list_compared_sections
    from launcher.report.sections import list_sections
    from launcher.report.sweep import list_sweep_sections

    written = f"Written by launcher {__version__} on {format_time(now)}, from the events of"
    if isinstance(shown, Sweep):
        summary = summarize_states(shown)
        footer = f"{written} the runs of {shown.path}"
        return render_page(
            "sweep.html.j2", shown.name, list_sweep_sections(shown), footer, sweep=shown, summary=summary
        )
    footer = f"{written} {join_names([str(one.path) for one in shown])}"
    badges = [BADGES[one.history.outcome] if one.history.attempts else ("nothing recorded", "quiet") for one in shown]
    if len(shown) == 1:
        (only,) = shown
        return render_page("run.html.j2", only.name, list_sections(only), footer, run=only, badge=badges[0],
                           figures=list_figures(only))  # fmt: skip
    names = label_runs(shown)
    title = join_names(
        names if len(names) <= _MOST_NAMES else [*names[:_MOST_NAMES], f"{len(names) - _MOST_NAMES} more"]
    )
    headers = list(zip(names, shown, badges, strict=True))
    return render_page("comparison.html.j2", title, list_compared_sections(shown), footer, runs=headers)


def _is_report(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(MARK)) == MARK.encode()


def _summarize(shown: Sequence[Run] | Sweep) -> str:
    """One line for each run: how it ended, restarts and alerts."""
    if isinstance(shown, Sweep):
        best = shown.best
        found = "" if best is None else f"; the best {shown.monitor} is {format_number(best.best)}, of {best.name}"
        return f"{shown.name}: {summarize_states(shown)}{found}"
    lines: list[str] = []
    for one in shown:
        history = one.history
        steps = [] if one.script is not None else [format_plural(history.last_step, "step")]
        parts = [*steps, history.outcome if history.attempts else "nothing recorded"]
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
