"""`launcher doctor --nodes N` and `--nproc-per-node K`: runs a preflight and reads its results."""

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
from launcher.doctor.finding import Finding
from launcher.doctor.preflight_findings import NodeResult, RankResult, preflight_findings
from launcher.doctor.preflight_node import RANK_COMMAND, NodeRequest, run_node
from slurm.job import JobRequestError, list_job_options, read_job
from slurm.step import make_step_arguments

# Options of sbatch that srun has too.
_OPTIONS = ("partition", "account", "qos", "reservation", "constraint", "mem", "exclude", "nodelist", "gpus-per-node",
            "cpus-per-task", "time")  # fmt: skip
_Result = TypeVar("_Result")


def add_preflight_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a preflight."""
    title = "preflight: a matmul on every rank, an all-reduce, an exchange, the clocks"
    group = parser.add_argument_group(title)
    group.add_argument("--nodes", "-N", type=_parse_positive, metavar="N",
                       help="run it on N nodes of the SLURM cluster, with srun")  # fmt: skip
    group.add_argument("--nproc-per-node", type=_parse_positive, metavar="K",
                       help="ranks on each node, or here without --nodes (default: one for each GPU)")  # fmt: skip
    group.add_argument("--slow-factor", type=_parse_factor, default=1.5, metavar="F",
                       help="report a rank that is F times slower than the median (default 1.5)")  # fmt: skip
    group.add_argument("--timeout", type=_parse_positive, default=120, metavar="S",
                       help="seconds that nodes and ranks wait for each other (default 120)")  # fmt: skip
    group.add_argument("--cpu", action="store_true", help="use the CPU only")
    group.add_argument("--interface", metavar="NAME", help="network interface of the nodes")
    group.add_argument("--wait", type=_parse_positive, default=300, metavar="S",
                       help="seconds to wait for free nodes (default 300)")  # fmt: skip
    slurm = parser.add_argument_group("preflight on SLURM: options of srun")
    texts = list_job_options()
    for name in _OPTIONS:
        text = "time limit of the preflight (default 5 minutes)" if name == "time" else texts[name]
        slurm.add_argument(f"--{name}", dest=f"slurm_{name}", metavar="X", help=text)


def preflight(options: argparse.Namespace, rank_command: Sequence[str] = RANK_COMMAND) -> Iterator[Finding]:
    """Run the preflight that the options request; without them, run nothing. `rank_command` runs a rank here.

    Raises:
        SubmitError: an option is invalid, or this machine has no SLURM.
        QueueError: srun started nothing; contains its message.
    """
    if options.nodes is None and options.nproc_per_node is None:
        return
    job = _make_job(options)
    # In the working directory, which the nodes share; /tmp is local to a node.
    where = None if options.nodes is None else Path.cwd()
    try:
        folder = Path(tempfile.mkdtemp(prefix=".launcher-preflight-", dir=where))
    except OSError as error:
        advice = "run it from a writable folder that all nodes share"
        raise SubmitError([Problem("--nodes", f"{where}: {error.strerror or error}; {advice}")]) from error
    nodes = options.nodes or 1
    request = NodeRequest(str(folder), nodes, options.nproc_per_node, options.timeout, options.interface, options.cpu)
    try:
        if options.nodes is None:
            run_node(request, 0, rank_command)
        else:
            command = module_command("launcher.doctor.preflight_node", json.dumps(dataclasses.asdict(request)))
            arguments = make_step_arguments(job, command, options.wait, os.environ)
            _run_step(arguments, folder, options.wait + 60 * (job.time or 5))
        node_results = _read_results(folder, "node", NodeResult.from_dict)
        rank_results = _read_results(folder, "rank", RankResult.from_dict)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    yield from preflight_findings(node_results, rank_results, nodes, options.slow_factor)


def _make_job(options: argparse.Namespace) -> Any:
    """The job for srun; the error lists every invalid option."""
    given: dict[str, str | None] = {name: getattr(options, f"slurm_{name}") for name in _OPTIONS}
    problems: list[Problem] = []
    job = None
    try:
        job = read_job("launcher-preflight", {**given, "time": given["time"] or "5", "nodes": str(options.nodes or 1)})
    except JobRequestError as error:
        problems += [Problem(f"--{p.option}", p.message) for p in error.problems]
    if options.nodes is None:
        problems += [Problem(f"--{name}", "given without --nodes; it is an option of SLURM, so add --nodes N")
                     for name, value in given.items() if value is not None]  # fmt: skip
    elif shutil.which("srun") is None:
        problems.append(Problem("--nodes", "given, but this machine has no srun; run it on the login node of the "
                                "cluster, or use --nproc-per-node without --nodes for this machine"))  # fmt: skip
    if problems:
        raise _PreflightError(problems)
    return job


class _PreflightError(SubmitError):
    """Options of a preflight are invalid or contradict each other; nothing was started."""

    what = "no preflight was started: the command line"


def _run_step(arguments: Sequence[str], folder: Path, timeout: float) -> None:
    """Run srun to its end.

    Raises:
        QueueError: no node has written a result; contains the message of srun.
    """
    # In a new session: srun itself ignores the first Ctrl-C.
    with subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, errors="replace", start_new_session=True) as step:  # fmt: skip
        try:
            output, _ = step.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            step.terminate()
            output = f"no end within {timeout:g} s"
        except BaseException:  # Ctrl-C must end the job too; raised again
            step.terminate()
            raise
    if not any(folder.glob("node-*.json")):
        reason = output.strip() or f"exit code {step.returncode}"
        raise QueueError(f"srun started nothing: {reason}; check free nodes with `sinfo`, wait longer with --wait, or "
                         "request other nodes with --partition and --nodes")  # fmt: skip


def _read_results(folder: Path, kind: str, make: Callable[[Mapping[str, Any]], _Result]) -> list[_Result]:
    """The results of one kind; incomplete files are skipped."""
    # NFS clients cache the list of a folder; `glob` opens the folder, which refreshes it.
    found: list[_Result] = []
    for file in sorted(folder.glob(f"{kind}-*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found.append(make(json.loads(file.read_text())))
    return found


def _parse_positive(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 10**6:
        raise argparse.ArgumentTypeError(f"given {text!r}; expected an integer of at least 1")
    return int(text)


def _parse_factor(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 1 < (value := float(text)) < 1e6:
            return value
    raise argparse.ArgumentTypeError(f"given {text!r}; expected a number above 1")
