"""`SlurmJob`: what a job asks of SLURM, under sbatch's own option names, as a frozen record."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

# Options whose value is text, with what it may look like. No white space, quotes or line ends anywhere: the values go
# into comment lines of a shell script, and what follows a line end there would be run.
_WORDS = r"[A-Za-z0-9_.,:@%+/=-]+"
_TEXT_OPTIONS: Mapping[str, tuple[str, str]] = {
    "partition": (_WORDS, "a partition's name, or several with commas"),
    "account": (_WORDS, "an account's name"),
    "qos": (_WORDS, "a quality of service"),
    "reservation": (_WORDS, "a reservation's name"),
    "constraint": (r"[A-Za-z0-9_.,:@=*&|!()\[\]+-]+", "node features, as in a100|h100"),
    "mem": (r"\d+[KMGTkmgt]?[Bb]?", "memory of each node, as in 64G; 0 is all of it"),
    "exclude": (r"[A-Za-z0-9_.,\[\]-]+", "nodes to keep out, as in n[01-03]"),
    "nodelist": (r"[A-Za-z0-9_.,\[\]-]+", "nodes to take, as in n[01-03]"),
    "dependency": (r"[A-Za-z0-9_,:?+]+", "jobs to wait for, as in afterok:123"),
    "mail-type": (r"[A-Z0-9_,]+", "when to write, as in END,FAIL"),
    "mail-user": (r"[A-Za-z0-9_.+@-]+", "whom to write to"),
}
_COUNT_OPTIONS: Mapping[str, tuple[int, str]] = {
    "nodes": (1, "number of nodes (default 1)"),
    "gpus-per-node": (1, "GPUs, and ranks, on each node"),
    "cpus-per-task": (1, "CPU cores on each node: one task a node makes all its ranks"),
    "signal-delay": (1, "seconds before the end at which the job is warned, to save (default 120)"),
}
_OTHER_OPTIONS: Mapping[str, str] = {
    "time": "longest time of one attempt, as in 30, 12:00:00 or 2-00:00:00; a longer training is requeued",
    "signal": "the warning: USR1 or USR2 (default; NCCL may take USR1)",
}
SIGNALS = ("USR1", "USR2")
DEFAULT_SIGNAL_DELAY = 120


@dataclass(frozen=True, slots=True)
class OptionProblem:
    """One option that is wrong.

    Attributes:
        option: sbatch's name, without dashes.
        message: what was given, what was expected.
    """

    option: str
    message: str


class JobRequestError(ValueError):
    """Every wrong option of a job.

    Attributes:
        problems: at least one.
    """

    def __init__(self, problems: Iterable[OptionProblem]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(f"--{p.option}: {p.message}" for p in self.problems))


@dataclass(frozen=True, slots=True)
class SlurmJob:
    """One job; the attributes are sbatch's options.

    Attributes:
        name: the job's and the run's name.
        nodes: number of nodes; each has one task, which makes the ranks.
        gpus_per_node: GPUs on each node, None for a job without.
        cpus_per_task: cores on each node.
        time: longest time of one attempt, in minutes; None leaves it to the partition.
        signal: name of the warning, without SIG.
        signal_delay: seconds that the job has to save after it.
        environment: names of the variables that the job gets from the submitting shell.
    """

    name: str
    nodes: int = 1
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    time: int | None = None
    mem: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    reservation: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    nodelist: str | None = None
    dependency: str | None = None
    mail_type: str | None = None
    mail_user: str | None = None
    signal: str = "USR2"
    signal_delay: int = DEFAULT_SIGNAL_DELAY
    environment: tuple[str, ...] = ()


def job_options() -> dict[str, str]:
    """Every option of a job: sbatch's name to a line of help."""
    named = {name: text for name, (_, text) in (*_COUNT_OPTIONS.items(), *_TEXT_OPTIONS.items())}
    return {**named, **_OTHER_OPTIONS}


def read_job(name: str, given: Mapping[str, str | None], environment: Iterable[str] = ()) -> SlurmJob:
    """Make a job of the options' texts.

    Args:
        name: of the job; checked already, as it is a run's.
        given: sbatch's option name to text; None or missing where it was not given.
        environment: names of variables to hand on.

    Raises:
        JobRequestError: lists every option that is wrong.
    """
    texts = {option: text for option, text in given.items() if text is not None}
    problems: list[OptionProblem] = []
    values: dict[str, int | str] = {}
    for option, text in texts.items():
        value = _read(option, text)
        if isinstance(value, OptionProblem):
            problems.append(value)
        else:
            values[option.replace("-", "_")] = value
    names = tuple(sorted(set(environment)))
    problems += [OptionProblem("export-env", f"given {variable!r}; expected a variable's name")
                 for variable in names if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable)]  # fmt: skip
    if problems:
        raise JobRequestError(problems)
    known = {field.name: values[field.name] for field in fields(SlurmJob) if field.name in values}
    return SlurmJob(name=name, environment=names, **known)  # type: ignore[arg-type] -- read by option


def _read(option: str, text: str) -> int | str | OptionProblem:
    if option in _COUNT_OPTIONS:
        minimum = _COUNT_OPTIONS[option][0]
        # Nine digits are more than any cluster has, and few enough for every field of SLURM's.
        if not re.fullmatch(r"\d{1,9}", text, re.ASCII) or int(text) < minimum:
            return OptionProblem(option, f"given {text!r}; expected a whole number of at least {minimum}")
        return int(text)
    if option in _TEXT_OPTIONS:
        pattern, meaning = _TEXT_OPTIONS[option]
        if not re.fullmatch(pattern, text, re.ASCII):
            return OptionProblem(option, f"given {text!r}; expected {meaning}")
        return text
    if option == "time":
        minutes = minutes_of(text)
        return minutes or OptionProblem(option, f"given {text!r}; expected {_OTHER_OPTIONS[option]}")
    if option == "signal":
        name = text.removeprefix("SIG")
        return name if name in SIGNALS else OptionProblem(option, f"given {text!r}; expected {' or '.join(SIGNALS)}")
    raise ValueError(f"no such option: {option}")


def minutes_of(text: str) -> int | None:
    """Read sbatch's forms of a time as minutes, seconds rounded up as sbatch does; None for anything else.

    Forms: minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes, days-hours:minutes:seconds.
    """
    found = re.fullmatch(r"(?:(\d{1,5})-)?(\d{1,7})(?::(\d{1,2}))?(?::(\d{1,2}))?", text, re.ASCII)
    if found is None:
        return None
    days, numbers = found[1], [int(part) for part in found.groups()[1:] if part is not None]
    if days is not None:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:
        hours, (minutes, seconds) = 0, [*numbers, 0][:2]
    return (int(days or 0) * 24 + hours) * 60 + minutes + -(-seconds // 60)
