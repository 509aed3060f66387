"""The main path: from a config to a trained model. `fit` reads like the list of its steps."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.agreement.facts import RankFacts, agree_on
from launcher.agreement.handshake import Decision, Participant, exchange
from launcher.agreement.process_group import GroupSettings, open_store, process_group
from launcher.agreement.script_ranks import check_script_ranks, is_script_rank
from launcher.config.deepspeed_file import with_deepspeed_file
from launcher.config.schema import RunConfig
from launcher.core.atomic_write import make_private
from launcher.core.distribution import __version__
from launcher.core.errors import LauncherError
from launcher.core.events import FILE_NAME, EventLog
from launcher.core.nested import flatten
from launcher.core.output import RunOutput
from launcher.core.secrets import digests, find_secrets, redact
from launcher.core.terminal import make_console
from launcher.hardware.devices import library_versions
from launcher.hardware.topology import Topology
from launcher.planning.plan import Plan
from launcher.planning.table import print_plan
from launcher.process.activity import doing
from launcher.process.open_resources import close_kept_open
from launcher.process.rank_log import RankLog
from launcher.process.rank_status import RankStatusWriter
from launcher.runs.directory import RunDirectory, open_run_directory, write_plan
from launcher.runs.oom_record import MemoryRecord, read_memory_record
from launcher.runs.selection import find_run
from launcher.training.context import RunContext
from launcher.training.result import FitResult
from launcher.training.script_end import ends_script

if TYPE_CHECKING:
    from launcher.user_code.objects import UserObjects

_RUN_NAME_KEY = "launcher/run_name"
_OWNER_KEY = "launcher/run_owner"
# Rank zero alone acts upon these: a script may make them of the time, or hydra of each rank's own start.
_RANK_ZEROS = ("name", "runs_dir", "wandb")


@ends_script
def fit(
    config: RunConfig,
    *,
    env: Mapping[str, str] | None = None,
    given: UserObjects | None = None,
    terminal_ranks: Collection[int] | None = (0,),
    stays_open: bool = True,
) -> FitResult:
    """Train as one rank; the other ranks, if there are any, do the same.

    Args:
        config: what to train, equal on all ranks.
        env: says which rank this is; `os.environ` if not given.
        given: objects made in code, trained instead of what the config names.
        terminal_ranks: the ranks whose output goes to the terminal too; None means all.
        stays_open: whether the process group and the W&B run stay for the Trainer that is returned; the next training
            closes them, or the end of the interpreter.

    Raises:
        UsageError: the ranks cannot train what was asked for; nothing was trained and no earlier run touched.
        TrainingError: the model's or the data's own code raised.
        Interrupted: a signal stopped the run at a step boundary, after a checkpoint. It is a `SystemExit` with code 128
            + signal, and after Ctrl-C a `KeyboardInterrupt`, too; a handler that the script has for the signal has been
            called then, with `stays_open`.
    """
    topology = Topology.from_env(os.environ if env is None else env, socket.gethostname())
    report = RankStatusWriter.from_env(os.environ if env is None else env)
    config = with_deepspeed_file(config)
    report.hide_values(find_secrets(config.to_dict()).values())
    log = RankLog(Path(config.runs_dir).absolute(), topology.rank, terminal_ranks)
    run: RunDirectory | None = None
    try:
        attach_log(log)
        report.update(log=log.path)
        facts = gather_facts(config, topology, given)
        store = open_store(topology, config.agreement_timeout)
        decision, run = decide_together(config, topology, facts, store, given)
        plan = Plan.from_dict(decision.values["plan"])
        log.move_to(run.log_file(topology.rank))
        _remove_own_folder(Path(config.runs_dir).absolute(), run)
        report.update(log=log.path, run=run.path)
        events = EventLog(run.path / FILE_NAME, topology.rank)
        output = RunOutput(events, make_console(), topology.rank == 0)
        ctx = RunContext(config, topology, plan, run, store, decision.attempt, output, report, given, stays_open)
        announce(ctx)
        group = GroupSettings(plan.strategy.backend, decision.attempt, config.process_group_timeout,
                              run.log_file(topology.rank).parent, stays_open)  # fmt: skip
        close_kept_open()
        with process_group(store, topology, group):
            from launcher.training.run import train

            return train(ctx)
    except BaseException as error:
        report.record_error(error)
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


def _remove_own_folder(runs: Path, run: RunDirectory) -> None:
    """Where a rank was given another folder than rank zero, nothing of it stays."""
    if runs != run.path.parent:
        with contextlib.suppress(OSError):  # something else is in it
            runs.rmdir()


def attach_log(log: RankLog) -> None:
    """Begin this rank's log; a folder that cannot be written is told when the run directory is made."""
    try:
        log.attach()
    except OSError:
        return


