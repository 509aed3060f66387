"""The agent of one node: starts the ranks, monitors them, decides after a failure or a signal, forwards signals.

torch's `LocalElasticAgent` provides the rendezvous, the ranks' environment and their processes. This subclass replaces
its start of an attempt and its monitoring step.
"""

from __future__ import annotations

import inspect
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousHandler

from launcher.agent.agent_report import AgentReport
from launcher.agent.failure_evidence import FailureEvidence
from launcher.agent.failure_report import RankOutcome, find_first_failure, has_failed_at_stop, to_shell_exit_code
from launcher.agent.fork_server import StartMethod
from launcher.agent.node_exchange import NodeExchange
from launcher.agent.rank_inspector import RankInspector, RankProcess
from launcher.agent.rank_main import RankTask, run_rank
from launcher.agent.rank_processes import AttemptProcesses
from launcher.agent.rendezvous import describe_lost_store
from launcher.agent.restart_policy import RestartDecision
from launcher.agent.restarts import RestartTracker, record_out_of_memory
from launcher.agent.signals import AgentSignals, AgentStopped
from launcher.agent.start_request import StartRequest
from launcher.agent.stopping import SAVE_TIMEOUT, AttemptStop
from launcher.core.wrapping import print_message
from launcher.process.titles import set_title

# Seconds between two checks with one node and with several. The agent notices the end of a rank immediately.
_MONITOR_INTERVAL = {False: 0.2, True: 1.0}
# Seconds until the other ranks must have ended after a failure without a restart.
_EXIT_TIMEOUT = 10.0
# torchelastic counts restarts down from here; `launcher.agent.restarts` decides about them.
_UNLIMITED_RESTARTS = 1_000_000
# Seconds for the ranks to end. Before torch 2.12 an agent has no such argument, and waits 30 s.
_SHUTDOWN: dict[str, Any] = (
    {"shutdown_timeout": 60} if "shutdown_timeout" in inspect.signature(LocalElasticAgent).parameters else {}
)


@dataclass(frozen=True, slots=True)
class _StartedAttempt:
    processes: AttemptProcesses
    evidence: FailureEvidence
    stop: AttemptStop


