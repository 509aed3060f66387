"""Why a run ended, for every way of ending: one line, and what to do next."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest

from launcher.jobs.ending import Ending, EndingReader, combine_with_job

STARTED = {"kind": "run_started", "rank": 0}
PLANNED = {"kind": "planned", "rank": 0, "plan": {}}
SAVED = {"kind": "checkpoint", "rank": 0, "step": 40, "epoch": 0}
NEXT = "--resume auto continues it"
THEN = "then --resume auto"


def end(*events: dict[str, Any]) -> Ending:
    reader = EndingReader()
    for event in (STARTED, PLANNED, SAVED, *events):
        reader.add(event)
    found = reader.find_ending("it")
    assert found is not None
    return found


def event(kind: str, rank: int = 0, **fields: Any) -> dict[str, Any]:
    return {"kind": kind, "rank": rank, "host": "n1", **fields}


ENDINGS: list[tuple[list[dict[str, Any]], str, str, str, str]] = [
    ([event("finished", step=50, reason="max_epochs", epoch=2)], "done", "max_epochs", "all 2 epochs done", ""),
    ([event("finished", step=50, reason="max_steps")], "done", "max_steps", "all 50 steps done", ""),
    ([event("finished", step=50, reason="max_steps", problem="the training loss is not finite (alert at step 9)")],
     "done", "max_steps", "all 50 steps done; the training loss is not finite (alert at step 9)", ""),
    ([event("finished", step=50)], "done", "finished", "done after 50 steps", ""),
    ([event("finished", step=50, reason="max_time")], "done", "max_time", "trainer.max_time is over, after 50 steps",
     "a larger trainer.max_time goes on"),
    ([event("finished", step=50, reason="early_stopping", message="val_loss did not improve in 3 records")],
     "done", "early_stopping", "stopped early: val_loss did not improve in 3 records", ""),
    ([event("finished", step=50, reason="should_stop")], "done", "should_stop",
     "the user's code stopped the training after 50 steps", ""),
    ([event("finished", step=50, reason="nothing_to_train", message="all 2 epochs are done already")],
     "done", "nothing_to_train", "all 2 epochs are done already", ""),
    ([event("interrupted", signal=2, step=42, checkpoint="c", reason="ctrl_c")], "stopped", "ctrl_c",
     "stopped by Ctrl-C at step 42; checkpoint saved", NEXT),
    ([event("interrupted", signal=2, step=42, checkpoint=None)], "stopped", "ctrl_c",
     "stopped by Ctrl-C at step 42; no checkpoint saved", NEXT),
    ([event("interrupted", signal=15, step=42, checkpoint="c", reason="sigterm")], "stopped", "sigterm",
     "stopped by SIGTERM at step 42; checkpoint saved", NEXT),
    ([event("interrupted", signal=2, step=None, checkpoint=None, reason="ctrl_c", exit_code=0)], "stopped", "ctrl_c",
     "stopped by Ctrl-C; all ranks ended with exit code 0", NEXT),
    ([event("interrupted", signal=1, step=42, checkpoint="c")], "stopped", "signal",
     "stopped by SIGHUP at step 42; checkpoint saved", NEXT),
    ([event("interrupted", signal=2, step=42, checkpoint=None), event("interrupted", signal=2, step=42, second=True)],
     "stopped", "ctrl_c", "ended at once by a second Ctrl-C at step 42; no checkpoint saved", NEXT),
    ([event("failed", error="OSError", reason="disk_full", folder="/x", checkpoint=None)], "failed", "disk_full",
     "rank 0 on n1: no space left on /x", "free disk space; then run it again"),
    ([event("failed", 1, error="ValueError: no", reason="exception")], "failed", "exception",
     "rank 1 on n1: ValueError: no", f"fix it; {THEN}"),
    ([event("failed", 0, error="ValueError: no"), event("failed", 1, error="Connection reset by peer")],
     "failed", "exception", "rank 0 on n1: ValueError: no", f"fix it; {THEN}"),
    ([event("failed", 0, error="Connection reset by peer"),
      event("rank_failed", 1, host="n2", exit_code=1, error="ValueError: no", restart=False, reason="exception")],
     "failed", "exception", "rank 1 on n2: ValueError: no", f"fix it; {THEN}"),
    ([event("failed", error="data.path: no such folder", reason="usage")], "failed", "usage",
     "data.path: no such folder", f"correct the command or the config; {THEN}"),
    ([event("failed", error="OSError", reason="disk_full", folder="/scratch", needed_bytes=2**31, free_bytes=2**20)],
     "failed", "disk_full", "rank 0 on n1: no space left on /scratch: 2 GiB needed, 1 MiB free",
     f"free disk space; {THEN}"),
    ([event("failed", error="OSError", reason="quota", folder="/home/me")], "failed", "quota",
     "rank 0 on n1: the disk quota of /home/me is exceeded", f"free disk space; {THEN}"),
    ([event("failed", error="OSError", reason="read_only", folder="/mnt")], "failed", "read_only",
     "rank 0 on n1: /mnt is read-only", f"choose a folder that can be written; {THEN}"),
    ([event("failed", error="OSError", reason="no_permission")], "failed", "no_permission",
     "rank 0 on n1: no permission to write the disk of the run", f"choose a folder of yours; {THEN}"),
    ([event("out_of_memory", 1, strategy="ddp", next="fsdp")], "failed", "out_of_memory",
     "rank 1 on n1: out of memory with ddp",
     f"try strategy fsdp, or a smaller batch; {THEN}"),
    ([event("rank_failed", 2, exit_code=-9, reason="killed", restart=False)], "failed", "killed",
     "rank 2 on n1 was killed from outside (SIGKILL)", f"look for who or what killed it; {THEN}"),
    ([event("rank_failed", 2, exit_code=-9, out_of_memory=True, restart=False)], "failed", "host_memory",
     "rank 2 on n1 was killed by the kernel: out of host memory", f"use fewer loader workers; {THEN}"),
    ([event("rank_failed", 2, exit_code=-11, restart=False)], "failed", "crashed", "rank 2 on n1 crashed (SIGSEGV)",
     f"see: launcher logs it --rank 2; {THEN}"),
    ([event("hang", 3, seconds=300.0, waiting_for=[3], stacks="/s"),
      event("rank_failed", 3, exit_code=-9, hung=True, restart=False, reason="hung")], "failed", "hung",
     "rank 3 on n1 hung: no step for 300 s; the others wait for rank 3",
     f"see: launcher logs it --rank 3; {THEN}"),
    ([event("rank_failed", 0, exit_code=3, restart=False, reason="exit")], "failed", "exit",
     "rank 0 on n1 ended with exit code 3", f"see: launcher logs it --rank 0; {THEN}"),
    ([event("rank_failed", 4, reason="lost_connection", restart=False)], "failed", "lost_connection",
     "rank 4 on n1 lost the connection to other ranks or nodes", f"check the nodes and the network; {THEN}"),
    ([event("nodes_missing", nodes=[1, 3])], "failed", "nodes_missing", "nodes 1, 3 did not join",
     f"check these nodes; {THEN}"),
    ([event("failed", error="x", reason="a_reason_of_a_later_version")], "failed", "a_reason_of_a_later_version",
     "rank 0 on n1: x", f"fix it; {THEN}"),
]  # fmt: skip


@pytest.mark.parametrize(("events", "state", "reason", "text", "advice"), ENDINGS)
def test_every_ending_has_its_reason_and_its_advice(
    events: list[dict[str, Any]], state: str, reason: str, text: str, advice: str
) -> None:
    found = end(*events)
    assert (found.state, found.reason, found.text, found.advice) == (state, reason, text, advice)
    assert "\n" not in found.text


CONTINUE = 'train(..., name="it", resume_from_checkpoint="auto")'


@pytest.mark.parametrize(("events", "state", "reason", "text", "advice"), ENDINGS)
def test_every_ending_of_a_run_of_python_has_the_terms_of_python(
    events: list[dict[str, Any]], state: str, reason: str, text: str, advice: str
) -> None:
    reader = EndingReader()
    for each in ({**STARTED, "continue_with": CONTINUE}, PLANNED, SAVED, *events):
        reader.add(each)
    found = reader.find_ending("it")
    assert found is not None
    assert (found.state, found.reason) == (state, reason)
    assert found.text == text.replace("trainer.max_time", "max_time")
    advice = advice.replace("trainer.max_time", "max_time").replace(NEXT, "--resume auto")
    assert found.advice == advice.replace("--resume auto", f"run the script again with {CONTINUE}")
    assert "--" not in found.advice.replace("logs it --rank", "")


def test_the_newest_attempt_decides_what_continues_the_run() -> None:
    by_python, by_command = {**STARTED, "continue_with": CONTINUE}, {**STARTED, "continue_with": None}
    for first, second, advice in (
        (by_python, by_command, NEXT),
        (by_python, STARTED, NEXT),
        (by_command, by_python, f"run the script again with {CONTINUE}"),
    ):
        reader = EndingReader()
        for each in (first, PLANNED, SAVED, second, PLANNED):
            reader.add(each)
        assert reader.describe_unreported().advice == advice


# Texts of users and libraries.
_ERRORS = ("ValueError: no.", "ValueError: no; ", "KeyError", "ValueError", "RuntimeError: a.\nb.", "OSError: x...", "")


@pytest.mark.parametrize("step", [-1, None, 0, 42])
@pytest.mark.parametrize("reason", [None, *sorted({reason for _, _, reason, _, _ in ENDINGS})])
def test_no_ending_shows_a_step_before_the_first_or_two_marks_in_a_row(step: int | None, reason: str | None) -> None:
    shown: list[str] = []
    for kind, error in itertools.product(("failed", "rank_failed", "interrupted", "preempted", "finished"), _ERRORS):
        reader = EndingReader()
        fields = {"step": step, "reason": reason, "error": error, "message": error, "signal": 2, "exit_code": 1}
        for each in (STARTED, PLANNED, event(kind, restart=False, **fields)):
            reader.add(each)
        assert reader.step == max(step or 0, 0)
        found = reader.find_ending("it")
        assert found is not None
        shown.append(f"{found.text}; {found.advice}")
        for detail in ("FAILED, exit code 1", "TIMEOUT", "CANCELLED by 3", "NODE_FAIL"):
            job = combine_with_job(found, "failed", detail)
            shown.append(f"{job.text}; {job.advice}")
    assert [text for text in shown if re.search(r"-1|None|(?<!\.\.)\.;|[;:,] ?;|: *$", text)] == []


def test_a_traceback_of_another_process_is_summarized() -> None:
    text = (
        "ProcessRaisedException: \n\n-- Process 0 failed:\nTraceback (most recent call last):\n  x\nValueError: no.\n"
    )
    assert end(event("failed", error=text)).text == "rank 0 on n1: ProcessRaisedException: ValueError: no"


@pytest.mark.parametrize(
    ("fields", "saved"),
    [({"checkpoint": "last.ckpt", "checkpoint_step": 30}, 30), ({"checkpoint": None, "checkpoint_step": None}, None),
     ({"checkpoint": "last.ckpt", "checkpoint_step": None}, 40), ({"checkpoint": "last.ckpt"}, 40), ({}, 40)],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["failed", "out_of_memory"])
def test_a_checkpoint_that_was_not_written_is_not_counted(kind: str, fields: dict[str, Any], saved: int | None) -> None:
    reader = EndingReader()
    for each in (STARTED, PLANNED, {**SAVED, "step": 30}, SAVED, event(kind, reason="disk_full", **fields)):
        reader.add(each)
    assert reader.checkpoint_step == saved
    # A later attempt saves again.
    for each in (STARTED, PLANNED, {**SAVED, "step": 60}):
        reader.add(each)
    assert reader.checkpoint_step == 60


def test_an_attempt_that_is_restarted_has_not_ended_the_run() -> None:
    reader = EndingReader()
    for each in (STARTED, event("failed", error="x"), event("rank_failed", exit_code=1, restart=True)):
        reader.add(each)
    assert reader.find_ending("it") is None
    reader.add(STARTED)
    assert reader.find_ending("it") is None
    reader.add(event("finished", step=9))
    assert reader.find_ending("it") is not None


def test_the_signal_by_which_the_agent_ends_the_other_ranks_is_not_the_cause() -> None:
    failed, stopped = event("failed", 1, error="x"), event("interrupted", 0, signal=15, step=3, checkpoint=None)
    assert end(failed, stopped).reason == "exception"
    assert end(stopped, failed).reason == "sigterm"


def test_a_run_that_ended_without_any_event_is_described() -> None:
    reader = EndingReader()
    for each in (STARTED, PLANNED, {"kind": "step", "step": 7}):
        reader.add(each)
    assert reader.find_ending("it") is None
    found = reader.describe_unreported()
    assert (found.state, found.reason) == ("ended", "unreported")
    assert found.text == "no report at its end: killed, or the node was lost"
    assert found.advice == "run it again", "there is no checkpoint"


@pytest.mark.parametrize("kind", ["finished", "interrupted", "failed", "rank_failed", "hang", "nodes_missing"])
def test_a_damaged_event_is_described(kind: str) -> None:
    fields = ("rank", "host", "error", "reason", "exit_code", "nodes", "waiting_for", "seconds", "step", "signal",
              "needed_bytes", "epoch", "message")  # fmt: skip
    for field, damage in itertools.product(fields, (None, [], "x", 3, {"a": 1}, float("nan"))):
        reader = EndingReader()
        for each in (STARTED, event("rank_failed", exit_code=-9), {**event(kind), field: damage}):
            reader.add(each)
        found = reader.find_ending("it")
        assert found is None or (found.text and found.reason), (field, damage)


@pytest.mark.parametrize(
    ("detail", "reason", "text", "advice"),
    [
        ("TIMEOUT, exit code 143", "time_limit", "TIMEOUT: SLURM ended the job at its time limit",
         "ask for more --time; submit it again to go on"),
        ("PREEMPTED", "preempted", "PREEMPTED: SLURM preempted the job for another one", "submit it again to go on"),
        ("NODE_FAIL", "node_failure", "NODE_FAIL: a node of the job failed", "submit it again to go on"),
        ("CANCELLED", "cancelled", "CANCELLED: the job was cancelled", "submit it again to go on"),
        ("OUT_OF_MEMORY", "out_of_memory", "OUT_OF_MEMORY: SLURM killed the job: out of the memory it asked for",
         "ask for more --mem; submit it again to go on"),
    ],
)  # fmt: skip
def test_the_state_of_a_job_is_explained(detail: str, reason: str, text: str, advice: str) -> None:
    unreported = Ending("ended", "unreported", "no report", "--resume auto", can_resume=True)
    found = combine_with_job(unreported, "failed", detail)
    assert (found.reason, found.text, found.advice) == (reason, text, advice)
    stopped = end(event("interrupted", signal=15, step=42, checkpoint="c"))
    assert combine_with_job(stopped, "failed", detail).text == f"{text}; {stopped.text}"
