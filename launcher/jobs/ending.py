"""Why a run ended, and what to do next: from its events, and from the state of its job. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from launcher.core.event_text import as_text, remove_end, signal_name, summarize_error
from launcher.core.python_terms import to_python_terms
from launcher.jobs.steps import StepReader
from strategies.units import format_bytes

State = Literal["done", "stopped", "failed", "cancelled", "ended"]
Event = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Ending:
    """How an attempt ended.

    Attributes:
        reason: one word for programs, as `max_time`, `exception` or `hung`.
        text: the same for people, without a full stop.
        advice: what to do next, a short phrase; empty if there is nothing to do.
        can_resume: whether `--resume auto` goes on from a checkpoint.
    """

    state: State
    reason: str
    text: str
    advice: str = ""
    can_resume: bool = False


@dataclass(frozen=True, slots=True)
class _Cause:
    """One way of failing: `text` may name fields of the event, and `advice` those of the run."""

    text: str
    advice: str


# By the reason of a `failed` or `rank_failed` event; `{error}` is the exception, `{who}` the rank and its host.
_FAILURES: Mapping[str, _Cause] = {
    "exception": _Cause("{who}: {error}", "fix it"),
    "usage": _Cause("{error}", "correct the command or the config"),
    "disk_full": _Cause("{who}: no space left on {folder}{space}", "free disk space"),
    "quota": _Cause("{who}: the disk quota of {folder} is exceeded{space}", "free disk space"),
    "read_only": _Cause("{who}: {folder} is read-only", "choose a folder that can be written"),
    "no_permission": _Cause("{who}: no permission to write {folder}", "choose a folder of yours"),
    "killed": _Cause("{who} was killed from outside ({signal})", "look for who or what killed it"),
    "crashed": _Cause("{who} crashed ({signal})", "see: launcher logs {name} --rank {rank}"),
    "out_of_memory": _Cause("{who}: out of memory{detail}", "use a smaller batch"),
    "host_memory": _Cause("{who} was killed by the kernel: out of host memory", "use fewer loader workers"),
    "hung": _Cause("{who} hung{detail}", "see: launcher logs {name} --rank {rank}"),
    "lost_connection": _Cause("{who} lost the connection to other ranks or nodes", "check the nodes and the network"),
    "nodes_missing": _Cause("{nodes} did not join", "check these nodes"),
    "exit": _Cause("{who} ended with exit code {code}", "see: launcher logs {name} --rank {rank}"),
}  # fmt: skip
_FINISHED: Mapping[str, tuple[str, str]] = {
    "max_epochs": ("all {epochs} done", ""),
    "max_steps": ("all {steps} done", ""),
    "max_time": ("trainer.max_time is over, after {steps}", "a larger trainer.max_time goes on"),
    "early_stopping": ("stopped early: {message}", ""),
    "should_stop": ("the user's code stopped the training after {steps}", ""),
    "nothing_to_train": ("{message}", ""),
}
# By the state that SLURM gives an ended job; the events show more about a plain failure.
_JOBS: Mapping[str, tuple[str, str, str]] = {
    "TIMEOUT": ("time_limit", "SLURM ended the job at its time limit", "ask for more --time"),
    "DEADLINE": ("time_limit", "SLURM ended the job at its deadline", "ask for a later deadline"),
    "PREEMPTED": ("preempted", "SLURM preempted the job for another one", ""),
    "NODE_FAIL": ("node_failure", "a node of the job failed", ""),
    "BOOT_FAIL": ("node_failure", "a node of the job did not start", ""),
    "OUT_OF_MEMORY": ("out_of_memory", "SLURM killed the job: out of the memory it asked for", "ask for more --mem"),
    "CANCELLED": ("cancelled", "the job was cancelled", ""),
    "REVOKED": ("cancelled", "another cluster took the job", ""),
}
_LONGEST = 400


class EndingReader:
    """Collects the events of the newest attempt that show how it ended."""

    def __init__(self) -> None:
        self._finished: Event | None = None
        self._interrupted: Event | None = None
        self._failed: Event | None = None
        self._by_agent: Event | None = None
        self._hang: Event | None = None
        self._missing: Event | None = None
        self._has_checkpoint = False
        self._is_script = True
        self.script_arguments = ""  # with which a script continues the run; empty for a command
        self._steps = StepReader()
        self.checkpoint_step: int | None = None

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self._steps.step or 0

    def add(self, event: Event) -> None:
        """Add one event, in the order of the file."""
        kind = event.get("kind")
        step = event.get("step")
        self._steps.add(event)
        if kind == "checkpoint":
            self.checkpoint_step = step if type(step) is int else 0
        elif kind == "run_started":
            self.script_arguments = as_text(event.get("continue_with"))
            self._finished = self._interrupted = self._failed = self._by_agent = self._hang = self._missing = None
        elif kind == "finished":
            self._finished = event
        elif kind in ("interrupted", "preempted"):
            # The agent ends the other ranks of a failure with a signal; and a stop may break the others' connections.
            if self._failed is None and (self._interrupted is None or event.get("second") is True):
                self._interrupted = event
        elif kind in ("failed", "out_of_memory"):
            # The first rank that failed is the cause.
            if self._interrupted is None:
                self._failed = self._failed or event
            self._correct_checkpoint(event)
        elif kind == "rank_failed":
            self._by_agent = event
        elif kind == "hang":
            self._hang = event
        elif kind == "nodes_missing":
            self._missing = event
        elif kind == "planned":
            self._is_script = False

    def _correct_checkpoint(self, event: Event) -> None:
        """A `checkpoint` event is written before the file, which a full disk may reject; a failure has the newest."""
        step = event.get("checkpoint_step")
        if type(step) is int:
            self.checkpoint_step = step
        elif "checkpoint_step" in event and event.get("checkpoint") is None:
            self.checkpoint_step = None

    def find_ending(self, name: str) -> Ending | None:
        """How the newest attempt of the run ended; None if no event shows it, or if another attempt follows."""
        if self._by_agent is not None and self._by_agent.get("restart") is True:
            return None
        if self._missing is not None:
            return self._describe_failure(self._missing, "nodes_missing", name)
        if self._failed is not None or (self._by_agent is not None and self._interrupted is None):
            event = self._find_cause()
            return self._describe_failure(event, _find_reason(event, self._hang), name)
        if self._finished is not None:
            return self._describe_finish(self._finished)
        return None if self._interrupted is None else self._describe_stop(self._interrupted)

    def _find_cause(self) -> Event:
        """The failure of the first rank: the agent saw all ranks, and a rank may know more about its own failure."""
        if self._by_agent is None:
            return self._failed or {}
        is_same = self._failed is not None and self._failed.get("rank") == self._by_agent.get("rank")
        return {**(self._failed or {} if is_same else {}), **_given(self._by_agent)}

    def describe_unreported(self) -> Ending:
        """The ending of an attempt that wrote none, as after SIGKILL of all its processes."""
        text = "no report at its end: killed, or the node was lost"
        return Ending("ended", "unreported", text, self._advise(""), self._can_resume)

    @property
    def _can_resume(self) -> bool:
        # A `checkpoint` event is written before the file, which a full disk may reject; the failure names the newest.
        failures = [event for event in (self._failed, self._by_agent) if event is not None and "checkpoint" in event]
        is_lost = bool(failures) and all(event["checkpoint"] is None for event in failures)
        return self.checkpoint_step is not None and not is_lost and not self._is_script

    def _advise(self, first: str) -> str:
        again = f"run the script again with {self.script_arguments}" if self.script_arguments else "--resume auto"
        again = again if self._can_resume else "run it again"
        if not first:
            return "--resume auto continues it" if again == "--resume auto" else again
        return f"{first}; then {again}"

    def _describe_finish(self, event: Event) -> Ending:
        reason = as_text(event.get("reason"))
        # A plain script reports no steps.
        default = "done" if event.get("step") is None else "done after {steps}"
        text, advice = _FINISHED.get(reason, (default, ""))
        if self.script_arguments:
            text, advice = to_python_terms(text), to_python_terms(advice)
        epochs = event.get("epoch")
        values = {
            "steps": _count(event.get("step"), "step"),
            "epochs": _count(epochs, "epoch"),
            "message": as_text(event.get("message")) or "nothing was left to train",
        }
        if reason == "max_epochs" and type(epochs) is not int:
            text = "all epochs done"
        text = "; ".join(filter(None, (text.format_map(values), as_text(event.get("problem")))))
        return Ending("done", reason or "finished", _one_line(text), advice, bool(advice))

    def _describe_stop(self, event: Event) -> Ending:
        number = event.get("signal")
        reason = as_text(event.get("reason")) or {2: "ctrl_c", 15: "sigterm"}.get(
            number if type(number) is int else 0, "signal"
        )
        who = "Ctrl-C" if reason == "ctrl_c" else signal_name(number) if type(number) is int else "a signal"
        saved = "checkpoint saved" if event.get("checkpoint") else "no checkpoint saved"
        text = f"ended at once by a second {who}" if event.get("second") is True else f"stopped by {who}"
        step = event.get("step")
        if type(step) is int:
            text += f" at step {step}; {saved}" if step >= 0 else " before the training"
        elif event.get("exit_code") == 0:
            text += "; all ranks ended with exit code 0"
        return Ending("stopped", reason, text, self._advise(""), self._can_resume)

    def _describe_failure(self, event: Event, reason: str, name: str) -> Ending:
        cause = _FAILURES.get(reason, _FAILURES["exception"])
        host, rank = as_text(event.get("host")), event.get("rank", 0)
        values = {
            "who": f"rank {rank}" + (f" on {host}" if host else ""),
            "error": _read_error(event) or "failed without a message",
            "folder": as_text(event.get("folder")) or "the disk of the run",
            "space": _describe_space(event),
            "signal": _describe_signal(event),
            "code": event.get("exit_code"),
            "nodes": _describe_nodes(event),
            "detail": _describe_detail(event, reason, self._hang, "collective" if self._is_script else "step"),
        }  # fmt: skip
        text = _one_line(cause.text.format_map(values))
        advice = cause.advice.format(name=name, rank=rank)
        strategy = event.get("next")
        if reason == "out_of_memory" and strategy:
            advice = f"try strategy {strategy}, or a smaller batch"
        return Ending("failed", reason, text, self._advise(advice), self._can_resume)


def combine_with_job(ending: Ending, job_state: str, job_detail: str) -> Ending:
    """The ending of a run whose job ended in this state, with its detail: SLURM's word and the exit code."""
    word = job_detail.partition(",")[0]
    known = _JOBS.get(word)
    if known is None:
        text = ": ".join(filter(None, (job_detail, ending.text if ending.reason != "unreported" else "")))
        return replace(ending, state="failed" if job_state == "failed" else ending.state, text=text or ending.text)
    reason, text, advice = known
    # What a rank reported itself, as that it saved a checkpoint at SLURM's warning, is part of the story.
    more = "" if ending.reason == "unreported" else f"; {ending.text}"
    again = "submit it again to go on" if ending.can_resume else "submit it again"
    state: State = "cancelled" if reason == "cancelled" else "failed"
    return Ending(state, reason, f"{word}: {text}{more}", f"{advice}; {again}" if advice else again, ending.can_resume)