class TrainingAgent(LocalElasticAgent):
    """The agent of one node.

    Args:
        count: ranks on this node.
        request: what the ranks run, and the options.
        choose_start_method: returns how processes are started; called after the rendezvous.
        folder: private folder for the ranks' reports; the caller removes it.
    """

    def __init__(
        self,
        rendezvous: RendezvousHandler,
        count: int,
        request: StartRequest,
        choose_start_method: Callable[[], StartMethod],
        folder: Path,
    ) -> None:
        spec = WorkerSpec(
            role="rank",
            local_world_size=count,
            rdzv_handler=rendezvous,
            entrypoint=run_rank,
            max_restarts=_UNLIMITED_RESTARTS,
            monitor_interval=0.01,
        )
        super().__init__(spec, DefaultLogsSpecs(log_dir=str(folder)), "forkserver", **_SHUTDOWN)
        self._choose_start_method = choose_start_method
        self._rendezvous_handler = rendezvous
        self._request = request
        self._options = options = request.options
        self._folder = folder
        self._attempts = 0
        self._is_run_shown = False
        self._restarts = RestartTracker(options.max_restarts, options.restart_window)
        self._current: _StartedAttempt | None = None
        self.signals = AgentSignals(self._signal_ranks, self._kill_ranks)
        self.exit_code = 0

    @property
    def has_started_ranks(self) -> bool:
        """Whether the rendezvous succeeded and ranks were started."""
        return self._attempts > 0

    # The decorator of torch's own methods hides their signatures from type checkers.
    def _start_workers(  # pyright: ignore[reportIncompatibleVariableOverride]
        self, worker_group: WorkerGroup
    ) -> dict[int, Any]:
        if self.signals.first is not None:
            raise AgentStopped(self.signals.first)
        folder = self._folder / f"attempt-{self._attempts}"
        folder.mkdir(mode=0o700)
        if self._attempts == 0:
            # The fork server has imported the libraries during the rendezvous.
            self._start_method = self._choose_start_method()
        self._attempts += 1
        worker_group.spec.args = (RankTask(self._request.command, str(folder)),)
        ranks = [worker.global_rank for worker in worker_group.workers]
        inspector = RankInspector(folder, has_steps=not self._request.is_plain)
        if self._request.output is not None:
            self._request.output.start_attempt(folder, ranks)
        started = super()._start_workers(worker_group)  # pyright: ignore[reportCallIssue]
        # torchelastic's public interface has the process ids, but no sentinels and no exit codes.
        processes = AttemptProcesses(ranks, vars(self._pcontext)["_pc"].processes, inspector)
        exchange = None
        if self._options.several_nodes:
            nodes = worker_group.group_world_size or 1
            exchange = NodeExchange(worker_group.store, worker_group.group_rank or 0, nodes)
        evidence = FailureEvidence(processes, self._request, exchange)
        self._current = _StartedAttempt(processes, evidence, AttemptStop(processes, self._request))
        return started

    def _monitor_workers(  # pyright: ignore[reportIncompatibleVariableOverride]
        self, worker_group: WorkerGroup
    ) -> RunResult:
        """Check the ranks once; torchelastic's loop restarts or ends depending on the result."""
        processes = self._attempt.processes
        processes.wait_for_next_exit(_MONITOR_INTERVAL[self._options.several_nodes])
        ranks = processes.ranks()
        codes = [process.exit_code for process in ranks.values()]
        has_saved = self.signals.first is not None and self._request.is_plain
        if not any(codes) and None not in codes and not has_saved:
            return RunResult(WorkerState.SUCCEEDED, return_values=dict.fromkeys(ranks))
        if self.signals.first is not None:
            return self._monitor_stopping(self.signals.first, ranks)
        if any(codes):
            return self._handle_failure()
        self._show_run()
        return self._check_for_hang()

    def _show_run(self) -> None:
        if not self._is_run_shown and (run := self._run_directory()) is not None:
            self._is_run_shown = True
            set_title("agent", run.name)

    def _monitor_stopping(self, number: int, ranks: Mapping[int, RankProcess]) -> RunResult:
        """After a signal: wait until the ranks have saved and ended."""
        if any(process.exit_code is None for process in ranks.values()):
            self._attempt.stop.supervise(number)
            return self._check_for_hang()
        self.exit_code = 128 + number
        if has_failed_at_stop(self._attempt.processes.inspector.collect_outcomes(ranks, {})):
            return self._handle_failure()
        self._attempt.stop.report(number, is_second=self.signals.is_second)
        return self._end_attempt(restart=False)

    def _stop_workers(  # pyright: ignore[reportIncompatibleVariableOverride]
        self, worker_group: WorkerGroup
    ) -> None:
        """End the ranks before another attempt: they save if a node joins, and are killed if another node failed."""
        first = None if self._current is None else self._current.evidence.find_failure_of_other_nodes()
        if first is not None:
            self._kill_ranks()
            self._record_out_of_memory(first)
        if self._pcontext is not None:
            # Not by `_shutdown`, which takes no time limit before torch 2.12.
            self._pcontext.close(signal.SIGTERM, int(SAVE_TIMEOUT))
        self._shutdown()

    def _handle_failure(self) -> RunResult:
        """After a rank has failed: find the first failure, report it, and restart or stop."""
        evidence = self._attempt.evidence
        outcomes = evidence.collect()
        first = find_first_failure(outcomes)
        assert first is not None  # noqa: S101 -- the caller has seen a rank fail
        decision = self._decide(first)
        if first.is_consequence and evidence.has_lost_store():
            decision = RestartDecision(False, describe_lost_store(self._options))
        if not decision.restart and not self._request.is_plain:
            outcomes = evidence.collect_after_exit()
            first = find_first_failure(outcomes) or first
        return self._conclude(first, outcomes, decision)

    def _check_for_hang(self) -> RunResult:
        """End the attempt if its ranks hang."""
        outcomes = self._attempt.evidence.collect_hang()
        first = None if outcomes is None else find_first_failure(outcomes)
        if outcomes is None or first is None:
            return RunResult(WorkerState.HEALTHY)
        return self._conclude(first, outcomes, self._decide(first))

    def _decide(self, first: RankOutcome) -> RestartDecision:
        if self.signals.first is not None:
            return RestartDecision(False, "no restart: the agent received a signal to stop")
        if first.is_interrupted and self._rendezvous_handler.num_nodes_waiting() > 0:
            return RestartDecision(True, "a node joins: the ranks have saved and restart with it")
        return self._restarts.decide(first, self._run_directory())

    def _conclude(self, first: RankOutcome, outcomes: Sequence[RankOutcome], decision: RestartDecision) -> RunResult:
        """Report the failure, end the remaining ranks, and let torchelastic restart or stop."""
        processes, report = self._attempt.processes, AgentReport(self._run_directory())
        report.record_failure(first, outcomes, decision)
        if not first.is_interrupted:
            is_own = first.rank in processes.ranks()
            self._request.report_failure(first, outcomes if is_own else [first], decision)
        elif not decision.restart and self.signals.first is None:
            # A rank received the signal, not the agent.
            self._attempt.stop.report((first.exit_code or 0) - 128, is_second=self.signals.is_second)
        report.print_command(first)
        if self._request.is_plain and not decision.restart:
            self._signal_ranks(signal.SIGTERM)
            processes.wait_for_all(_EXIT_TIMEOUT)
        self._kill_ranks()
        processes.wait_for_all(_EXIT_TIMEOUT)
        self._record_out_of_memory(first)
        self._restarts.record(first, decision)
        if not decision.restart:
            self.exit_code = 1 if first.hung or first.exit_code is None else to_shell_exit_code(first.exit_code)
        elif self.signals.first is not None:
            # The signal came after the decision.
            self.exit_code = 128 + self.signals.first
        return self._end_attempt(restart=decision.restart and self.signals.first is None)

    def _end_attempt(self, *, restart: bool) -> RunResult:
        if not restart:
            self._remaining_restarts = 0
        return RunResult(WorkerState.FAILED)

    def _record_out_of_memory(self, first: RankOutcome) -> None:
        notice = record_out_of_memory(first, self._run_directory())
        if notice is not None:
            print_message(notice)

    @property
    def _attempt(self) -> _StartedAttempt:
        if self._current is None:
            raise RuntimeError("no attempt was started")
        return self._current

    def _run_directory(self) -> Path | None:
        processes = self._attempt.processes
        return processes.inspector.find_run_directory(processes.ranks())

    def _signal_ranks(self, number: int) -> bool:
        return self._current is not None and self._current.processes.send(number)

    def _kill_ranks(self) -> None:
        self._signal_ranks(signal.SIGKILL)
