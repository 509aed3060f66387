"""The agent of one node: starts the ranks, monitors them, reports failures and hangs, restarts them, forwards signals.

torch's `LocalElasticAgent` provides the rendezvous, the ranks' environment and their processes. This subclass replaces
its start of an attempt and its monitoring step.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousHandler

from launcher.agent.failure_report import (
    RankOutcome,
    find_first_failure,
    find_stop,
    format_failure_report,
    name_failure_reason,
    to_shell_exit_code,
)
from launcher.agent.fork_server import StartMethod
from launcher.agent.hang_detection import HangDetector, describe_hang, find_blocking_ranks
from launcher.agent.node_exchange import NodeExchange
from launcher.agent.rank_inspector import RankInspector, RankProcess
from launcher.agent.rank_main import RankCommand, RankTask, run_rank
from launcher.agent.rank_processes import AttemptProcesses
from launcher.agent.rendezvous import describe_lost_store
from launcher.agent.restart_policy import RestartDecision
from launcher.agent.restarts import RestartTracker, record_out_of_memory
from launcher.agent.signals import AgentSignals, AgentStopped
from launcher.checkpoint.manifest import remove_partial_checkpoints
from launcher.config.launch_options import LaunchOptions
from launcher.core.event_text import name_stop_reason
from launcher.core.events import FILE_NAME, EventLog
from launcher.process.parent_death import STOP_SIGNALS
from launcher.runs.continuation import describe_command, describe_stop

# Seconds between two checks with one node and with several. The agent notices the end of a rank immediately.
_MONITOR_INTERVAL = {False: 0.2, True: 1.0}
# Seconds to wait for another rank's failure if all known failures are lost connections.
_CAUSE_TIMEOUT = 3.0
# Seconds until the other ranks must have ended: after a failure without a restart, and after the first rank has saved.
_EXIT_TIMEOUT = 10.0
_SAVE_TIMEOUT = 120.0
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
        choose_start_method: returns how processes are started; called after the rendezvous.
        folder: private folder for the ranks' reports; the caller removes it.
    """

    def __init__(
        self,
        rendezvous: RendezvousHandler,
        count: int,
        command: RankCommand,
        options: LaunchOptions,
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
        self._command = command
        self._options = options
        self._folder = folder
        self._attempts = 0
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
        worker_group.spec.args = (RankTask(self._command, str(folder)),)
        inspector = RankInspector(folder)
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
        if not any(codes) and None not in codes:
            return RunResult(WorkerState.SUCCEEDED, return_values=dict.fromkeys(ranks))
        if self.signals.first is not None:
            return self._monitor_stopping(worker_group, ranks)
        if any(codes):
            return self._handle_failure(worker_group)
        return self._check_for_hang(worker_group, ranks) or RunResult(WorkerState.HEALTHY)

    def _monitor_stopping(self, worker_group: WorkerGroup, ranks: dict[int, RankProcess]) -> RunResult:
        """After a signal: wait until the ranks have saved and ended."""
        codes = {process.exit_code for process in ranks.values()}
        if None in codes:
            if codes != {None} and self._stop_deadline is None:
                self._stop_deadline = time.monotonic() + _SAVE_TIMEOUT
            if self._stop_deadline is not None and time.monotonic() > self._stop_deadline:
                self._kill_ranks()
            return self._check_for_hang(worker_group, ranks) or RunResult(WorkerState.HEALTHY)
        number = self.signals.first or signal.SIGTERM
        self.exit_code = 128 + number
        # A scheduler may also send its signal directly to every process of the job.
        expected = {0, *(code for n in (*STOP_SIGNALS, signal.SIGKILL) for code in (128 + n, -n))}
        if not codes <= expected:
            return self._handle_failure(worker_group)
        self._report_stop(number)
        return self._end_attempt(restart=False)

    def _report_stop(self, number: int) -> None:
        """Print once for all ranks what a signal has stopped, and write the event unless the ranks have done so."""
        run = self._run_directory()
        outcomes = self._attempt.inspector.collect_outcomes(self._attempt.ranks(), {})
        stop = find_stop(number, outcomes, run, is_second=self.signals.is_second)
        if stop.saved is None and not any(outcome.is_interrupted for outcome in outcomes):
            self._write_event(run, outcomes[0].rank, "interrupted", signal=number, step=stop.step, checkpoint=None,
                              reason=name_stop_reason(number), second=stop.at_once)  # fmt: skip
        if run is not None and stop.at_once:
            remove_partial_checkpoints(run / "checkpoints")
        _print(describe_stop(stop))

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
        ranks = attempt.ranks()
        states = attempt.inspector.collect_states(ranks, _STACKS_TIMEOUT)
        outcomes = self._exchange_outcomes(worker_group, attempt.inspector.collect_outcomes(ranks, states))
        first = find_first_failure(outcomes)
        assert first is not None  # noqa: S101 -- the caller has seen a rank fail
        decision = self._decide(first)
        if first.is_consequence and self._options.several_nodes and not self._exchange(worker_group).is_reachable():
            decision = RestartDecision(False, describe_lost_store(self._options))
        if not decision.restart:
            # Rank zero may have to finish the W&B run, and each rank its own report.
            attempt.wait_for_all(_EXIT_TIMEOUT)
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
        self._write_event(run, first.rank, "hang", seconds=silence, waiting_for=sorted(blocking), stacks=stacks)
        _print(describe_hang(silence, sorted(blocking), stacks))
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
        run = self._run_directory()
        self._write_event(run, first.rank, "rank_failed", host=first.host, step=first.step,
                    exit_code=first.exit_code, hung=first.hung, out_of_memory=first.out_of_memory,
                    error=None if first.error is None else f"{first.error.kind}: {first.error.message}",
                    log=first.log, last_lines=first.last_lines,
                    others=[asdict(outcome) for outcome in outcomes if outcome.rank != first.rank],
                    restart=decision.restart, verdict=decision.reason,
                    reason=name_failure_reason(first))  # fmt: skip
        if not first.is_interrupted:
            is_own = first.rank in self._attempt.ranks()
            _print(format_failure_report(first, outcomes if is_own else [first], decision.reason))
        elif not decision.restart and self.signals.first is None:
            # A rank received the signal, not the agent.
            self._report_stop((first.exit_code or 0) - 128)
        if first.error is not None and first.error.storage is not None and (command := describe_command(run)):
            _print(command)
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
            _print(notice)

    @property
    def _attempt(self) -> AttemptProcesses:
        if self._current is None:
            raise RuntimeError("no attempt was started")
        return self._current

    def _run_directory(self) -> Path | None:
        return self._attempt.inspector.find_run_directory(self._attempt.ranks())

    def _signal_ranks(self, number: int) -> bool:
        return self._current is not None and self._current.send(number)

    def _kill_ranks(self) -> None:
        self._signal_ranks(signal.SIGKILL)

    def _write_event(self, run: Path | None, rank: int, kind: str, **fields: Any) -> None:
        if run is not None:
            EventLog(run / FILE_NAME, rank).write(kind, **json.loads(json.dumps(fields, default=str)))


def _print(text: str) -> None:
    """Write to the terminal; a closed terminal must not end the agent before its ranks."""
    with contextlib.suppress(OSError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
