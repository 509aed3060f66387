"""`launcher doctor --nodes N` and `--nproc-per-node K`: starts a preflight and reads what it left."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from launcher.core.errors import Problem, QueueError, SubmitError
from launcher.core.own_modules import module_command
from launcher.doctor.command import Finding
from launcher.doctor.preflight_findings import NodeResult, RankResult, preflight_findings
from launcher.doctor.preflight_node import RANK_COMMAND, NodeRequest, run_node
from slurm.job import JobRequestError, list_job_options, read_job
from slurm.step import make_step_arguments

# What srun takes too, of sbatch's options.
_OPTIONS = ("partition", "account", "qos", "reservation", "constraint", "mem", "exclude", "nodelist", "gpus-per-node",
            "cpus-per-task", "time")  # fmt: skip
_Result = TypeVar("_Result")


def add_preflight_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a preflight."""
    group = parser.add_argument_group("preflight: a matmul on every rank, an all-reduce, the clocks")
    group.add_argument("--nodes", "-N", type=_positive, metavar="N", help="on N nodes of the SLURM cluster, by srun")
    group.add_argument("--nproc-per-node", type=_positive, metavar="K",
                       help="ranks on each node, or here without --nodes (default: one for each GPU)")  # fmt: skip
    group.add_argument("--slow-factor", type=_factor, default=1.5, metavar="F",
                       help="against the median, from which on a rank is named (default 1.5)")  # fmt: skip
    group.add_argument("--timeout", type=_positive, default=120, metavar="S",
                       help="seconds that nodes and ranks wait for each other (default 120)")  # fmt: skip
    group.add_argument("--cpu", action="store_true", help="leave GPUs alone")
    group.add_argument("--interface", metavar="NAME", help="network interface of the nodes")
    group.add_argument("--wait", type=_positive, default=300, metavar="S",
                       help="seconds to wait for free nodes (default 300)")  # fmt: skip
    slurm = parser.add_argument_group("preflight on SLURM, with srun's names")
    texts = list_job_options()
    for name in _OPTIONS:
        text = "longest time of the preflight (default 5 minutes)" if name == "time" else texts[name]
        slurm.add_argument(f"--{name}", dest=f"slurm_{name}", metavar="X", help=text)


def preflight(options: argparse.Namespace, rank_command: Sequence[str] = RANK_COMMAND) -> Iterator[Finding]:
    """Run the preflight that the options ask for; nothing without them.

    Args:
        options: of `add_preflight_arguments`.
        rank_command: what runs a rank on this machine.

    Raises:
        SubmitError: an option is wrong, or there is no SLURM here.
        QueueError: srun started nothing; its own words.
    """
    if options.nodes is None and options.nproc_per_node is None:
        return
    given = {name: getattr(options, f"slurm_{name}") for name in _OPTIONS}
    job = _job(options, given)
    # Beside the user's own files: a disk that the nodes share; /tmp is none.
    where = None if options.nodes is None else Path.cwd()
    try:
        folder = Path(tempfile.mkdtemp(prefix=".launcher-preflight-", dir=where))
    except OSError as error:
        advice = "run it from a folder where you may write, and that all nodes see"
        raise SubmitError([Problem("--nodes", f"{where}: {error.strerror or error}; {advice}")]) from error
    nodes = options.nodes or 1
    request = NodeRequest(str(folder), nodes, options.nproc_per_node, options.timeout, options.interface, options.cpu)
    try:
        if options.nodes is None:
            run_node(request, 0, rank_command)
        else:
            command = module_command("launcher.doctor.preflight_node", json.dumps(dataclasses.asdict(request)))
            _run_step(
                make_step_arguments(job, command, options.wait, os.environ), folder, options.wait + 60 * (job.time or 5)
            )
        found = _read(folder, "node", NodeResult.from_dict), _read(folder, "rank", RankResult.from_dict)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    yield from preflight_findings(*found, nodes, options.slow_factor)


def _job(options: argparse.Namespace, given: Mapping[str, str | None]) -> Any:
    """What srun is asked for; says every option that is wrong at once."""
    problems: list[Problem] = []
    job = None
    try:
        job = read_job("launcher-preflight", {**given, "time": given["time"] or "5", "nodes": str(options.nodes or 1)})
    except JobRequestError as error:
        problems += [Problem(f"--{p.option}", p.message) for p in error.problems]
    if options.nodes is None:
        problems += [Problem(f"--{name}", "given without --nodes; it is an option of SLURM's, so add --nodes N")
                     for name, value in given.items() if value is not None]  # fmt: skip
    elif shutil.which("srun") is None:
        problems.append(Problem("--nodes", "given, but there is no srun on this machine; go to the cluster's login "
                                "node, or use --nproc-per-node alone for this machine"))  # fmt: skip
    if problems:
        raise _PreflightError(problems)
    return job


class _PreflightError(SubmitError):
    """Options of a preflight that are wrong or contradict each other; nothing was started."""

    what = "no preflight was started: the command line"


def _run_step(words: Sequence[str], folder: Path, timeout: float) -> None:
    """Run srun to its end; its own words if no node has said anything.

    Raises:
        QueueError: it started nothing.
    """
    # In a session of its own: at the first Ctrl-C srun would only ask whether it is meant.
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          errors="replace", start_new_session=True) as step:  # fmt: skip
        try:
            said, _ = step.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            step.terminate()
            said = f"no end within {timeout:g} s"
        except BaseException:  # Ctrl-C too takes the job along; raised on
            step.terminate()
            raise
    if not any(folder.glob("node-*.json")):
        raise QueueError(
            f"srun started nothing: {said.strip() or f'exit code {step.returncode}'}; `sinfo` shows what is free; "
            "--wait waits longer, --partition and --nodes ask for other nodes"
        )


def _read(folder: Path, kind: str, make: Callable[[Mapping[str, Any]], _Result]) -> list[_Result]:
    """The results of one kind; what is not whole is left out."""
    # NFS clients remember a folder's old list; opening it makes them ask again.
    found: list[_Result] = []
    for file in sorted(folder.glob(f"{kind}-*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found.append(make(json.loads(file.read_text())))
    return found


def _positive(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 10**6:
        raise argparse.ArgumentTypeError(f"given {text!r}; expected a whole number of at least 1")
    return int(text)


def _factor(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 < value < 1e6:
        raise argparse.ArgumentTypeError(f"given {text!r}; expected a number above 1")
    return value
