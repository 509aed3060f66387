"""The main path: from a config to a trained model. `fit` reads like the list of its steps."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from launcher import __version__
from launcher.activity import doing
from launcher.agreement import RankFacts, agree_on
from launcher.config import RunConfig
from launcher.deepspeed_source import with_deepspeed_file
from launcher.errors import LauncherError
from launcher.events import FILE_NAME, EventLog
from launcher.exchange import Decision, exchange
from launcher.hardware import library_versions
from launcher.memory_record import MemoryRecord, read_memory_record
from launcher.plan import Plan
from launcher.plan_table import print_plan
from launcher.process_group import open_store, process_group
from launcher.rank_log import RankLog
from launcher.rank_report import RankReport
from launcher.run_directory import RunDirectory, find_run, open_run_directory, write_plan
from launcher.terminal import make_console
from launcher.topology import Topology
from launcher.whole_file import make_private

if TYPE_CHECKING:
    from launcher.user_objects import UserObjects

_RUN_NAME_KEY = "launcher/run_name"
_OWNER_KEY = "launcher/run_owner"


@dataclass(frozen=True)
class FitResult:
    """What came of a run.

    Attributes:
        run: its directory.
        plan: what was trained with.
        metrics: the last value of every metric.
        steps: optimizer steps done.
        checkpoint: the checkpoint to go on from, None if none was written.
        best: the best checkpoint by `checkpoint.monitor`, else the last; None if none was written.
        trainer: Lightning's, after the fit.
    """

    run: Path
    plan: Plan
    metrics: Mapping[str, float]
    steps: int
    checkpoint: Path | None
    best: Path | None = None
    trainer: Any = None


def fit(
    config: RunConfig,
    *,
    env: Mapping[str, str] | None = None,
    given: UserObjects | None = None,
    terminal_ranks: Collection[int] | None = (0,),
) -> FitResult:
    """Train as one rank; the other ranks, if there are any, do the same.

    Args:
        config: what to train, equal on all ranks.
        env: says which rank this is; `os.environ` if not given.
        given: objects made in code, trained instead of what the config names.
        terminal_ranks: the ranks whose output goes to the terminal too; None means all.

    Raises:
        UsageError: the ranks cannot train what was asked for; nothing was trained and no earlier run touched.
        TrainingError: the model's or the data's own code raised.
        Interrupted: a signal stopped the run at a step boundary, after a checkpoint.
    """
    topology = Topology.from_env(os.environ if env is None else env, socket.gethostname())
    report = RankReport.from_env(os.environ if env is None else env)
    config = with_deepspeed_file(config)
    log = RankLog(Path(config.runs_dir).absolute(), topology.rank, terminal_ranks)
    run: RunDirectory | None = None
    try:
        attach_log(log)
        report.tell(log=log.path)
        facts = gather_facts(config, topology, given)
        store = open_store(topology, config.agreement_timeout)
        decision, run = decide_together(config, topology, facts, store, given)
        plan = Plan.from_dict(decision.values["plan"])
        log.move_to(run.log_file(topology.rank))
        report.tell(log=log.path, run=run.path)
        events = EventLog(run.path / FILE_NAME, topology.rank)
        console = make_console()
        announce(config, topology, plan, run, events, console, decision.attempt)
        timeout, dumps = config.process_group_timeout, run.log_file(topology.rank).parent
        with process_group(store, topology, plan.strategy.backend, decision.attempt, timeout, dumps):
            from launcher.training import train

            return train(config, topology, plan, run, store, decision.attempt, events, console, report, given)
    except BaseException as error:
        report.raised(error)
        raise
    finally:
        if run is not None:
            _close(run)
        log.detach()
        log.discard_pending()


def _close(run: RunDirectory) -> None:
    if run.lock is not None:
        # The directory has kept others out; whoever opens it keeps nothing open that a library wrote.
        with contextlib.suppress(OSError):
            make_private(run.path)
    run.release()


def attach_log(log: RankLog) -> None:
    """Begin this rank's log; a folder that cannot be written is told when the run directory is made."""
    try:
        log.attach()
    except OSError:
        return