def gather_facts(config: RunConfig, topology: Topology, given: UserObjects | None = None) -> RankFacts:
    """This rank's side of the agreement; what it cannot do goes in as its error, so that the others hear of it."""
    try:
        from launcher.hardware.devices import detect_hardware
        from launcher.hardware.rank_count import check_ranks
        from launcher.planning.deepspeed_facts import deepspeed_facts
        from launcher.user_code.classes import import_classes
        from launcher.user_code.sources import digest_of, user_sources

        check_ranks(config, topology)
        hardware = detect_hardware(config.accelerator, topology.local_rank)
        known = deepspeed_facts(config, hardware.device.kind, os.environ)
        traits = import_classes(config).traits() if given is None else given.traits()
    except LauncherError as error:
        if topology.world_size == 1:
            raise
        return RankFacts.of(topology, error=str(error), config_digest=_agreed(config).digest())
    # One rank has nobody to differ from.
    sources = user_sources(sys.modules) if topology.world_size > 1 else {}
    return RankFacts.of(
        topology,
        hardware=hardware,
        config_digest=_agreed(config).digest(),
        secrets=digests(config.to_dict()),
        traits=traits,
        sources_digest=digest_of(sources),
        sources=sources,
        **known,
    )


def decide_together(
    config: RunConfig, topology: Topology, facts: RankFacts, store: Any, given: UserObjects | None = None
) -> tuple[Decision, RunDirectory]:
    """Agree, plan, and open the run directory: all of it on rank zero, for every rank."""
    from launcher.checkpoint.reader import Trust
    from launcher.checkpoint.resume import check_checkpoint
    from launcher.planning.fit_plan import plan_for_fit

    opened: list[RunDirectory] = []

    def decide(everybody: Sequence[RankFacts]) -> Mapping[str, Any]:
        agreement = agree_on(everybody)
        # An agent's store outlives a failed attempt: what is in it is this launch's own run.
        restart_of = store.get(_RUN_NAME_KEY).decode() if store.check([_RUN_NAME_KEY]) else None
        # SLURM counts it for all processes of a job, whoever makes the ranks.
        is_requeued = topology.restart_count > 0 or os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")
        place = find_run(config, restart_of=restart_of, is_requeued=is_requeued)
        checkpoint = place.resume_from
        trust = Trust(place.path, everywhere=config.resume_trust)
        with doing("reading the checkpoint"):
            trained_in = None if checkpoint is None else check_checkpoint(checkpoint, trust)
        # Models made in code have no name by which a later launch could tell them apart: a restart has the same one.
        known = place.exists and (given is None or restart_of is not None)
        record = read_memory_record(place.path) if known else MemoryRecord()
        with doing("choosing strategy and precision"):
            plan = plan_for_fit(config, agreement, trained_in, given=given, record=record)
        plan = dataclasses.replace(plan, notices=(*place.notices, *plan.notices))
        previous = store.get(_OWNER_KEY).decode() if store.check([_OWNER_KEY]) else None
        run = open_run_directory(config, restart_of=restart_of, is_requeued=is_requeued, previous_owner=previous,
                                 wandb_id=os.environ.get("WANDB_RUN_ID"))  # fmt: skip
        opened.append(run)
        if run.lock is not None:
            store.set(_OWNER_KEY, run.lock.owner.token)
            if run.lock.notice is not None:
                plan = dataclasses.replace(plan, notices=(*plan.notices, run.lock.notice))
        store.set(_RUN_NAME_KEY, run.name)
        write_plan(run, redact(plan.to_dict()))
        return {"plan": plan.to_dict(), "run": run.to_dict()}

    participant = dataclasses.replace(
        _participant(config, topology, facts, store), notify=_notify_waiting,
        check_peers=check_script_ranks if is_script_rank() else None,
    )  # fmt: skip
    decision = exchange(participant, decide)
    return decision, opened[0] if opened else RunDirectory.from_dict(decision.values["run"])


def ask_rank_zero(
    config: RunConfig,
    topology: Topology,
    facts: RankFacts,
    store: Any,
    decide: Callable[[Sequence[RankFacts]], Mapping[str, Any]],
) -> Decision:
    """Have rank zero decide with everybody's facts; see `launcher.agreement.handshake.exchange`."""
    return exchange(_participant(config, topology, facts, store), decide)


def _participant(config: RunConfig, topology: Topology, facts: RankFacts, store: Any) -> Participant:
    compared = flatten(redact(_agreed(config).to_dict()))
    return Participant(store, topology.world_size, facts, config.agreement_timeout, compared)


def _agreed(config: RunConfig) -> RunConfig:
    """What must be equal on all ranks."""
    usual = RunConfig()
    return dataclasses.replace(config, **{name: getattr(usual, name) for name in _RANK_ZEROS})


def _notify_waiting(text: str) -> None:
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
    exchange(Participant(store, topology.world_size, RankFacts.of(topology, error=str(error)), timeout), decide)


def announce(ctx: RunContext) -> None:
    """Rank zero shows the plan on the terminal and writes it to the events."""
    if ctx.topology.rank != 0:
        return
    plan, run, events, console = ctx.plan, ctx.run, ctx.output.events, ctx.output.console
    events.write("run_started", name=run.name, attempt=ctx.attempt, restart_count=ctx.topology.restart_count,
                 source=ctx.topology.source, config_digest=ctx.config.digest(), wandb_id=run.wandb_id,
                 host=ctx.topology.host, versions={"launcher": __version__, **library_versions()})  # fmt: skip
    events.write("planned", plan=redact(plan.to_dict()))
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
