"""What can go wrong, as a tree. Only the command line turns it into text and an exit code.

LauncherError                      exit code 1
  UsageError                       exit code 2: what was asked for cannot be done
    ConfigError                    every wrong field of a config, at once
      LaunchError                  the flags that say how to start the ranks are wrong, all of them at once
      SubmitError                  every option of a submission that is wrong or contradicts the config
    NoSuchRunError                 there is no run of that name
    TopologyError                  the variables that describe this rank are half set or contradict the config
    AgreementError                 the ranks differ, or one of them never came
    PlanError                      no strategy, precision or batch split meets the config on these ranks
    RunDirectoryError              the run directory cannot be made or belongs to another run
    ResumeError                    the checkpoint to resume from is missing, foreign or damaged
    DataError                      the data cannot feed the planned batches
    MissingLibraryError            a library is needed that is not installed
  QueueError                       exit code 1: SLURM, or the machine, did not take or answer what it was asked
    ReportError                    there is no such run to report on, or the report cannot be written
  TrainingError                    exit code 1: the model's or the data's own code raised
    OutOfMemoryError               the device or the host had no memory left

Interrupted                        exit code 128 + signal: stopped by a signal, after a checkpoint; no `Exception`
"""

from __future__ import annotations

import signal
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any


class LauncherError(Exception):
    """Anything that the launcher itself reports.

    Attributes:
        exit_code: what the process ends with.
    """

    exit_code = 1


class UsageError(LauncherError):
    """What was asked for cannot be done; nothing was trained."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class Problem:
    """One wrong field.

    Attributes:
        path: dotted path of the field, or the file's name.
        message: what was given, what was expected, what to do.
    """

    path: str
    message: str


class ConfigError(UsageError):
    """Every problem of a config, in the order of the fields.

    Attributes:
        problems: at least one.
    """

    what = "the config"

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        lines = [f"  {p.path}: {p.message}" for p in self.problems]
        count = f"{len(lines)} problem{'s' if len(lines) > 1 else ''}"
        super().__init__("\n".join([f"{self.what} has {count}:", *lines]))


class LaunchError(ConfigError):
    """The flags that say how the ranks are started are wrong or contradict each other."""

    what = "the command line"


class SubmitError(ConfigError):
    """Options of a submission that are wrong or contradict the config; nothing was queued."""

    what = "nothing was queued: the submission"


class NoSuchRunError(UsageError):
    """There is no run of that name; says which there are."""


class QueueError(LauncherError):
    """SLURM, or this machine, did not take or answer what it was asked; carries its own words."""


class TopologyError(UsageError):
    """The variables that describe this rank are half set, no numbers, or contradict the config."""


class AgreementError(UsageError):
    """The ranks differ, one of them failed before the start, or one never came.

    Attributes:
        ranks: the blocking ranks.
    """

    def __init__(self, message: str, ranks: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)


class PlanError(UsageError):
    """No strategy, precision or batch split meets the config on these ranks."""


class RunDirectoryError(UsageError):
    """The run directory cannot be made, or belongs to another run."""


class ResumeError(UsageError):
    """The checkpoint to resume from is missing, foreign or damaged."""


class DataError(UsageError):
    """The data cannot feed the planned batches."""


class MissingLibraryError(UsageError):
    """A library is needed that is not installed; says how to get it."""


class ReportError(UsageError):
    """There is no such run to report on, or the report cannot be written."""


class TrainingError(LauncherError):
    """The model's or the data's own code raised; `__cause__` is what it raised.

    Attributes:
        rank: the rank whose code it was, None where that is not known.
    """

    def __init__(self, message: str, *, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


def with_cause_type(error: TrainingError) -> TrainingError:
    """The same error, which an `except` for what the user's code raised catches too, as it does under plain Lightning.

    Optuna's pruning and a script's own `except ValueError` go by the class. Text, `args` and fields are the cause's,
    too; the rank is in the attribute `rank` and in a note.

    Args:
        error: with a `__cause__`; returned as it is where its class cannot be joined with the cause's.
    """
    cause = error.__cause__
    if not isinstance(cause, Exception) or type(error) is not TrainingError or isinstance(cause, LauncherError):
        return error

    told = error.args

    def text(_: object) -> str:
        return str(cause)

    def as_sent(_: object) -> tuple[type[TrainingError], tuple[Any, ...]]:
        # Another process has no such class.
        return TrainingError, told

    space: dict[str, Any] = {
        # The cause's own may want other arguments.
        "__init__": Exception.__init__,
        "__str__": text,
        "__reduce__": as_sent,
        "__module__": TrainingError.__module__,
    }
    try:
        joined = type(TrainingError.__name__, (TrainingError, type(cause)), space)(*error.args)
    except TypeError:
        return error
    joined.args = cause.args
    # What is no entry of `vars`: the fields of Python's own errors, such as `errno`, and slots.
    for kind in type(cause).__mro__:
        for name, member in vars(kind).items():
            if isinstance(member, types.MemberDescriptorType) and not name.startswith("__") and hasattr(cause, name):
                setattr(joined, name, getattr(cause, name))
    vars(joined).update({**vars(cause), **vars(error)})
    joined.__notes__ = [*getattr(cause, "__notes__", ()), *map(str, told)]
    return joined.with_traceback(error.__traceback__)


class OutOfMemoryError(TrainingError):
    """The device or the host had no memory left; `__cause__` is what said so.

    Attributes:
        expected_bytes: what the plan expected at the step's peak; None if it did not look.
        allocated_bytes: the most that was allocated on this rank's device; None where that cannot be known (a CPU).
        next_strategy: what to go on with; None if nothing needs less.
        restarts: whether the config asks to go on with it (`on_oom: next`).
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
        self.next_strategy = next_strategy
        self.restarts = restarts


class Interrupted(BaseException):
    """Stopped by a signal at a step boundary, with a checkpoint if one could be written.

    No `Exception`: a script that goes on after a failed training must end here. What `launcher.fit` and `train` raise
    is a `SystemExit`, too, and a `KeyboardInterrupt` after Ctrl-C.

    Attributes:
        signal_number: the signal.
        checkpoint: path of what was saved, if anything was.
        step: optimizer steps done.
        exit_code: what the process ends with.
        users_handler: calls the script's own handler of the signal; None if it has none.
    """

    def __init__(self, signal_number: int, *, checkpoint: str | None, step: int) -> None:
        super().__init__(f"stopped by signal {signal_number} after step {step}")
        self.signal_number = signal_number
        self.checkpoint = checkpoint
        self.step = step
        self.exit_code = self.code = 128 + signal_number
        self.users_handler: Callable[[], Any] | None = None

    def for_script(self) -> Interrupted:
        """The same, which ends a script as Python's own would. Lightning inside would take it for something else."""
        kind = _InterruptedByCtrlC if self.signal_number == signal.SIGINT else _InterruptedBySignal
        return kind(self.signal_number, checkpoint=self.checkpoint, step=self.step)


class _InterruptedBySignal(Interrupted, SystemExit):
    pass


class _InterruptedByCtrlC(Interrupted, KeyboardInterrupt, SystemExit):
    """A `SystemExit` as well: exit code 130 without a traceback from every rank."""
