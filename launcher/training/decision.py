"""The ranks' decision before a run: rank zero plans with the facts of all ranks and opens the run directory."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from launcher.agreement.facts import RankFacts, agree_on
from launcher.agreement.handshake import Decision, Participant, exchange
from launcher.agreement.process_group import open_store
from launcher.agreement.script_ranks import check_script_ranks, is_script_rank
from launcher.config.schema import RunConfig
from launcher.core.errors import LauncherError
from launcher.core.nested import flatten
from launcher.core.secrets import digests, redact
from launcher.hardware.topology import Topology
from launcher.process.activity import doing
from launcher.process.kept_folder import find_kept_folder
from launcher.process.rank_status import FOLDER_VARIABLE
from launcher.runs.directory import RunDirectory, open_run_directory, write_plan
from launcher.runs.oom_record import MemoryRecord, read_memory_record
from launcher.runs.selection import find_run

if TYPE_CHECKING:
    from launcher.user_code.objects import UserObjects

_RUN_NAME_KEY = "launcher/run_name"
_OWNER_KEY = "launcher/run_owner"
_CONFIG_KEY = "launcher/run_config"
# Only rank zero uses these. They may differ: a script may derive them from the time, hydra from each rank's own start.
_RANK_ZERO_SETTINGS = ("name", "runs_dir", "wandb")


def gather_facts(
    config: RunConfig, topology: Topology, given: UserObjects | None = None, *, loader: str = "train_dataloader"
) -> RankFacts:
    """This rank's facts for the agreement, including its error, which the other ranks report too.

    `loader` is the data loader that the classes of the config must have.
    """
    try:
        from launcher.hardware.devices import detect_hardware
        from launcher.hardware.rank_count import check_ranks
        from launcher.planning.deepspeed_facts import deepspeed_facts
        from launcher.user_code.classes import import_classes
        from launcher.user_code.loaders import check_loader
        from launcher.user_code.sources import digest_of, user_sources

        check_ranks(config, topology)
        hardware = detect_hardware(config.accelerator, topology.local_rank)
        known = deepspeed_facts(config, hardware.device.kind, os.environ)
        if given is None:
            classes = import_classes(config)
            check_loader(config, classes, loader)
            traits = classes.traits()
        else:
            traits = given.traits()
    except LauncherError as error:
        if topology.world_size == 1:
            raise
        return RankFacts.of(topology, error=str(error), config_digest=_compared(config).digest())
    # One rank has no other rank's code to compare with. An agent's ranks have one folder and one environment.
    is_one_agents = topology.local_world_size == topology.world_size and FOLDER_VARIABLE in os.environ
    sources = {} if is_one_agents or topology.world_size == 1 else user_sources(sys.modules)
    return RankFacts.of(
        topology,
        hardware=hardware,
        config_digest=_compared(config).digest(),
        secrets=digests(config.to_dict()),
        traits=traits,
        sources_digest=digest_of(sources),
        sources=sources,
        **known,
    )


def decide_together(
    config: RunConfig, topology: Topology, facts: RankFacts, store: Any, given: UserObjects | None = None
) -> tuple[Decision, RunDirectory]:
    """Agree on the plan and the run directory that rank zero creates."""
    opened: list[RunDirectory] = []

    def decide(all_facts: Sequence[RankFacts]) -> Mapping[str, Any]:
        values, run = _plan_and_open(config, topology, all_facts, store, given)
        opened.append(run)
        return values

    participant = _participant(config, topology, facts, store)
    check_peers = check_script_ranks if is_script_rank() else None
    decision = exchange(dataclasses.replace(participant, notify=_print_waiting, check_peers=check_peers), decide)
    return decision, opened[0] if opened else RunDirectory.from_dict(decision.values["run"])


def _plan_and_open(
    config: RunConfig, topology: Topology, all_facts: Sequence[RankFacts], store: Any, given: UserObjects | None
) -> tuple[Mapping[str, Any], RunDirectory]:
    """The plan and the run as plain values, and the run directory, which rank zero holds open."""
    from launcher.checkpoint.reader import Trust
    from launcher.checkpoint.resume import check_checkpoint
    from launcher.planning.fit_plan import plan_for_fit

    agreement = agree_on(all_facts)
    # An agent's store outlives a failed attempt and contains the name of this launch's run.
    restart_of = store.get(_RUN_NAME_KEY).decode() if store.check([_RUN_NAME_KEY]) else None
    # SLURM sets its count for all processes of a job, also if another launcher creates the ranks.
    is_requeued = topology.restart_count > 0 or os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")
    kept = find_kept_folder(os.environ)
    place = find_run(config, restart_of=restart_of, is_requeued=is_requeued, kept_folder=kept)
    checkpoint = place.resume_from
    with doing("reading the checkpoint"):
        trust = Trust(place.path, everywhere=config.resume_trust, kept=kept)
        trained_in = None if checkpoint is None else check_checkpoint(checkpoint, trust)
    # A model made in code has no name that identifies it in a later launch, only in a restart of this one.
    is_known = place.exists and (given is None or restart_of is not None)
    record = read_memory_record(place.path) if is_known else MemoryRecord()
    with doing("choosing strategy and precision"):
        plan = plan_for_fit(config, agreement, trained_in, given=given, record=record)
    previous = store.get(_OWNER_KEY).decode() if store.check([_OWNER_KEY]) else None
    config_digest = config.digest()
    has_config = (
        restart_of is not None and store.check([_CONFIG_KEY]) and store.get(_CONFIG_KEY).decode() == config_digest
    )
    run = open_run_directory(config, restart_of=restart_of, is_requeued=is_requeued, previous_owner=previous,
                             wandb_id=os.environ.get("WANDB_RUN_ID"), has_config=has_config)  # fmt: skip
    run = dataclasses.replace(run, resume_from=checkpoint)
    store.set(_CONFIG_KEY, config_digest)
    notices = [*place.notices, *plan.notices]
    if run.lock is not None:
        store.set(_OWNER_KEY, run.lock.owner.token)
        notices += [] if run.lock.notice is None else [run.lock.notice]
    plan = dataclasses.replace(plan, notices=tuple(notices))
    store.set(_RUN_NAME_KEY, run.name)
    write_plan(run, redact(plan.to_dict()))
    return {"plan": plan.to_dict(), "run": run.to_dict()}, run


def ask_rank_zero(
    config: RunConfig,
    topology: Topology,
    facts: RankFacts,
    store: Any,
    decide: Callable[[Sequence[RankFacts]], Mapping[str, Any]],
) -> Decision:
    """Let rank zero decide with the facts of all ranks; see `launcher.agreement.handshake.exchange`."""
    return exchange(_participant(config, topology, facts, store), decide)


def refuse_together(topology: Topology, error: LauncherError) -> None:
    """Report to the other ranks that this rank has no valid config, and receive their errors.

    Raises:
        AgreementError: always; names the ranks that have an error, unless all have the same.
    """
    timeout = RunConfig().agreement_timeout

    def decide(all_facts: Sequence[RankFacts]) -> Mapping[str, Any]:
        agree_on(all_facts)
        raise error

    store = open_store(topology, timeout)
    exchange(Participant(store, topology.world_size, RankFacts.of(topology, error=str(error)), timeout), decide)


def _compared(config: RunConfig) -> RunConfig:
    """The settings that must be equal on all ranks."""
    defaults = RunConfig()
    return dataclasses.replace(config, **{name: getattr(defaults, name) for name in _RANK_ZERO_SETTINGS})


def _participant(config: RunConfig, topology: Topology, facts: RankFacts, store: Any) -> Participant:
    compared = flatten(redact(_compared(config).to_dict()))
    return Participant(store, topology.world_size, facts, config.agreement_timeout, compared)


def _print_waiting(text: str) -> None:
    sys.stderr.write(f"notice: {text}\n")
    sys.stderr.flush()
