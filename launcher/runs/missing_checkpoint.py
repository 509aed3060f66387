"""A run that has trained and has no checkpoint: it must not begin again without a word."""

from __future__ import annotations

from pathlib import Path

from launcher.core.errors import ResumeError
from launcher.core.events import FILE_NAME, read_events

_SAY_STEPS = ("first_step", "step", "validation", "checkpoint", "training_ended")


def check_missing_checkpoint(run: Path, may_begin_again: bool) -> tuple[str, ...]:
    """What to tell of a run without a checkpoint that is to be gone on with; nothing if it has not trained.

    Args:
        run: its directory.
        may_begin_again: whether nobody asked for this start: a restart, or a job that was queued again.

    Raises:
        ResumeError: it has trained, and may not begin again.
    """
    steps = last_trained_step(run)
    if not steps:
        return ()
    if may_begin_again:
        return (f"the run trained to step {steps} before, and saved nothing: it begins again at step 0",)
    raise ResumeError(
        f"resume: run {run.name!r} trained to step {steps}, but {run / 'checkpoints'} holds no checkpoint to go on "
        "from; give one that lies elsewhere (--resume PATH), or start again under another --name with --resume none"
    )


def last_trained_step(run: Path) -> int:
    """How far a run's attempts came, in optimizer steps; 0 if no event says that one was done."""
    events = run / FILE_NAME
    if not events.exists():
        return 0
    steps = (event.get("step") for event in read_events(events) if event["kind"] in _SAY_STEPS)
    return max((step for step in steps if type(step) is int), default=0)
