"""The tree of exceptions. Only the command line turns them into text and an exit code.

LauncherError                      exit code 1
  UsageError                       exit code 2: the request cannot be fulfilled
    CommandLineError               an option of a command is unknown, or its value is missing or invalid
    ConfigError                    every wrong field of a config, at once
      CallError                    every wrong argument of a call in Python, at once
      LaunchError                  every wrong flag that sets how the ranks are started, at once
      SubmitError                  every option of a submission that is wrong or contradicts the config
    NoSuchRunError                 no run has that name
    TopologyError                  the variables that describe this rank are incomplete or contradict the config
    AgreementError                 the ranks differ, or one of them did not arrive
    PlanError                      no strategy, precision or batch split fulfils the config on these ranks
    RunDirectoryError              the run directory cannot be created or belongs to another run
    ResumeError                    the checkpoint to resume from is missing, damaged or of another model
    DataError                      the data cannot feed the planned batches
    MissingLibraryError            a required library is not installed
    ReportError                    no such run, or the report cannot be written
  QueueError                       exit code 1: SLURM, or this machine, rejected a request or did not answer
  LaunchTimeoutError               exit code 1: a function of `launcher.launch` did not end in time
  TrainingError                    exit code 1: the model's or the data's own code raised
    OutOfMemoryError               the device or the host ran out of memory
    StorageError                   a disk is full, read-only or not writable
    LateUsageError                 a request that cannot be fulfilled, found after the first batch was trained

Interrupted                        exit code 128 + signal: stopped by a signal, after a checkpoint if there was one to
                                   save; no `Exception`
"""

from __future__ import annotations

import re
import signal
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any


class LauncherError(Exception):
    """Base class of all errors of the launcher, with the exit code of the process.

    `is_recorded` is true if the run's events contain it already.
    """

    exit_code = 1
    is_recorded = False


class UsageError(LauncherError):
    """The request cannot be fulfilled; nothing was trained."""

    exit_code = 2


class CommandLineError(UsageError):
    """An option of a command is unknown, or its value is missing or invalid."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One wrong field or flag: its dotted path or file, and a message with the given and the valid values."""

    path: str
    message: str


class ConfigError(UsageError):
    """All problems of a config (at least one), in the order of the fields."""

    what = "the config"

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        lines = [f"  {p.path}: {p.message}" for p in self.problems]
        count = f"{len(lines)} problem{'s' if len(lines) > 1 else ''}"
        super().__init__("\n".join([f"{self.what} has {count}:", *lines]))


class CallError(ConfigError):
    """Arguments of a function or class of the launcher are wrong."""

    what = "the call"


class LaunchError(ConfigError):
    """Flags that set how the ranks are started are wrong or contradict each other."""

    what = "the command line"


class SubmitError(ConfigError):
    """Options of a submission that are wrong or contradict the config; nothing was queued."""

    what = "nothing was queued: the submission"


class NoSuchRunError(UsageError):
    """No run has that name; the message lists the existing ones."""


class QueueError(LauncherError):
    """SLURM, or this machine, rejected a request or did not answer; contains its own message."""


class TopologyError(UsageError):
    """The variables that describe this rank are incomplete, no numbers, or contradict the config."""


class AgreementError(UsageError):
    """The ranks differ, one of them failed before the start, or one did not arrive; `ranks` are the blocking ones."""

    def __init__(self, message: str, ranks: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)


class PlanError(UsageError):
    """No strategy, precision or batch split fulfils the config on these ranks."""


class RunDirectoryError(UsageError):
    """The run directory cannot be created, or belongs to another run."""


class ResumeError(UsageError):
    """The checkpoint to resume from is missing, damaged or of another model."""


class DataError(UsageError):
    """The data cannot feed the planned batches."""


class MissingLibraryError(UsageError):
    """A required library is not installed; the message contains the command to install it."""


class ReportError(UsageError):
    """No such run, or the report cannot be written."""


class LaunchTimeoutError(LauncherError, TimeoutError):
    """A function of `launcher.launch` did not end in time; its ranks were ended."""


class TrainingError(LauncherError):
    """The code of the model or the data raised an exception, which is `__cause__`, on `rank` (None if not known).

    Attributes:
        report: the text for a terminal, with the traceback of the first failed rank; None if there is no such text.
        checkpoint: the run's last valid checkpoint, if the message names it.
    """

    def __init__(self, message: str, *, rank: int | None = None, report: str | None = None) -> None:
        super().__init__(message)
        self.rank, self.report = rank, report
        self.checkpoint: str | None = None


