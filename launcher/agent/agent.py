"""The agent of one node: starts the ranks, monitors them, reports failures and hangs, restarts them, forwards signals.

torch's `LocalElasticAgent` provides the rendezvous, the ranks' environment and their processes. This subclass replaces
its start of an attempt and its monitoring step.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousHandler

from launcher.agent.agent_report import AgentReport, print_text
from launcher.agent.failure_report import RankOutcome, find_first_failure, has_failed_at_stop, to_shell_exit_code
from launcher.agent.fork_server import StartMethod
from launcher.agent.hang_detection import HangDetector, describe_hang, find_blocking_ranks
from launcher.agent.node_exchange import NodeExchange
from launcher.agent.rank_inspector import RankInspector, RankProcess
from launcher.agent.rank_main import RankTask, run_rank
from launcher.agent.rank_processes import AttemptProcesses
from launcher.agent.rendezvous import describe_lost_store
from launcher.agent.restart_policy import RestartDecision
from launcher.agent.restarts import RestartTracker, record_out_of_memory
from launcher.agent.signals import AgentSignals, AgentStopped
from launcher.agent.start_request import StartRequest
from launcher.process.heartbeat import BEFORE_TRAINING
from launcher.process.titles import set_title

# Seconds between two checks with one node and with several. The agent notices the end of a rank immediately.
_MONITOR_INTERVAL = {False: 0.2, True: 1.0}
# Seconds to wait for another rank's failure if all known failures are lost connections.
_CAUSE_TIMEOUT = 3.0
# Seconds until the other ranks must have ended: after a failure without a restart, and after the first rank has saved.
_EXIT_TIMEOUT = 10.0
_SAVE_TIMEOUT = 120.0
# The same if no rank has begun to train: there is nothing to save, and a rank that waits in C code sees no signal.
_UNTRAINED_EXIT_TIMEOUT = 3.0
# Seconds to wait for the other ranks if one has called `sys.exit` with an error code, and for their own errors.
_SAME_EXIT_TIMEOUT = 0.5
_OTHER_ERRORS_TIMEOUT = 1.0
_STACKS_TIMEOUT = 0.3
# A rank checks once a second whether its flight record was requested.
_FLIGHT_RECORD_TIMEOUT = 5.0
# Seconds that the other nodes have to detect the same hang.
_HANG_EXCHANGE_TIMEOUT = 15.0
# torchelastic counts restarts down from here; `launcher.agent.restarts` decides about them.
_UNLIMITED_RESTARTS = 1_000_000


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
        super().__init__(spec, DefaultLogsSpecs(log_dir=str(folder)), "forkserver", shutdown_timeout=60)
        self._choose_start_method = choose_start_method
        self._rendezvous_handler = rendezvous
        self._request = request
        self._options = options = request.options
        self._output = request.output
        self._folder = folder
        self._attempts = 0
        self._is_run_shown = False
        self._restarts = RestartTracker(options.max_restarts, options.restart_window)
        self._current: AttemptProcesses | None = None
        self._hangs = HangDetector(options.hang_timeout)
        self._stop_deadline: float | None = None
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
        self._hangs = HangDetector(self._options.hang_timeout)
        worker_group.spec.args = (RankTask(self._request.command, str(folder)),)
        inspector = RankInspector(folder, has_steps=not self._request.is_plain)
        if self._output is not None:
            self._output.start_attempt(folder, [worker.global_rank for worker in worker_group.workers])
        started = super()._start_workers(worker_group)  # pyright: ignore[reportCallIssue]
        # torchelastic's public interface has the process ids, but no sentinels and no exit codes.
        processes = vars(self._pcontext)["_pc"].processes
        self._current = AttemptProcesses([worker.global_rank for worker in worker_group.workers], processes, inspector)
        return started

    def _monitor_workers(  # pyright: ignore[reportIncompatibleVariableOverride]
        self, worker_group: WorkerGroup
    ) -> RunResult:
        """Check the ranks once; torchelastic's loop restarts or ends depending on the result."""
        self._attempt.wait_for_next_exit(_MONITOR_INTERVAL[self._options.several_nodes])
        ranks = self._attempt.ranks()
        codes = [process.exit_code for process in ranks.values()]
        has_saved = self.signals.first is not None and self._request.is_plain
        if not any(codes) and None not in codes and not has_saved:
            return RunResult(WorkerState.SUCCEEDED, return_values=dict.fromkeys(ranks))
        if self.signals.first is not None:
            return self._monitor_stopping(worker_group, ranks)
        if any(codes):
            return self._handle_failure(worker_group)
        self._show_run()
        return self._check_for_hang(worker_group, ranks) or RunResult(WorkerState.HEALTHY)

    def _show_run(self) -> None:
        if not self._is_run_shown and (run := self._run_directory()) is not None:
            self._is_run_shown = True
            set_title("agent", run.name)

    def _monitor_stopping(self, worker_group: WorkerGroup, ranks: dict[int, RankProcess]) -> RunResult:
        """After a signal: wait until the ranks have saved and ended."""
        codes = {process.exit_code for process in ranks.values()}
        if None in codes:
            # Code that does not know the launcher may have lost the signal, or ignore it.
            if self._stop_deadline is None and (codes != {None} or self._request.is_plain):
                seconds = self._seconds_to_save(ranks)
                self._stop_deadline = time.monotonic() + seconds
                self._request.report_stop_begin(self.signals.first or signal.SIGTERM, seconds)
            if self._stop_deadline is not None and time.monotonic() > self._stop_deadline:
                self._kill_ranks()
            return self._check_for_hang(worker_group, ranks) or RunResult(WorkerState.HEALTHY)
        number = self.signals.first or signal.SIGTERM
        self.exit_code = 128 + number
        if has_failed_at_stop(self._attempt.inspector.collect_outcomes(ranks, {})):
            return self._handle_failure(worker_group)
        self._report_stop(number)
        return self._end_attempt(restart=False)

    def _seconds_to_save(self, ranks: Collection[int]) -> float:
        beats = [self._attempt.inspector.read_heartbeat(rank) for rank in ranks]
        is_untrained = all(beat is None or beat.step == BEFORE_TRAINING for beat in beats)
        return _UNTRAINED_EXIT_TIMEOUT if is_untrained and not self._request.is_plain else _SAVE_TIMEOUT

    def _report_stop(self, number: int) -> None:
        outcomes = self._attempt.inspector.collect_outcomes(self._attempt.ranks(), {})
        self._request.report_stop(outcomes)
        if not self._request.is_plain:
            self._report.report_stop(number, outcomes, is_second=self.signals.is_second)

    def _stop_workers(  # pyright: ignore[reportIncompatibleVariableOverride]
        self, worker_group: WorkerGroup
    ) -> None:
        """End the ranks before another attempt: they save if a node joins, and are killed if another node failed."""
        several = self._options.several_nodes
        first = find_first_failure(self._exchange(worker_group).read_outcomes()) if several else None
        if first is not None:
            self._kill_ranks()
            self._record_out_of_memory(first)
        self._shutdown(timeout=int(_SAVE_TIMEOUT))

    def _handle_failure(self, worker_group: WorkerGroup) -> RunResult:
        """After a rank has failed: find the first failure, report it, and restart or stop."""
        attempt = self._attempt
        attempt.wait_for_cause(_CAUSE_TIMEOUT)
        if self._request.is_plain and attempt.has_exited_by_itself():
            # The others often do the same, as with a usage error.
            attempt.wait_for_all(_SAME_EXIT_TIMEOUT)
        attempt.wait_for_errors(_OTHER_ERRORS_TIMEOUT)
        self._drain_output()
        ranks = attempt.ranks()
        states = attempt.inspector.collect_states(ranks, _STACKS_TIMEOUT)
        outcomes = self._exchange_outcomes(worker_group, attempt.inspector.collect_outcomes(ranks, states))
        first = find_first_failure(outcomes)
        assert first is not None  # noqa: S101 -- the caller has seen a rank fail
        decision = self._decide(first)
        if first.is_consequence and self._options.several_nodes and not self._exchange(worker_group).is_reachable():
            decision = RestartDecision(False, describe_lost_store(self._options))
        if not decision.restart and not self._request.is_plain:
            # Rank zero may have to finish the W&B run, and each rank its own report.
            attempt.wait_for_all(self._request.exit_timeout)
            own = attempt.inspector.collect_outcomes(attempt.ranks(), states)
            outcomes = self._exchange_outcomes(worker_group, own)
            first = find_first_failure(outcomes) or first
        return self._conclude(first, outcomes, decision)

    def _check_for_hang(self, worker_group: WorkerGroup, ranks: dict[int, RankProcess]) -> RunResult | None:
        """If all heartbeats are older than the limit: save stacks, find the blocking ranks and end the attempt."""
        inspector = self._attempt.inspector
        silence = self._hangs.find_silence(time.monotonic(), {rank: inspector.read_heartbeat(rank) for rank in ranks})
        if silence is None:
            return None
        states = inspector.collect_states(ranks, 10 * _STACKS_TIMEOUT)
        states = inspector.add_flight_records(states, _FLIGHT_RECORD_TIMEOUT)
        self._drain_output()
        all_states = states
        if self._options.several_nodes:
            all_states = self._exchange(worker_group).exchange_states(states, _HANG_EXCHANGE_TIMEOUT)
        blocking = find_blocking_ranks(all_states)
        # If no rank stands out, the report has all of them rather than a wrong one.
        hung = blocking or {rank: state.doing for rank, state in all_states.items()}
        own = inspector.collect_outcomes(ranks, states, {rank: hung[rank] for rank in ranks if rank in hung})
        outcomes = self._exchange_outcomes(worker_group, own)
        first = find_first_failure(outcomes)
        if first is None:
            # The blocking rank is on another node, which has not reported it yet.
            return None
        run = inspector.find_run_directory(ranks)
        stacks = None if run is None else run / f"hang-{time.strftime('%Y%m%d-%H%M%S')}"
        if stacks is not None:
            inspector.save_stacks(states, stacks)
        self._report.write_event(first.rank, "hang", seconds=silence, waiting_for=sorted(blocking), stacks=stacks)
        print_text(describe_hang(silence, sorted(blocking), stacks, has_steps=not self._request.is_plain))
        return self._conclude(first, outcomes, self._decide(first))

    def _exchange_outcomes(self, worker_group: WorkerGroup, own: list[RankOutcome]) -> list[RankOutcome]:
        """Publish this node's outcomes and add those of the other nodes."""
        if not self._options.several_nodes:
            return own
        exchange = self._exchange(worker_group)
        exchange.publish_outcomes(own)
        first = find_first_failure(own)
        # A lost connection here has its cause on another node: wait for that node's report.
        return own + exchange.read_outcomes(_CAUSE_TIMEOUT if first is None or first.is_consequence else 0.0)

    def _exchange(self, worker_group: WorkerGroup) -> NodeExchange:
        return NodeExchange(worker_group.store, worker_group.group_rank or 0, worker_group.group_world_size or 1)

    def _decide(self, first: RankOutcome) -> RestartDecision:
        if self.signals.first is not None:
            return RestartDecision(False, "no restart: the agent received a signal to stop")
        if first.is_interrupted and self._rendezvous_handler.num_nodes_waiting() > 0:
            return RestartDecision(True, "a node joins: the ranks have saved and restart with it")
        return self._restarts.decide(first, self._run_directory())

    def _conclude(self, first: RankOutcome, outcomes: Sequence[RankOutcome], decision: RestartDecision) -> RunResult:
        """Report the failure, end the remaining ranks, and let torchelastic restart or stop."""
        self._report.record_failure(first, outcomes, decision)
        if not first.is_interrupted:
            is_own = first.rank in self._attempt.ranks()
            self._request.report_failure(first, outcomes if is_own else [first], decision)
        elif not decision.restart and self.signals.first is None:
            # A rank received the signal, not the agent.
            self._report_stop((first.exit_code or 0) - 128)
        self._report.print_command(first)
        if self._request.is_plain and not decision.restart:
            self._signal_ranks(signal.SIGTERM)
            self._attempt.wait_for_all(_EXIT_TIMEOUT)
        self._kill_ranks()
        self._attempt.wait_for_all(_EXIT_TIMEOUT)
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
            print_text(notice)

    @property
    def _attempt(self) -> AttemptProcesses:
        if self._current is None:
            raise RuntimeError("no attempt was started")
        return self._current

    @property
    def _report(self) -> AgentReport:
        return AgentReport(self._run_directory())

    def _run_directory(self) -> Path | None:
        return self._attempt.inspector.find_run_directory(self._attempt.ranks())

    def _drain_output(self) -> None:
        if self._output is not None:
            self._output.drain()

    def _signal_ranks(self, number: int) -> bool:
        return self._current is not None and self._current.send(number)

    def _kill_ranks(self) -> None:
        self._signal_ranks(signal.SIGKILL)
