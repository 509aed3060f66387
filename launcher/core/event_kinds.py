"""Every kind of event with its fields, for the documentation; a test compares it with all calls that write events."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class EventKind:
    """One kind of event.

    Attributes:
        description: when it is written.
        fields: what each field holds, besides `time`, `rank` and `kind`, which every event has.
    """

    description: str
    fields: Mapping[str, str]


_STEP = "optimizer steps done"
_FAILED_STEP = "optimizer steps done by the rank; null before the training"
_HOST = "host of the rank"
_CHECKPOINT = "path of the run's last valid checkpoint; null if none"
_CHECKPOINT_STEP = "optimizer steps of this checkpoint; null if not known, or without one"
_SPENT = (
    "seconds of rank zero since `training_started` in `step`, `data`, `validation` and `checkpoint`; the rest was "
    "spent in hooks and loggers"
)
_WHY_FAILED = "`exception`, `usage`, `lost_connection`, `disk_full`, `quota`, `read_only` or `no_permission`"

EVENT_KINDS: Mapping[str, EventKind] = MappingProxyType({
    "run_started": EventKind("An attempt of the run begins: all ranks agree, the plan exists.", {
        "name": "name of the run",
        "attempt": "identifier of the attempt, equal on all ranks",
        "restart_count": "how many times the agent or SLURM has restarted the ranks",
        "source": "what started the ranks: `torchrun`, `slurm`, or `single` for one process",
        "config_digest": "SHA-256 of the config",
        "wandb_id": "id of the W&B run",
        "host": "host of rank 0",
        "continue_with": "arguments with which a script continues the run; null if a command started it",
        "versions": "version of each library",
        "times": "seconds since 1970: `submitted` and `job` (start of the SLURM job), null without one; "
                 "`launched`, when the agent or the script began; `process`, when rank zero's process began; "
                 "`agreement`, when it began to agree with the others",
    }),
    "planned": EventKind("The plan of the attempt.", {"plan": "the same content as `plan.json`"}),
    "precision_changed": EventKind("A resumed run trains in another precision than its checkpoint.", {
        "checkpoint": "precision of the checkpoint",
        "run": "precision of this attempt",
    }),
    "strategy_changed": EventKind("Strategies ran out of memory in earlier attempts; the plan uses another one.", {
        "ran_out": "names of the strategies that ran out of memory, if on `with activation checkpointing`",
        "strategy": "the strategy of this attempt",
        "activation_checkpointing": "whether activation checkpointing is on",
    }),
    "notice": EventKind("A notice to the user, also printed on the terminal.", {"message": "text of the notice"}),
    "resumed": EventKind("The attempt continues from a checkpoint.", {
        "checkpoint": "path of the checkpoint",
        "step": "its optimizer steps; null if not known",
        "kept": "whether ranks that survived a failure have saved it for this attempt",
    }),
    "training_started": EventKind("Lightning's training loop starts.", {"step": _STEP, "epoch": "current epoch"}),
    "first_step": EventKind("The first optimizer step of the attempt is done.", {
        "step": _STEP,
        "metrics": "logged metrics",
        "learning_rate": "learning rate of each optimizer",
        "spent": _SPENT,
    }),
    "step": EventKind("Metrics at a logging interval.", {
        "step": _STEP,
        "epoch": "current epoch",
        "seconds_per_step": "mean time of a step since the last such event",
        "metrics": "logged metrics",
        "learning_rate": "learning rate of each optimizer",
        "spent": _SPENT,
    }),
    "ranks": EventKind("Samples of all ranks at a logging interval; one list entry per rank, at most 64.", {
        "step": _STEP,
        "ranks": "numbers of the ranks",
        "loss_scale": "loss scale of each rank",
        "skipped_steps": "skipped steps of each rank",
        "step_seconds": "mean time of a step",
        "data_seconds": "mean time spent waiting for data",
        "own_seconds": "mean time spent on data and the forward pass",
        "peak_memory": "peak memory in bytes",
    }),
    "alert": EventKind("A limit of the monitoring is exceeded.", {
        "alert": "kind of alert",
        "step": _STEP,
        "ranks": "affected ranks",
        "title": "one line",
        "text": "what was measured and what to do",
    }),
    "straggler": EventKind("At the end: one rank delayed the others during the whole run.", {
        "ranks": "the slow rank",
        "steps": "steps that were averaged",
        "text": "how slow it was",
        "own_seconds": "mean time of each rank for data and the forward pass",
    }),
    "unused_parameters": EventKind("Parameters received no gradient in the first step; DDP now searches for them.", {
        "names": "names of the parameters",
    }),
    "batch_corrected": EventKind("A data loader uses another batch size than the plan; the plan is corrected.", {
        "before": "global batch size of the plan",
        "now": "actual global batch size",
    }),
    "validation": EventKind("A validation is done.", {
        "step": _STEP,
        "metrics": "validation metrics",
        "spent": _SPENT,
    }),
    "epoch": EventKind("An epoch of the training is done, or its part before the training ended.", {
        "step": _STEP,
        "epoch": "number of the epoch, from 0",
        "metrics": "logged metrics, with those that were logged for the epoch",
    }),
    "checkpoint": EventKind("A checkpoint is written.", {"step": _STEP, "epoch": "current epoch"}),
    "checkpoint_interval": EventKind("`checkpoint.every: auto` has chosen another interval, after a save.", {
        "step": _STEP,
        "steps": "optimizer steps until the next save",
        "seconds": "expected seconds until the next save",
        "cost": "seconds that a save stops the training, median of the last ones",
        "reason": "how it was chosen",
    }),
    "memory": EventKind("At the end: measured memory next to the plan's estimate.", {
        "step": _STEP,
        "planned": "estimated bytes by part; null if the plan has no estimate",
        "ranks": "numbers of the ranks with the highest peaks, at most 64",
        "measured": "peak bytes of each of these ranks",
        "measured_by": "how the peak was measured",
    }),
    "time_spent": EventKind("The training has ended, or a signal stopped it, and its checkpoint is saved.", {
        "step": _STEP,
        "spent": _SPENT,
    }),
    "training_ended": EventKind("Lightning's training loop ends.", {"step": _STEP, "epoch": "current epoch"}),
    "finished": EventKind("The run is complete.", {
        "step": _STEP,
        "metrics": "last metrics",
        "checkpoint": "path of the last checkpoint",
        "epoch": "epochs done",
        "reason": "`max_epochs`, `max_steps`, `max_time`, `early_stopping`, `should_stop`, or `nothing_to_train` for a "
                  "resumed run that was complete; null otherwise",
        "message": "a sentence about the reason; null if none is needed",
        "problem": "what was wrong with the training to its end, as a loss that is not finite; null if nothing was",
    }),
    "interrupted": EventKind("A signal stopped the run.", {
        "signal": "number of the signal",
        "step": _STEP,
        "checkpoint": "path of the checkpoint written; null if none",
        "reason": "`ctrl_c`, `sigterm` or `signal`",
        "second": "whether a second signal ended it at once",
        "exit_code": "of a script (`launcher run`): 0 if all its ranks ended so",
    }),
    "failed": EventKind("The attempt ended with an error.", {
        "step": _FAILED_STEP,
        "host": _HOST,
        "error": "text of the error",
        "reason": _WHY_FAILED,
        "checkpoint": _CHECKPOINT,
        "checkpoint_step": _CHECKPOINT_STEP,
        "folder": "of a disk that cannot be written: the folder",
        "needed_bytes": "size of what could not be written; null if not known",
        "free_bytes": "free space there; null if not known",
    }),
    "out_of_memory": EventKind("A rank ran out of memory.", {
        "step": _FAILED_STEP,
        "host": _HOST,
        "strategy": "strategy of the attempt",
        "next": "strategy that needs less memory; null if there is none",
        "next_checkpointed": "whether it needs less with activation checkpointing, which is off",
        "expected_bytes": "peak that the plan expected",
        "allocated_bytes": "peak that was allocated; null on a CPU",
        "go_on": "whether the config asks for a restart with the next strategy (`on_oom: next`)",
        "checkpoint": _CHECKPOINT,
        "checkpoint_step": _CHECKPOINT_STEP,
    }),
    "rank_failed": EventKind("The agent reports the first rank that failed, and its decision.", {
        "host": _HOST,
        "step": _STEP,
        "exit_code": "exit code; negative for a signal",
        "hung": "whether the rank hung",
        "out_of_memory": "whether it ran out of memory",
        "error": "exception of the rank, if it reported one",
        "last_sign": "when a rank last reported that it is alive, in seconds since 1970; null if none did",
        "log": "path of the rank's log",
        "last_lines": "last lines of the log",
        "others": "state of the other ranks",
        "restart": "whether the agent restarts the ranks",
        "verdict": "reason of the decision",
        "reason": "as in `failed` or `interrupted`, or `killed`, `crashed`, `out_of_memory`, `hung` or `exit`",
    }),
    "hang": EventKind("No rank finished a step for `--hang-timeout` seconds.", {
        "seconds": "seconds without progress",
        "waiting_for": "ranks that the others wait for",
        "stacks": "directory with the stacks of all ranks",
    }),
    "hang_suspected": EventKind("A phase takes far longer than usual; nothing is ended.", {
        "phase": "the phase of the first rank in `ranks`",
        "seconds": "seconds since this phase began",
        "usual": "median seconds of this phase; null while it is not known",
        "step": _STEP,
        "ranks": "ranks that the others wait for; empty if no rank stands out",
        "waiting": "the other ranks",
        "waits_for": "what each of the ranks waits for",
        "frames": "the innermost frames of the user's code of each of the ranks",
        "collective": "the oldest collective in which a rank waits; null if none",
        "message": "the notice as printed on the terminal",
    }),
    "hang_over": EventKind("A rank of `hang_suspected` has gone on by itself.", {
        "seconds": "seconds that the phase took",
        "ranks": "the ranks of the notice",
        "message": "the notice as printed on the terminal",
    }),
    "nodes_missing": EventKind("Nodes did not join before the timeout.", {"nodes": "numbers of the missing nodes"}),
    "evaluated": EventKind("`validate`, `test` or `predict` finished.", {
        "command": "the subcommand",
        "checkpoint": "path of the checkpoint",
        "metrics": "metrics of each data loader",
    }),
})  # fmt: skip