def with_cause_type(error: TrainingError) -> TrainingError:
    """The same error as an instance of its cause's class too, as Optuna's pruning and a script's `except` need it.

    Text, `args` and fields are those of the cause; the rank is in the attribute `rank` and in a note. The error is
    returned unchanged if the classes cannot be combined.
    """
    cause = error.__cause__
    if not isinstance(cause, Exception) or type(error) is not TrainingError or isinstance(cause, LauncherError):
        return error

    arguments = error.args

    def text(_: object) -> str:
        return str(cause)

    def reduce(_: object) -> tuple[type[TrainingError], tuple[Any, ...]]:
        # Another process does not have the combined class.
        return TrainingError, arguments

    space: dict[str, Any] = {
        # The cause's `__init__` may require other arguments.
        "__init__": Exception.__init__,
        "__str__": text,
        "__reduce__": reduce,
        "__module__": TrainingError.__module__,
    }
    is_group = isinstance(cause, BaseExceptionGroup)  # which checks its arguments, and has read-only fields
    try:
        joined = type(TrainingError.__name__, (TrainingError, type(cause)), space)(*(cause if is_group else error).args)
    except TypeError:
        return error
    joined.args = cause.args
    # Fields that are not in `vars`: those of Python's own errors, such as `errno`, and slots.
    for kind in () if is_group else type(cause).__mro__:
        for name, member in vars(kind).items():
            if isinstance(member, types.MemberDescriptorType) and not name.startswith("__") and hasattr(cause, name):
                setattr(joined, name, getattr(cause, name))
    vars(joined).update({**vars(cause), **vars(error)})
    joined.__notes__ = [*getattr(cause, "__notes__", ()), *map(str, arguments)]
    return joined.with_traceback(error.__traceback__)


class OutOfMemoryError(TrainingError):
    """The device or the host ran out of memory; `__cause__` is the original error.

    Attributes:
        expected_bytes: peak of a step in the plan; None if the plan has no memory estimate.
        allocated_bytes: peak that was allocated on this rank's device; None if unknown (a CPU).
        next_strategy: the next strategy that needs less, if `next_checkpointed` with activation checkpointing; or None.
        restarts: whether the run restarts with that strategy (`on_oom: next`).
    """

    def __init__(
        self,
        message: str,
        *,
        expected_bytes: int | None,
        allocated_bytes: int | None,
        next_strategy: str | None,
        restarts: bool,
        rank: int | None = None,
    ) -> None:
        super().__init__(message, rank=rank)
        self.expected_bytes = expected_bytes
        self.allocated_bytes = allocated_bytes
        self.next_strategy, self.next_checkpointed = next_strategy, False
        self.restarts = restarts


class StorageError(TrainingError):
    """A file could not be written; nothing is wrong with the code, and the run can continue when this is corrected.

    Attributes:
        reason: `disk_full`, `quota`, `read_only` or `no_permission`.
        folder: where it was to be written; None if not known.
        needed_bytes: size of what was to be written; None if not known.
        free_bytes: free space there; None if not known, and for a quota.
        run: the run directory, once it is known.
    """

    def __init__(
        self,
        message: str,
        *,
        reason: str = "disk_full",  # for `pickle`, which sets it afterwards
        folder: str | None = None,
        needed_bytes: int | None = None,
        free_bytes: int | None = None,
        rank: int | None = None,
    ) -> None:
        super().__init__(message, rank=rank)
        self.reason = reason
        self.folder = folder
        self.needed_bytes, self.free_bytes = needed_bytes, free_bytes
        self.run: str | None = None


class LateUsageError(TrainingError):
    """A request that cannot be fulfilled, found after the first batch was trained; a restart would repeat it."""


class Interrupted(BaseException):
    """Stopped by a signal at a step boundary, with a checkpoint if one could be written.

    Not an `Exception`: a script that continues after a failed training must end here. `launcher.fit` and `train` raise
    it as a `SystemExit` too, and after Ctrl-C as a `KeyboardInterrupt`.

    Attributes:
        checkpoint: path of the saved checkpoint, if there is one.
        step: optimizer steps done.
        run: the run directory, once it is known.
        users_handler: calls the script's own handler of the signal; None if it has none.
    """

    def __init__(self, signal_number: int, *, checkpoint: str | None, step: int) -> None:
        super().__init__(f"stopped by {describe_stop_signal(signal_number)} after step {step}")
        self.signal_number = signal_number
        self.checkpoint = checkpoint
        self.step = step
        self.run: str | None = None
        self.exit_code = self.code = 128 + signal_number
        self.users_handler: Callable[[], Any] | None = None

    def for_script(self) -> Interrupted:
        """The same as a `SystemExit`, which ends a script; not for use inside Lightning, which handles those itself."""
        kind = _InterruptedByCtrlC if self.signal_number == signal.SIGINT else _InterruptedBySignal
        error = kind(self.signal_number, checkpoint=self.checkpoint, step=self.step)
        error.run = self.run
        return error


class _InterruptedBySignal(Interrupted, SystemExit):
    pass


class _InterruptedByCtrlC(Interrupted, KeyboardInterrupt, SystemExit):
    """A `SystemExit` as well: exit code 130 without a traceback from every rank."""


def describe_stop_signal(number: int) -> str:
    """What a signal that stops a run means to its user: 'Ctrl-C', or its name and who may have sent it."""
    if number == signal.SIGINT:
        return "Ctrl-C"
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
    sender = {"SIGHUP": "the terminal was closed", "SIGKILL": "it cannot be handled", "SIGQUIT": "Ctrl-\\"}
    return f"{name} ({sender.get(name, 'for example from a scheduler')})"


def first_line(error: BaseException) -> str:
    """The first line of an error's text, without the terminal codes that torch adds; its class if it has no text."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    return text.splitlines()[0] if text else type(error).__name__


def describe_error(error: BaseException) -> str:
    """An error's class, and the first line of its text, at most 200 characters of it."""
    name, text = type(error).__name__, first_line(error)
    return name if text == name else f"{name}: {text[:200]}"
