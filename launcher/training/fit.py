"""The main path, from a config to a trained model: `fit` lists its steps."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.agreement.process_group import GroupSettings, open_store, process_group
from launcher.checkpoint.manifest import read_step
from launcher.config.deepspeed_file import with_deepspeed_file
from launcher.config.schema import RunConfig
from launcher.core.atomic_write import make_private
from launcher.core.distribution import __version__
from launcher.core.events import FILE_NAME, EventLog
from launcher.core.output import RunOutput
from launcher.core.python_terms import to_python_terms
from launcher.core.secrets import redact
from launcher.core.terminal import make_console
from launcher.hardware.devices import library_versions
from launcher.planning.plan import Plan
from launcher.planning.table import print_plan
from launcher.process.kept_folder import find_kept_folder
from launcher.process.open_resources import close_kept_open
from launcher.process.titles import set_rank_title
from launcher.runs.directory import RunDirectory
from launcher.runs.kept_state import is_kept_state
from launcher.runs.launch_times import list_launch_times
from launcher.training.context import RunContext
from launcher.training.decision import decide_together, gather_facts
from launcher.training.failures import record_ending
from launcher.training.result import FitResult
from launcher.training.script_end import ends_script
from launcher.training.session import rank_session

if TYPE_CHECKING:
    from launcher.user_code.objects import UserObjects


@ends_script
def fit(
    config: RunConfig,
    *,
    env: Mapping[str, str] | None = None,
    given: UserObjects | None = None,
    terminal_ranks: Collection[int] | None = (0,),
    stays_open: bool = True,
) -> FitResult:
    """Train as one rank; all other ranks call this too.

    Args:
        config: what to train, equal on all ranks.
        env: defines which rank this is; `os.environ` if not given.
        given: objects made in code, trained instead of those that the config names.
        terminal_ranks: ranks whose output goes to the terminal too; None means all.
        stays_open: whether the process group and the W&B run stay open for the returned Trainer; the next training or
            the end of the interpreter closes them.

    Raises:
        UsageError: the ranks cannot train this; nothing was trained and no earlier run was changed.
        TrainingError: the code of the model or the data raised an error.
        Interrupted: a signal stopped the run at a step boundary, after a checkpoint. It is also a `SystemExit` with
            code 128 + signal, and a `KeyboardInterrupt` after Ctrl-C. With `stays_open`, the script's own handler of
            the signal has been called.
    """
    called = time.time()
    config = with_deepspeed_file(config)
    with rank_session(config, os.environ if env is None else env, terminal_ranks) as session:
        topology = session.topology
        agreement = time.time()
        facts = gather_facts(config, topology, given)
        store = open_store(topology, config.agreement_timeout)
        decision, run = decide_together(config, topology, facts, store, given)
        with _released(run):
            plan = Plan.from_dict(decision.values["plan"])
            set_rank_title(topology.rank, topology.world_size, run.name)
            session.move_log(run.log_file(topology.rank), run=run.path)
            _remove_unused_folder(Path(config.runs_dir).absolute(), run)
            translate = str if given is None else to_python_terms
            plan = replace(plan, notices=tuple(map(translate, plan.notices)))
            output = RunOutput(EventLog(run.path / FILE_NAME, topology.rank), make_console(), topology.rank == 0,
                               translate=translate)  # fmt: skip
            ctx = RunContext(config, topology, plan, run, store, decision.attempt, output, session.status, given,
                             stays_open, find_kept_folder(os.environ))  # fmt: skip
            is_torchrun = topology.source == "torchrun"
            announce(ctx, list_launch_times(
                run.path, os.environ, pid=os.getpid(), parent=os.getppid() if is_torchrun else None,
                called=called if stays_open else None, agreement=agreement,
            ))  # fmt: skip
            close_kept_open()
            group = GroupSettings(plan.strategy.backend, ctx.attempt, config.process_group_timeout,
                                  run.log_file(topology.rank).parent, stays_open)  # fmt: skip
            with record_ending(ctx), process_group(store, topology, group):
                from launcher.training.run import train

                return train(ctx)


@contextlib.contextmanager
def _released(run: RunDirectory) -> Iterator[None]:
    """Release the run directory at the end."""
    try:
        yield
    finally:
        if run.lock is not None:
            # Files that libraries wrote into it may be readable by others.
            with contextlib.suppress(OSError):
                make_private(run.path)
        run.release()


def _remove_unused_folder(runs: Path, run: RunDirectory) -> None:
    """Remove this rank's `runs_dir` if rank zero uses another one."""
    if runs != run.path.parent:
        with contextlib.suppress(OSError):  # it is not empty
            runs.rmdir()


def announce(ctx: RunContext, times: Mapping[str, float | None]) -> None:
    """Rank zero shows the plan on the terminal and writes it to the events, with the times of the launch."""
    if ctx.topology.rank != 0:
        return
    plan, run, events, console = ctx.plan, ctx.run, ctx.output.events, ctx.output.console
    events.write("run_started", name=run.name, attempt=ctx.attempt, restart_count=ctx.topology.restart_count,
                 source=ctx.topology.source, config_digest=ctx.config.digest(), wandb_id=run.wandb_id,
                 host=ctx.topology.host, continue_with=ctx.arguments_to_continue,
                 versions={"launcher": __version__, **library_versions()}, times=times)  # fmt: skip
    events.write("planned", plan=redact(plan.to_dict()))
    if plan.precision_before is not None:
        events.write("precision_changed", checkpoint=plan.precision_before, run=plan.precision)
    if plan.ran_out:
        events.write("strategy_changed", ran_out=plan.ran_out, strategy=plan.strategy.name,
                     activation_checkpointing=plan.activation_checkpointing)  # fmt: skip
    for notice in plan.notices:
        events.write("notice", message=notice)
    print_plan(plan, console)
    if ctx.stays_open:
        # In a script nothing else names it.
        console.print(f"run directory: {run.path}", highlight=False, markup=False, soft_wrap=True)
    if run.resume_from is not None:
        step, is_kept = read_step(run.resume_from), is_kept_state(run.resume_from)
        events.write("resumed", checkpoint=str(run.resume_from), step=step, kept=is_kept)
        source = f"step {step}, which the ranks that did not fail have kept" if is_kept else str(run.resume_from)
        console.print(f"resuming from {source}", highlight=False, markup=False, soft_wrap=True)