def _find_reason(event: Event, hang: Event | None) -> str:
    """The reason; older versions recorded none."""
    reason = as_text(event.get("reason"))
    code = event.get("exit_code")
    if reason:
        is_kernel = reason == "out_of_memory" and code == -9
        return "host_memory" if is_kernel else reason
    rules: tuple[tuple[str, Callable[[], bool]], ...] = (
        ("hung", lambda: bool(event.get("hung")) or (hang is not None and not event.get("error"))),
        ("host_memory", lambda: bool(event.get("out_of_memory")) and code == -9),
        ("out_of_memory", lambda: bool(event.get("out_of_memory")) or event.get("kind") == "out_of_memory"
         or "strategy" in event),
        ("exception", lambda: bool(event.get("error"))),
        ("killed", lambda: code in (-9, -15)),
        ("crashed", lambda: type(code) is int and code < 0),
        ("exit", lambda: type(code) is int),
    )  # fmt: skip
    return next((word for word, holds in rules if holds()), "exception")


def _given(event: Event) -> dict[str, Any]:
    """The fields that have a value: the agent does not repeat what a rank reported."""
    return {key: value for key, value in event.items() if value is not None}


def _describe_detail(event: Event, reason: str, hang: Event | None, what: str) -> str:
    if reason == "hung":
        waiting = (hang or event).get("waiting_for")
        seconds = (hang or event).get("seconds")
        after = f": no {what} for {seconds:.0f} s" if isinstance(seconds, int | float) else ""
        ranks = ", ".join(map(str, waiting)) if isinstance(waiting, list) else ""
        return after + (f"; the others wait for rank {ranks}" if ranks else "")
    if reason == "out_of_memory":
        strategy = event.get("strategy")
        return f" with {strategy}" if strategy else ""
    return ""