def gather_facts(config: RunConfig, topology: Topology, given: UserObjects | None = None) -> RankFacts:
    """This rank's side of the agreement; what it cannot do goes in as its error, so that the others hear of it."""
    try:
        from launcher.deepspeed_ready import deepspeed_facts
        from launcher.hardware import detect_hardware
        from launcher.ranks import check_ranks
        from launcher.user_classes import import_classes

        check_ranks(config, topology)
        hardware = detect_hardware(config.accelerator, topology.local_rank)
        known = deepspeed_facts(config, hardware.device.kind, os.environ)
        traits = import_classes(config).traits() if given is None else given.traits()
    except LauncherError as error:
        if topology.world_size == 1:
            raise
        return RankFacts.of(topology, error=str(error), config_digest=config.digest())
    return RankFacts.of(topology, hardware=hardware, config_digest=config.digest(), traits=traits, **known)


def decide_together(
    config: RunConfig, topology: Topology, facts: RankFacts, store: Any, given: UserObjects | None = None
) -> tuple[Decision, RunDirectory]:
    """Agree, plan, and open the run directory: all of it on rank zero, for every rank."""
    from launcher.fit_plan import plan_for_fit
    from launcher.resume import check_checkpoint

    opened: list[RunDirectory] = []

    def decide(everybody: Sequence[RankFacts]) -> Mapping[str, Any]:
        agreement = agree_on(everybody)
        # An agent's store outlives a failed attempt: what is in it is this launch's own run.
        restart_of = store.get(_RUN_NAME_KEY).decode() if store.check([_RUN_NAME_KEY]) else None
        place = find_run(config, restart_of=restart_of)
        checkpoint = place.resume_from
        with doing("reading the checkpoint"):
            trained_in = None if checkpoint is None else check_checkpoint(checkpoint)
        # Models made in code have no name by which a later launch could tell them apart: a restart has the same one.
        known = place.exists and (given is None or restart_of is not None)
        record = read_memory_record(place.path) if known else MemoryRecord()
        with doing("choosing strategy and precision"):
            plan = plan_for_fit(config, agreement, trained_in, given=given, record=record)
        plan = dataclasses.replace(plan, notices=(*place.notices, *plan.notices))
        previous = store.get(_OWNER_KEY).decode() if store.check([_OWNER_KEY]) else None
        run = open_run_directory(config, restart_of=restart_of, previous_owner=previous)
        opened.append(run)
        if run.lock is not None:
            store.set(_OWNER_KEY, run.lock.owner.token)
            if run.lock.notice is not None:
                plan = dataclasses.replace(plan, notices=(*plan.notices, run.lock.notice))
        store.set(_RUN_NAME_KEY, run.name)
        write_plan(run, plan.to_dict())
        return {"plan": plan.to_dict(), "run": run.to_dict()}

    flat, timeout = flatten(config.to_dict()), config.agreement_timeout
    decision = exchange(store, topology.world_size, facts, flat, decide, timeout, _say_waiting)
    return decision, opened[0] if opened else RunDirectory.from_dict(decision.values["run"])


def _say_waiting(text: str) -> None:
    sys.stderr.write(f"notice: {text}\n")
    sys.stderr.flush()


def refuse_together(topology: Topology, error: LauncherError) -> None:
    """Tell the other ranks that this one has no valid config, and hear theirs.

    Raises:
        AgreementError: always; names the ranks that have an error, unless all have the same.
    """
    timeout = RunConfig().agreement_timeout

    def decide(everybody: Sequence[RankFacts]) -> Mapping[str, Any]:
        agree_on(everybody)
        raise error

    store = open_store(topology, timeout)
    exchange(store, topology.world_size, RankFacts.of(topology, error=str(error)), {}, decide, timeout)


def announce(
    config: RunConfig,
    topology: Topology,
    plan: Plan,
    run: RunDirectory,
    events: EventLog,
    console: Console,
    attempt: str,
) -> None:
    """Rank zero tells the terminal and the events what is about to happen."""
    if topology.rank != 0:
        return
    events.write("run_started", name=run.name, attempt=attempt, restart_count=topology.restart_count,
                 source=topology.source, config_digest=config.digest(), wandb_id=run.wandb_id,
                 host=topology.host, versions={"launcher": __version__, **library_versions()})  # fmt: skip
    events.write("planned", plan=plan.to_dict())
    if plan.precision_before is not None:
        events.write("precision_changed", checkpoint=plan.precision_before, run=plan.precision)
    if plan.ran_out:
        events.write("strategy_changed", ran_out=plan.ran_out, strategy=plan.strategy.name)
    for notice in plan.notices:
        events.write("notice", message=notice)
    print_plan(plan, console)
    if run.resume_from is not None:
        events.write("resumed", checkpoint=str(run.resume_from))
        console.print(f"resuming from {run.resume_from}", highlight=False, markup=False)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted path."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
