"""Job requests with sbatch's option names, and their checks. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

# Text options: pattern of valid texts, and help. White space, quotes and line ends are never valid: the texts are
# written into comment lines of a shell script, and a shell would run the text after a line end.
_NAMES = r"[A-Za-z0-9_.,:@%+/=-]+"
_TEXT_OPTIONS: Mapping[str, tuple[str, str]] = {
    "partition": (_NAMES, "a partition's name, or several with commas"),
    "account": (_NAMES, "an account's name"),
    "qos": (_NAMES, "a quality of service"),
    "reservation": (_NAMES, "a reservation's name"),
    "constraint": (r"[A-Za-z0-9_.,:@=*&|!()\[\]+-]+", "node features, as in a100|h100"),
    "mem": (r"\d+[KMGTkmgt]?[Bb]?", "memory of each node, as in 64G; a number without a unit is in MB; 0 is all of it"),
    "exclude": (r"[A-Za-z0-9_.,\[\]-]+", "nodes to exclude, as in n[01-03]"),
    "nodelist": (r"[A-Za-z0-9_.,\[\]-]+", "nodes to use, as in n[01-03]"),
    "dependency": (r"[A-Za-z0-9_,:?+]+", "jobs to wait for, as in afterok:123"),
    "mail-type": (r"[A-Z0-9_,]+", "events to mail about, as in END,FAIL"),
    "mail-user": (r"[A-Za-z0-9_.+@-]+", "address for these mails"),
}
_COUNT_OPTIONS: Mapping[str, tuple[int, str]] = {
    "nodes": (1, "number of nodes (default 1)"),
    "gpus-per-node": (1, "GPUs, and ranks, on each node"),
    "cpus-per-task": (1, "CPU cores on each node: its one task starts all ranks of the node"),
    "signal-delay": (1, "seconds before the end at which SLURM warns the job, which then saves (default 120)"),
}
_OTHER_OPTIONS: Mapping[str, str] = {
    "time": "time limit of one attempt, as in 30, 12:00:00 or 2-00:00:00; a longer training is requeued",
    "signal": "the warning: USR1 or USR2 (default; NCCL may take USR1)",
}
_EXPORTED = {"HOME", "LANG", "LANGUAGE", "LD_LIBRARY_PATH", "LIBRARY_PATH", "LOADEDMODULES", "LOGNAME", "MODULEPATH",
             "PATH", "SHELL", "TERM", "TZ", "USER", "VIRTUAL_ENV"}  # fmt: skip
_EXPORTED_PREFIXES = (
    "CONDA_", "CUDA_", "CUDNN_", "DEEPSPEED_", "DS_", "FI_", "GLOO_", "HF_", "KMP_", "LC_", "MAMBA_", "MKL_", "NCCL_",
    "NVIDIA_", "NVTE_", "OMP_", "PYTHON", "PYTORCH_", "SSL_CERT_", "TORCH", "TRITON_", "UCX_", "WANDB_", "XLA_",
)  # fmt: skip
# SLURM and the agent set these on each node.
_NEVER_EXPORTED = {"CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "PYTHONHOME"}
SIGNALS = ("USR1", "USR2")
DEFAULT_SIGNAL_DELAY = 120


@dataclass(frozen=True, slots=True)
class OptionProblem:
    """One wrong option: sbatch's name without dashes, and a message with the given and the valid values."""

    option: str
    message: str


class JobRequestError(ValueError):
    """Every wrong option of a job."""

    def __init__(self, problems: Iterable[OptionProblem]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(f"--{p.option}: {p.message}" for p in self.problems))


@dataclass(frozen=True, slots=True)
class SlurmJob:
    """One job; the attributes are sbatch's options.

    Attributes:
        nodes: number of nodes; each has one task, which starts the ranks.
        time: limit of one attempt in minutes; None for the partition's limit.
        signal: name of the warning, without SIG.
        signal_delay: seconds between the warning and the end.
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


def list_job_options() -> dict[str, str]:
    """Every option of a job: sbatch's name, and a line of help."""
    named = {name: text for name, (_, text) in (*_COUNT_OPTIONS.items(), *_TEXT_OPTIONS.items())}
    return {**named, **_OTHER_OPTIONS}


