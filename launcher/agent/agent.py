"""torchelastic's agent with what a training needs on top: quick and sensible restarts, an account of every failure, a
watch for hangs, and signals that let the ranks save.

The agent itself (rendezvous, ranks, environment, processes) is torch's `LocalElasticAgent`; here are its monitoring
step and its start of an attempt.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousHandler

from launcher.agent.failure_report import RankEnd, account, first_failure, shell_code
from launcher.agent.fork_server import StartMethod
from launcher.agent.hang_detection import HangWatch, ranks_behind
from launcher.agent.node_exchange import NodeExchange
from launcher.agent.rank_inspector import RankEvidence, RankProcess
from launcher.agent.rank_main import RankCommand, RankTask, run_rank
from launcher.agent.rank_processes import AttemptProcesses, ask_for_stacks
from launcher.agent.restart_policy import Verdict, decide, host_lost
from launcher.agent.restarts import next_strategy, remember_failure
from launcher.agent.signals import HANDLED, AgentSignals, AgentStopped
from launcher.config.launch_options import LaunchOptions
from launcher.core.events import FILE_NAME, EventLog

# Seconds between two looks at the ranks; the end of one is seen at once. Other nodes are asked at this pace.
_LOOK_EVERY = {False: 0.2, True: 1.0}
# Seconds in which another rank may turn out to have failed first, if all known failures look like a lost peer.
_CAUSE_WITHIN = 3.0
# Seconds that the other ranks get to end by themselves if there is no restart, and after the first has saved and left.
_LEAVE_WITHIN = 10.0
_STOP_WITHIN = 120.0
_STACKS_WITHIN = 0.3
# A rank looks once a second whether its flight record is wanted.
_RECORDS_WITHIN = 5.0
# Seconds in which the other nodes have found the same hang.
_NODES_WITHIN = 15.0
# torchelastic counts restarts down from here; how many there are is decided in `launcher.agent.restart_policy`.
_COUNT_FROM = 1_000_000


class TrainingAgent(LocalElasticAgent):
    """The agent of one node.

    Args:
        rendezvous: where the nodes meet.
        count: ranks on this node.
        command: what the ranks run.
        options: how to start and restart.
        start_method: says how processes are made, once the nodes have met.
        folder: private folder for what ranks tell; the caller removes it.
    """

    def __init__(
        self,
        rendezvous: RendezvousHandler,
        count: int,
        command: RankCommand,
        options: LaunchOptions,
        start_method: Callable[[], StartMethod],
        folder: Path,
    ) -> None:
        spec = WorkerSpec(
            role="rank",
            local_world_size=count,
            rdzv_handler=rendezvous,
            entrypoint=run_rank,
            max_restarts=_COUNT_FROM,
            monitor_interval=0.01,
        )
        super().__init__(spec, DefaultLogsSpecs(log_dir=str(folder)), "forkserver", shutdown_timeout=60)
        self._choose_start_method = start_method
        self._rendezvous_handler = rendezvous
        self._command = command
        self._options = options
        self._folder = folder
        self._attempts = 0
        self._restarts: list[tuple[float, RankEnd]] = []
        self._current: AttemptProcesses | None = None
        self._hangs = HangWatch(options.hang_timeout)
        self._stop_deadline: float | None = None
        self._gone_on_with: set[str] = set()
        self.signals = AgentSignals(self._signal_ranks, self._kill_ranks)
        self.exit_code = 0

    # The decorator of torch's own methods hides their signatures from type checkers.
    def _start_workers(  # pyright: ignore[reportIncompatibleVariableOverride]
        self, worker_group: WorkerGroup
    ) -> dict[int, Any]:
        if self.signals.first is not None:
            raise AgentStopped(self.signals.first)
        folder = self._folder / f"attempt-{self._attempts}"
        folder.mkdir(mode=0o700)
        if self._attempts == 0:
            # The nodes met while the fork server imported.
            self._start_method = self._choose_start_method()
        self._attempts += 1
        self._hangs = HangWatch(self._options.hang_timeout)
        worker_group.spec.args = (RankTask(self._command, str(folder)),)
        evidence = RankEvidence(folder, ask_for_stacks)
        started = super()._start_workers(worker_group)  # pyright: ignore[reportCallIssue]
        # torchelastic offers the numbers of its processes, but neither their ends nor their exit codes.
        processes = vars(self._pcontext)["_pc"].processes
        self._current = AttemptProcesses([worker.global_rank for worker in worker_group.workers], processes, evidence)
        return started

    def _monitor_workers(  # pyright: ignore[reportIncompatibleVariableOverride]
        self, worker_group: WorkerGroup
    ) -> RunResult:
        """One look at the ranks; torchelastic's loop restarts or ends upon what this returns."""
        self._attempt.await_one(_LOOK_EVERY[self._options.several_nodes])
        ranks = self._attempt.ranks()
        codes = [process.exit_code for process in ranks.values()]
        if not any(codes) and None not in codes:
            return RunResult(WorkerState.SUCCEEDED, return_values=dict.fromkeys(ranks))
        if self.signals.first is not None:
            return self._monitor_stopping(worker_group, ranks)
        if any(codes):
            return self._after_failure(worker_group)
        hung = self._find_hang(ranks)
        if hung is not None:
            return hung
        return RunResult(WorkerState.HEALTHY)

    def _monitor_stopping(self, worker_group: WorkerGroup, ranks: dict[int, RankProcess]) -> RunResult:
        """After a signal: wait until the ranks have saved and left."""
        codes = {process.exit_code for process in ranks.values()}
        if None in codes:
            if codes != {None} and self._stop_deadline is None:
                self._stop_deadline = time.monotonic() + _STOP_WITHIN
            if self._stop_deadline is not None and time.monotonic() > self._stop_deadline:
                self._kill_ranks()
            hung = self._find_hang(ranks)
            return hung or RunResult(WorkerState.HEALTHY)
        number = self.signals.first or signal.SIGTERM
        self.exit_code = 128 + number
        # A scheduler may have sent its own signal to every process of the job.
        wanted = {0, *(code for n in (*HANDLED, signal.SIGKILL) for code in (128 + n, -n))}
        if not codes <= wanted:
            return self._after_failure(worker_group)
        return self._failed(restart=False)

    def _after_failure(self, worker_group: WorkerGroup) -> RunResult:
        """A rank has failed: find out which was the first and why, tell it, and decide what to do."""
        self._attempt.await_cause(_CAUSE_WITHIN)
        ranks = self._attempt.ranks()
        states = self._attempt.evidence.states(ranks, _STACKS_WITHIN)
        ends = self._with_other_nodes(worker_group, self._attempt.evidence.ends(ranks, states))
        first = first_failure(ends)
        assert first is not None  # noqa: S101 -- the caller has seen a rank fail
        verdict = self._decide(first)
        if first.consequence and self._options.several_nodes and not self._exchange(worker_group).reachable():
            verdict = Verdict(False, host_lost(self._options.endpoint_host, self._options.endpoint_port))
        if not verdict.restart:
            # Rank zero may have W&B to end, and each rank its own words to write.
            self._attempt.await_end(_LEAVE_WITHIN)
            ends = self._with_other_nodes(worker_group, self._attempt.evidence.ends(self._attempt.ranks(), states))
            first = first_failure(ends) or first
        return self._conclude(worker_group, first, ends, verdict)

    def _with_other_nodes(self, worker_group: WorkerGroup, own: list[RankEnd]) -> list[RankEnd]:
        """Tell the other nodes, and hear from them; a lost peer here is somebody's failure there."""
        if not self._options.several_nodes:
            return own
        exchange = self._exchange(worker_group)
        exchange.publish(own)
        first = first_failure(own)
        # Without a cause of its own this node waits for another's.
        return own + exchange.others(_CAUSE_WITHIN if first is None or first.consequence else 0.0)

    def _exchange(self, worker_group: WorkerGroup) -> NodeExchange:
        return NodeExchange(worker_group.store, worker_group.group_rank or 0, worker_group.group_world_size or 1)

    def _stop_workers(  # pyright: ignore[reportIncompatibleVariableOverride]
        self, worker_group: WorkerGroup
    ) -> None:
        """Before another attempt: the ranks save if a node joins, and are ended at once if one has failed."""
        first = first_failure(self._exchange(worker_group).others()) if self._options.several_nodes else None
        if first is not None:
            self._kill_ranks()
            self._remember(first)
        self._shutdown(timeout=int(_STOP_WITHIN))

    @property
    def has_met(self) -> bool:
        """Whether the nodes have met, and ranks were started."""
        return self._attempts > 0

    def _find_hang(self, ranks: dict[int, RankProcess]) -> RunResult | None:
        """Whether no rank has shown a sign of life for too long: then collect stacks, name the ranks, and end it."""
        beats = {rank: self._attempt.evidence.beat(rank) for rank in ranks}
        silent = self._hangs.silence(time.monotonic(), beats)
        if silent is None:
            return None
        states = self._attempt.evidence.states(ranks, 10 * _STACKS_WITHIN)
        states = self._attempt.evidence.with_flight_records(states, _RECORDS_WITHIN)
        everybody = states
        if self._options.several_nodes:
            everybody = self._exchange(self._worker_group).states(states, _NODES_WITHIN)
        behind = ranks_behind(everybody)
        # Where nobody stands out all are named: better too many than a wrong one.
        named = behind or {rank: state.doing for rank, state in everybody.items()}
        ends = self._attempt.evidence.ends(ranks, states, {rank: named[rank] for rank in ranks if rank in named})
        ends = self._with_other_nodes(self._worker_group, ends)
        first = first_failure(ends)
        if first is None:
            # The rank is another node's, which has not told yet.
            return None
        run = self._attempt.evidence.run_directory(ranks)
        stacks = None if run is None else run / f"hang-{time.strftime('%Y%m%d-%H%M%S')}"
        if stacks is not None:
            self._attempt.evidence.keep_stacks(states, stacks)
        waiting = ", ".join(map(str, behind)) or "unknown"
        headline = f"hang: no sign of life from any rank for {silent:.0f} s; the others wait for rank {waiting}"
        if stacks is not None:
            headline += f"; stacks of all ranks: {stacks}"
        self._event(run, first.rank, "hang", seconds=silent, waiting_for=sorted(behind), stacks=stacks)
        _say(headline)
        return self._conclude(self._worker_group, first, ends, self._decide(first))

    def _decide(self, first: RankEnd) -> Verdict:
        if self.signals.first is not None:
            return Verdict(False, "stopped by a signal")
        options = self._options
        asked = first.error is not None and first.error.interrupted
        if asked and self._rendezvous_handler.num_nodes_waiting() > 0:
            return Verdict(True, "a node joins: saved, and restarting with it")
        run = self._attempt.evidence.run_directory(self._attempt.ranks())
        following = next_strategy(first, run)
        if following in self._gone_on_with:
            # The record was not written, or not read: the same would come again.
            following = None
        now = time.monotonic()
        saved = run is not None and any((run / "checkpoints").glob("*.ckpt"))
        return decide(first, self._restarts, now, options.max_restarts, options.restart_window, following,
                      has_checkpoint=saved)  # fmt: skip

    def _conclude(
        self, worker_group: WorkerGroup, first: RankEnd, ends: Sequence[RankEnd], verdict: Verdict
    ) -> RunResult:
        """Tell the story, end what still runs, and let torchelastic restart or stop."""
        run = self._attempt.evidence.run_directory(self._attempt.ranks())
        self._event(run, first.rank, "rank_failed", host=first.host, step=first.step, exit_code=first.exit_code,
                    hung=first.hung, out_of_memory=first.out_of_memory,
                    error=None if first.error is None else f"{first.error.kind}: {first.error.message}",
                    log=first.log, last_lines=first.last_lines,
                    others=[end.to_dict() for end in ends if end.rank != first.rank],
                    restart=verdict.restart, verdict=verdict.reason)  # fmt: skip
        asked = first.error is not None and first.error.interrupted
        if not asked:
            own = first.rank in self._attempt.ranks()
            _say(account(first, ends if own else [first], verdict.reason))
        self._kill_ranks()
        self._attempt.await_end(_LEAVE_WITHIN)
        self._remember(first)
        if verdict.strategy is not None:
            self._gone_on_with.add(verdict.strategy)
        elif verdict.restart and not asked:
            self._restarts.append((time.monotonic(), first))
        elif self.signals.first is not None:
            self.exit_code = 128 + self.signals.first
        if not verdict.restart:
            self.exit_code = 1 if first.hung or first.exit_code is None else shell_code(first.exit_code)
        # A signal may have come in the meantime.
        return self._failed(restart=verdict.restart and self.signals.first is None)

    def _remember(self, first: RankEnd) -> None:
        """Keep in the run's directory what ran out of memory: the next attempt's plan passes it over."""
        notice = remember_failure(first, self._attempt.evidence.run_directory(self._attempt.ranks()))
        if notice is not None:
            _say(notice)

    def _failed(self, *, restart: bool) -> RunResult:
        if not restart:
            self._remaining_restarts = 0
        return RunResult(WorkerState.FAILED)

    @property
    def _attempt(self) -> AttemptProcesses:
        if self._current is None:
            raise RuntimeError("no attempt was started")
        return self._current

    def _signal_ranks(self, number: int) -> bool:
        return self._current is not None and self._current.send(number)

    def _kill_ranks(self) -> None:
        self._signal_ranks(signal.SIGKILL)

    def _event(self, run: Path | None, rank: int, kind: str, **fields: Any) -> None:
        if run is not None:
            EventLog(run / FILE_NAME, rank).write(kind, **json.loads(json.dumps(fields, default=str)))


def _say(text: str) -> None:
    # A terminal that is gone must not end the agent before its ranks.
    with contextlib.suppress(OSError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
