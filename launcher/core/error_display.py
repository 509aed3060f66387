"""Shows the failure of a rank once if its error is not caught: in a script and in a notebook."""

from __future__ import annotations

import contextlib
import functools
import io
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from launcher.core.errors import LateUsageError, LauncherError, OutOfMemoryError, TrainingError, UsageError
from launcher.core.wrapping import wrap_for

_PACKAGE = f"{Path(__file__).parents[1]}/"
# Other ranks that a report names.
_MAX_OTHERS = 4
_MAX_CHARACTERS = 100

E = TypeVar("E", bound=LauncherError)


def format_failure(headline: str, others: Sequence[str], details: Sequence[str]) -> str:
    """The report of a failure: the first failed rank, the other ranks in one line, and the traceback or last lines.

    The last line of a traceback is the error, which a terminal then shows above the prompt.
    """
    lines = [headline]
    if others:
        named = [text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]}..." for text in others]
        more = f"; and {len(named) - _MAX_OTHERS} more" if len(named) > _MAX_OTHERS else ""
        lines.append(f"other ranks: {'; '.join(named[:_MAX_OTHERS])}{more}")
    return "\n".join([*lines, *details])


def show_once(error: E, is_shown: Callable[[], bool] = lambda: True) -> E:
    """Make Python and IPython print the report of `error` instead of a chain of tracebacks; returns `error`.

    `is_shown` is called when the error ends the script; False prints nothing, because another rank prints it.
    """
    if isinstance(error, TrainingError | UsageError):
        # IPython calls it if it exists.
        vars(error)["_render_traceback_"] = functools.partial(_render, error)
    if getattr(sys.excepthook, "func", None) is not _show:
        # On top of the hooks of torch and W&B, each of which prints the chain again.
        sys.excepthook = functools.partial(_show, sys.excepthook)
    _questions[:] = [is_shown]
    return error


# Whether this process prints the error that ends it; set with the last error.
_questions: list[Callable[[], bool]] = []


def _show(previous: Callable[..., Any], kind: type[BaseException], error: BaseException, trace: Any) -> None:
    if not isinstance(error, LauncherError):
        previous(kind, error, trace)
        return
    is_shown = _questions[-1]()
    report = _find_report(error)
    if is_shown and report is None:
        previous(kind, error, trace)
        return
    with contextlib.redirect_stderr(io.StringIO()):
        previous(kind, error, trace)  # W&B notes the failure
    if is_shown:
        with contextlib.suppress(OSError):
            sys.stderr.write(f"{report}\n")
            sys.stderr.flush()


def _render(error: LauncherError) -> list[str]:
    """The lines that IPython shows."""
    return (_find_report(error) or "".join(traceback.format_exception(error))).splitlines()


def _find_report(error: LauncherError) -> str | None:
    if isinstance(error, UsageError | LateUsageError):
        return _format_usage_error(error)
    if not isinstance(error, TrainingError) or error.report is not None or error.__cause__ is None:
        return getattr(error, "report", None)
    text = _format_cause(error, error.__cause__)
    # With the next strategy, which the allocator's error does not have.
    return f"{text}\n{error}" if isinstance(error, OutOfMemoryError) else text


def _format_usage_error(error: UsageError | LateUsageError) -> str | None:
    """The lines of the script that called the launcher, and the error: it explains itself. None without such lines."""
    callers = _list_callers(error)
    kind = type(error)
    text = wrap_for(sys.stderr, f"{kind.__module__}.{kind.__qualname__}: {error}")
    return "".join(
        ["Traceback (most recent call last):\n", *traceback.format_list(callers), text]
    ) if callers else None  # fmt: skip


def _list_callers(error: BaseException) -> list[traceback.FrameSummary]:
    """The frames of the traceback above the first one of the launcher."""
    frames = traceback.extract_tb(error.__traceback__)
    own = next((n for n, frame in enumerate(frames) if frame.filename.startswith(_PACKAGE)), len(frames))
    return frames[:own]


def _format_cause(error: BaseException, cause: BaseException) -> str:
    """The traceback of the cause, below the lines of the script that called the launcher."""
    head, *lines = "".join(traceback.format_exception(cause)).rstrip().splitlines()
    # A chain of its own begins with the first of its errors.
    is_plain = cause.__cause__ is None and (cause.__context__ is None or cause.__suppress_context__)
    before = "".join(traceback.format_list(_list_callers(error))).rstrip().splitlines() if is_plain else []
    return "\n".join([head, *before, *lines])
