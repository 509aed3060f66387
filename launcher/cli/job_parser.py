"""The command lines of `submit`, `status`, `logs` and `cancel`. Imports nothing heavy."""

from __future__ import annotations

import argparse

from slurm.job import job_options

JOB_COMMANDS = {
    "submit": "queue the run on SLURM, or start it in the background here",
    "status": "how runs are getting on, across requeues",
    "logs": "what a rank of a run has said",
    "cancel": "end a run; its ranks save first",
}
_SUBMIT_EPILOG = """\
settings of the run are given as to `launcher fit`: --model my_pkg.MyModule --trainer.max_epochs 3 --precision auto

SLURM warns the job before its time is up or a preemption (--signal-delay): all ranks save at one step, the job is
queued again and goes on with the next step, in the same run directory and W&B run.

exit codes:
  0 queued   2 refused before anything was queued   1 SLURM did not take it
"""


def build_job_parser(command: str) -> argparse.ArgumentParser:
    """The parser of one of `JOB_COMMANDS`."""
    parser = argparse.ArgumentParser(
        f"launcher {command}",
        description=JOB_COMMANDS[command],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    {"submit": _submit, "status": _status, "logs": _logs, "cancel": _cancel}[command](parser)
    parser.add_argument("--debug", action="store_true", help="show tracebacks of usage errors too")
    return parser


def _submit(parser: argparse.ArgumentParser) -> None:
    parser.usage = "launcher submit [options] [--key value ...]"
    parser.epilog = _SUBMIT_EPILOG
    parser.add_argument("--config", "-c", action="append", default=[], metavar="FILE",
                        help="YAML or JSON; a later file overrides an earlier one")  # fmt: skip
    parser.add_argument("--cluster", choices=("slurm", "local"), default="slurm",
                        help="slurm, or local: in the background on this machine")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print the batch script and the plan; queue nothing")
    parser.add_argument("--no-snapshot", action="store_true",
                        help="run the code as it is when the job starts, not as it is now")  # fmt: skip
    parser.add_argument("--export-env", action="append", default=[], metavar="NAME",
                        help="hand on this variable too, by its name; once for each")  # fmt: skip
    parser.add_argument("--interface", metavar="NAME",
                        help="network interface of the nodes (default: by which they reach each other)")  # fmt: skip
    parser.add_argument("--max-fruitless", type=int, default=3, metavar="N",
                        help="attempts in a row that saved no step before the job is given up (default 3)")  # fmt: skip
    parser.add_argument("--join-timeout", type=float, default=600.0, metavar="SECONDS",
                        help="how long the nodes wait for each other (default 600)")  # fmt: skip
    parser.add_argument("--sweep", action="append", default=[], metavar="KEY=V,V,...|FILE",
                        help="a run for each value, or each entry of a file's list; several make a grid")  # fmt: skip
    parser.add_argument("--array", metavar="0-3%%2", help="which members of the sweep, and how many at once")
    group = parser.add_argument_group("SLURM, with sbatch's names")
    for name, text in job_options().items():
        letter = {"partition": ["-p"], "account": ["-A"], "qos": ["-q"], "nodes": ["-N"], "time": ["-t"]}.get(name, [])
        group.add_argument(f"--{name}", *letter, dest=f"slurm_{name}", metavar="X", help=text)


def _status(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="?", metavar="RUN", help="name of one run or sweep (default: all runs)")
    parser.add_argument("--watch", action="store_true", help="again every few seconds, until Ctrl-C or the end")
    parser.add_argument("--json", action="store_true", help="for programs")
    _runs_dir(parser)


def _logs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="name of the run")
    parser.add_argument("--rank", type=int, default=0, metavar="R", help="whose (default 0)")
    parser.add_argument("--follow", "-f", action="store_true", help="and what it says from now on, until the end")
    _runs_dir(parser)


def _cancel(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="name of the run or sweep")
    _runs_dir(parser)


def _runs_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs_dir", "--runs-dir", default="runs", metavar="FOLDER", help="of the runs (default runs)")
