"""What the ranks of this node run and how they are started: one frozen record, made from a config or from arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launcher.agent.failure_report import RankOutcome, format_failure_report
from launcher.agent.rank_main import RankCommand
from launcher.agent.rank_output import RankOutput
from launcher.agent.restart_policy import RestartDecision
from launcher.config.launch_options import LaunchOptions
from launcher.core.wrapping import print_message
from launcher.hardware.cpus import count_usable_cpus

FailureReporter = Callable[[RankOutcome, Sequence[RankOutcome], RestartDecision], None]


def share_cores(ranks: int) -> dict[str, str]:
    """Environment variables that divide this machine's cores among the ranks."""
    # torch and numpy read it on import.
    return {"OMP_NUM_THREADS": str(max(1, count_usable_cpus() // ranks))}


def print_failure(first: RankOutcome, outcomes: Sequence[RankOutcome], decision: RestartDecision) -> None:
    """Write the failure report to stderr."""
    print_message(format_failure_report(first, outcomes, decision.reason))


@dataclass(frozen=True, slots=True)
class StartRequest:
    """One start of this node's ranks.

    Attributes:
        command: what every rank runs.
        options: rendezvous, restarts, hang limit and terminal output.
        estimated_ranks: a guess that imports nothing, with which the fork server starts early.
        count_ranks: the true number of ranks on this node; may import torch.
        list_modules: the modules that the fork server imports: libraries, then `USER_MODULES`, then packages whose
            import may not survive a fork. Called with the environment of the ranks.
        make_variables: number of ranks to environment variables of the ranks; those that the user has set stay.
        always_has_agent: whether one rank that cannot be restarted has an agent too; otherwise `start_ranks` returns
            None for it, and the calling process is that rank.
        output: copies the ranks' output to log files and the terminal; None if they write to the agent's streams.
        is_plain: whether the ranks run code that does not know the launcher: one that returns 0 after a signal has
            saved and stopped rather than finished, and after a failure the others get SIGTERM at once.
        record_directory: run directory in which missing nodes are recorded, if it exists.
        exit_timeout: seconds that the other ranks have to end by themselves after a failure.
        report_stop_begin: gets a signal and the seconds that plain code has to end, if it has not ended at once.
        report_stop: gets how the ranks ended after a signal.
        report_failure: gets the first failure of an attempt, how all known ranks ended, and the restart decision.
    """

    command: RankCommand
    options: LaunchOptions
    estimated_ranks: int
    count_ranks: Callable[[], int]
    list_modules: Callable[[], Sequence[str]]
    make_variables: Callable[[int], Mapping[str, str]] = field(default=share_cores)
    always_has_agent: bool = False
    output: RankOutput | None = None
    is_plain: bool = False
    record_directory: Path | None = None
    exit_timeout: float = 10.0
    report_stop_begin: Callable[[int, float], None] = lambda number, seconds: None
    report_stop: Callable[[Sequence[RankOutcome]], None] = lambda outcomes: None
    report_failure: FailureReporter = field(default=print_failure)

    @property
    def has_agent(self) -> bool:
        """Whether one rank has an agent: it may be restarted, or other nodes take part."""
        return self.always_has_agent or self.options.several_nodes or self.options.max_restarts > 0
