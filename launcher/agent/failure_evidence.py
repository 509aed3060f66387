"""What is known about a failure or a hang of one attempt: how the ranks of all nodes ended, or what they are doing."""

from __future__ import annotations

import time
from collections.abc import Mapping

from launcher.agent.agent_report import AgentReport
from launcher.agent.failure_report import RankOutcome, find_first_failure
from launcher.agent.hang_detection import HangDetector, RankState, describe_hang, find_blocking_ranks
from launcher.agent.hang_verdict import describe_verdict
from launcher.agent.hang_watch import HangOver, HangWatch
from launcher.agent.node_exchange import NodeExchange
from launcher.agent.rank_processes import AttemptProcesses
from launcher.agent.start_request import StartRequest
from launcher.agent.state_request import RankProcess
from launcher.core.wrapping import print_message

# Seconds to wait for another rank's failure if all known failures are lost connections.
_CAUSE_TIMEOUT = 3.0
# Seconds to wait for the other ranks if one has called `sys.exit` with an error code, and for their own errors.
_SAME_EXIT_TIMEOUT = 0.5
_OTHER_ERRORS_TIMEOUT = 1.0
_STACKS_TIMEOUT = 0.3
# Seconds that survivors have to save the state of the last step.
_KEEP_TIMEOUT = 300.0
# A rank checks once a second whether its flight record was requested.
_FLIGHT_RECORD_TIMEOUT = 5.0
# Seconds that the other nodes have to detect the same hang.
_HANG_EXCHANGE_TIMEOUT = 15.0


class FailureEvidence:
    """Collects the outcomes of an attempt. `exchange` reaches the other nodes; None if there is one node."""

    def __init__(self, processes: AttemptProcesses, request: StartRequest, exchange: NodeExchange | None) -> None:
        self._processes = processes
        self._request = request
        self._exchange = exchange
        self._hangs = HangDetector(request.options.hang_timeout)
        self._watch = HangWatch(processes.inspector, exchange)
        self._states: Mapping[int, RankState] = {}

    def collect(self, *, is_cause_known: bool = False) -> list[RankOutcome]:
        """The outcomes after a rank has failed, once its cause and the errors of the others are known.

        `is_cause_known`: another node has reported it.
        """
        self._wait_for_reports(is_cause_known)
        self._drain_output()
        ranks = self._processes.ranks()
        # A rank that has reported its error is explained by it, and may be too far in its end to write its stacks.
        silent = {
            rank: each for rank, each in ranks.items() if self._processes.inspector.read_status(rank).error is None
        }
        self._states = self._processes.inspector.collect_states(silent, _STACKS_TIMEOUT)
        return self._collect_outcomes(ranks)

    def _wait_for_reports(self, is_cause_known: bool) -> None:
        """The one wait between a failure and the end of the ranks: for their reports and the state that they keep."""
        if not is_cause_known:
            self._processes.wait_for_cause(_CAUSE_TIMEOUT)
        if self._request.is_plain and self._processes.has_exited_by_itself():
            # The others often do the same, as with a usage error.
            self._processes.wait_for_all(_SAME_EXIT_TIMEOUT)
        self._processes.wait_for_errors(_OTHER_ERRORS_TIMEOUT)
        self._processes.wait_for_kept(_KEEP_TIMEOUT)

    def collect_after_exit(self) -> list[RankOutcome]:
        """The outcomes once all ranks have ended: rank zero may have to finish the W&B run, each rank its report."""
        self._processes.wait_for_all(self._request.exit_timeout)
        return self._collect_outcomes(self._processes.ranks())

    def collect_hang(self) -> list[RankOutcome] | None:
        """If all heartbeats are older than the limit: save stacks, find the blocking ranks and report the hang.

        Returns:
            None if the ranks do not hang, or the blocking rank is on a node that has not reported it yet.
        """
        inspector, ranks = self._processes.inspector, self._processes.ranks()
        self._notice_hang(ranks)
        silence = self._hangs.find_silence(time.monotonic(), {rank: inspector.read_heartbeat(rank) for rank in ranks})
        if silence is None:
            return None
        states = inspector.collect_states_with_records(ranks, 10 * _STACKS_TIMEOUT, _FLIGHT_RECORD_TIMEOUT)
        self._states = states
        self._drain_output()
        all_states = states
        if self._exchange is not None:
            all_states = self._exchange.exchange_states(states, _HANG_EXCHANGE_TIMEOUT)
        blocking = find_blocking_ranks(all_states)
        # If no rank stands out, the report has all of them rather than a wrong one.
        hung = blocking or {rank: state.doing for rank, state in all_states.items()}
        outcomes = self._collect_outcomes(ranks, {rank: hung[rank] for rank in ranks if rank in hung})
        first = find_first_failure(outcomes)
        if first is None:
            return None
        run = inspector.find_run_directory(ranks)
        stacks = None if run is None else run / f"hang-{time.strftime('%Y%m%d-%H%M%S')}"
        if stacks is not None:
            inspector.save_stacks(states, stacks)
        AgentReport(run).write_event(first.rank, "hang", seconds=silence, waiting_for=sorted(blocking), stacks=stacks)
        print_message(describe_hang(silence, sorted(blocking), stacks, has_steps=not self._request.is_plain))
        return outcomes

    def _notice_hang(self, ranks: Mapping[int, RankProcess]) -> None:
        """Report a hang before its limit, and its end; nothing is ended."""
        found = self._watch.look(ranks)
        if found is None:
            return
        report = AgentReport(self._processes.inspector.find_run_directory(ranks))
        if isinstance(found, HangOver):
            report.write_event(found.verdict.named[0], "hang_over", seconds=round(found.seconds, 1),
                               ranks=found.verdict.named, message=found.message)  # fmt: skip
            print_message(found.message)
        else:
            seen = found.to_event()
            report.write_event(found.named[0], "hang_suspected", phase=seen["phase"], seconds=seen["seconds"],
                               usual=seen["usual"], step=seen["step"], ranks=seen["ranks"], waiting=seen["waiting"],
                               waits_for=seen["waits_for"], frames=seen["frames"], collective=seen["collective"],
                               message=seen["message"])  # fmt: skip
            print_message(describe_verdict(found))

    def find_failure_of_other_nodes(self) -> RankOutcome | None:
        """The first failure that another node has reported."""
        return None if self._exchange is None else find_first_failure(self._exchange.read_outcomes())

    def has_lost_store(self) -> bool:
        """Whether the node that serves the store has failed."""
        return self._exchange is not None and not self._exchange.is_reachable()

    def _collect_outcomes(
        self, ranks: Mapping[int, RankProcess], hung: Mapping[int, str] | None = None
    ) -> list[RankOutcome]:
        """The outcomes of this node's ranks, which are published, and of the other nodes' ranks."""
        own = self._processes.inspector.collect_outcomes(ranks, self._states, hung)
        if self._exchange is None:
            return own
        self._exchange.publish_outcomes(own)
        first = find_first_failure(own)
        # A lost connection here has its cause on another node: wait for that node's report.
        return own + self._exchange.read_outcomes(_CAUSE_TIMEOUT if first is None or first.is_consequence else 0.0)

    def _drain_output(self) -> None:
        if self._request.output is not None:
            self._request.output.drain()