def _describe_signal(event: Event) -> str:
    code = event.get("exit_code")
    return signal_name(-code) if type(code) is int and code < 0 else "a signal"


def _describe_nodes(event: Event) -> str:
    nodes = event.get("nodes")
    if not isinstance(nodes, list) or not nodes:
        return "a node"
    return f"node{'s' if len(nodes) > 1 else ''} {', '.join(map(str, nodes))}"


def _describe_space(event: Event) -> str:
    needed, free = event.get("needed_bytes"), event.get("free_bytes")
    parts = [f"{format_bytes(amount)} {word}" for amount, word in ((needed, "needed"), (free, "free"))
             if type(amount) is int]  # fmt: skip
    return f": {', '.join(parts)}" if parts else ""


def _count(value: Any, noun: str) -> str:
    return f"{max(value, 0):,} {noun}{'' if value == 1 else 's'}" if type(value) is int else f"{noun}s"


def _read_error(event: Event) -> str:
    """The text of the error; of one with the traceback of another process, its last line."""
    text = as_text(event.get("error"))
    kind, _, message = text.partition(": ")
    return summarize_error(kind, message) if kind.isidentifier() and "\nTraceback (" in message else text


def _one_line(text: str) -> str:
    line = remove_end(" ".join(text.split()))
    return line if len(line) <= _LONGEST else line[: _LONGEST - 1] + "\u2026"
