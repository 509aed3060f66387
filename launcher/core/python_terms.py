"""Messages about options of the command line, in the terms of `TrainingCoordinator`.

Messages below the command line name its options. `TrainingCoordinator` translates them before a user of Python reads
them; the options of other programs (srun, torchrun) stay.
"""

from __future__ import annotations

import re

from launcher.core.errors import (
    CallError,
    ConfigError,
    LateUsageError,
    LauncherError,
    OutOfMemoryError,
    Problem,
    UsageError,
)


def _compile(*pairs: tuple[str, str]) -> tuple[tuple[re.Pattern[str], str], ...]:
    return tuple((re.compile(pattern), text) for pattern, text in pairs)


_TERMS = _compile(
    (r"`launcher fit --help` lists all keys", "`help(TrainingCoordinator)` lists the arguments"),
    (r"give an argument of a class below the class, as in --\S+ \S+", "give it to the class of the model or data"),
    (r"give --data my_pkg\.MyData\b", "give datamodule"),
    (r"give --devices (\S+)", r"give TrainingCoordinator(devices=\1)"),
    (r"write --(\S+)", r"only commands have it, as \1"),
    (r"--resume-trust\b", "TrainingCoordinator(resume_trust=True)"),
    (r"--resume auto\b", 'train(resume_from_checkpoint="auto")'),
    (r"--resume none\b", "train(resume_from_checkpoint=None)"),
    (r"--resume PATH\b", "train(resume_from_checkpoint=PATH)"),
    (r"another --name\b", "another name with train(name=...)"),
    (r"--name(?: NAME| NEW)?(?![\w-])", "train(name=...)"),
    (r"--runs-dir(?: DIR)?(?![\w-])", "TrainingCoordinator(output_dir=...)"),
    (r"--trainer\.(\w+)(?: \w+)?", r"train(\1=...)"),
    (r"(?<![\w.])trainer\.(\w+)", r"\1"),
    (r"(?<![\w./])runs_dir\b", "output_dir"),
)
# Names of types in what is expected.
_TYPES = _compile(
    (r"\btrue or false\b", "True or False"),
    (r"\bnull\b", "None"),
    (r"\ba mapping\b", "a dict"),
    (r"\btext\b", "a str"),
)
# Keys of the config with another name in Python.
ARGUMENT_NAMES = {"runs_dir": "output_dir", "resume": "resume_from_checkpoint", "accelerator": "use_gpu"}


def to_python_terms(text: str) -> str:
    """A message of the launcher with arguments of `TrainingCoordinator` instead of options."""
    for pattern, replacement in _TERMS:
        text = pattern.sub(replacement, text)
    return text


def to_python_problem(problem: Problem) -> Problem:
    """A problem of a config's key as one of an argument."""
    path = ARGUMENT_NAMES.get(problem.path, problem.path.removeprefix("trainer."))
    given, separator, expected = problem.message.rpartition("; expected ")
    for pattern, replacement in _TYPES if separator else ():
        expected = pattern.sub(replacement, expected)
    return Problem(path, to_python_terms(f"{given}{separator}{expected}"))


def to_python_error(error: LauncherError) -> LauncherError:
    """The same error with a message in the terms of Python; a message of the user's code is not changed."""
    if type(error) is ConfigError:
        return CallError(map(to_python_problem, error.problems)).with_traceback(error.__traceback__)
    if isinstance(error, UsageError | LateUsageError | OutOfMemoryError) and error.args:
        error.args = (to_python_terms(str(error)), *error.args[1:])
    return error