def read_job(name: str, given: Mapping[str, str | None], environment: Iterable[str] = ()) -> SlurmJob:
    """Read the options of a job: sbatch's name to text, or to None if the option was not given.

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
        # Nine digits fit every field of SLURM.
        if not re.fullmatch(r"\d{1,9}", text, re.ASCII) or int(text) < minimum:
            return OptionProblem(option, f"given {text!r}; expected a whole number of at least {minimum}")
        return int(text)
    if option in _TEXT_OPTIONS:
        pattern, meaning = _TEXT_OPTIONS[option]
        if not re.fullmatch(pattern, text, re.ASCII):
            return OptionProblem(option, f"given {text!r}; expected {meaning}")
        return text
    if option == "time":
        minutes = read_minutes(text)
        return minutes or OptionProblem(option, f"given {text!r}; expected {_OTHER_OPTIONS[option]}")
    if option == "signal":
        name = text.removeprefix("SIG")
        return name if name in SIGNALS else OptionProblem(option, f"given {text!r}; expected {' or '.join(SIGNALS)}")
    raise ValueError(f"unknown option: {option}")


def read_minutes(text: str) -> int | None:
    """Read a time limit in one of sbatch's forms as minutes, seconds rounded up as sbatch does; None if it is invalid.

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


def select_exported_names(present: Iterable[str], more: Iterable[str] = ()) -> tuple[str, ...]:
    """Sorted names of the variables that a job gets: the known ones of the submitting shell, and `more`.

    sbatch exports by name, so the script contains no value.
    """
    # torchelastic's variables are those of a rank.
    known = {name for name in present if name in _EXPORTED or name.startswith(_EXPORTED_PREFIXES)}
    known -= _NEVER_EXPORTED | {name for name in known if name.startswith("TORCHELASTIC_")}
    return tuple(sorted(known | set(more)))


def find_contradictions(
    job: SlurmJob, *, devices: int | None, num_nodes: int | None, global_batch_size: int | None
) -> list[OptionProblem]:
    """Every contradiction between the job and the settings of the config; None for those that are not set."""
    problems: list[OptionProblem] = []
    if job.gpus_per_node is not None and devices not in (None, job.gpus_per_node):
        message = f"given {job.gpus_per_node}, but devices is {devices}; leave out one of them"
        problems.append(OptionProblem("gpus-per-node", message))
    if num_nodes not in (None, job.nodes):
        message = f"given {job.nodes}, but num_nodes is {num_nodes}; leave out num_nodes"
        problems.append(OptionProblem("nodes", message))
    ranks = count_ranks(job, devices) * job.nodes
    if global_batch_size is not None and global_batch_size % ranks:
        below = global_batch_size // ranks * ranks
        nearest = " or ".join(str(size) for size in (below, below + ranks) if size)
        message = f"{job.nodes} nodes x {ranks // job.nodes} ranks = {ranks} ranks, and global_batch_size "
        message += f"{global_batch_size} is not divisible by {ranks}; the nearest valid sizes: {nearest}"
        problems.append(OptionProblem("nodes", message))
    # submitit and SLURM check the time about once a minute.
    if job.time is not None and job.time * 60 <= job.signal_delay:
        message = f"{job.time} min is not more than the {job.signal_delay} s of --signal-delay, in which the job saves"
        problems.append(OptionProblem("time", f"{message}; give more time, or a smaller --signal-delay"))
    return problems


def count_ranks(job: SlurmJob, devices: int | None) -> int:
    """Ranks on each node: one for each GPU, or `devices` of the config, or one."""
    return job.gpus_per_node or devices or 1
