"""The plan's predictions against real runs: the memory of every strategy, and the choice under a limit.

    python -m tests.benchmarks.oracle memory [--families mlp gpt ...] [--precision bf16-mixed] [--batch 16]
    python -m tests.benchmarks.oracle choice [--families mlp gpt ...] [--rounds 3] [--json FILE]

Two gloo ranks train with DDP, FSDP2 and ZeRO 1 to 3 under Lightning, as `fit` would; one device is not a candidate for
two ranks, nor `hsdp` on one node, nor offload on a CPU, whose memory is the host's. `tests.support.limited_runs`
defines a rank's memory.

`memory` compares the estimate with the peak of a rank's own control group, beside DeepSpeed's estimators, which know
model states alone, for Adam in 16 bits. Errors are (estimate - real) / real; families that were not used while the
formulas were written are summarized separately.

`choice` runs every candidate under three limits, a constant factor apart, from 1.2 times the largest need to 1.05 times
the smallest need; the plan, which knows only the limit, picks one. A pick fails if its run does. A
rejection is wrong if some candidate survives. Regret is the share of throughput that the pick loses against the best
survivor, by the median of all steps of runs without a limit, in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path

from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

from launcher.planning.memory import cpu_machine
from strategies.base import StrategyEntry
from strategies.batch import BatchSplit
from strategies.comparison import Comparison, compare_strategies
from strategies.fsdp import FSDP2, FSDP2_GRAD_OP
from strategies.model_shape import describe_model, find_optimizer
from strategies.model_states import ZeroSettings
from strategies.options import ComparisonOptions
from strategies.precision import Precision
from strategies.registry import DDP, ZERO_1, ZERO_2, ZERO_3
from strategies.step_trace import ModelProfile
from strategies.trace import TraceTypes, trace_step
from strategies.units import format_bytes
from strategies.zero import Zero
from tests.support.limited_runs import BUCKET, Case, Outcome, ranks_ready, run_case
from tests.support.model_families import LARGE, UNSEEN

RANKS = 2
CANDIDATES = (DDP, FSDP2, FSDP2_GRAD_OP, ZERO_1, ZERO_2, ZERO_3)
SETTINGS = ZeroSettings(BUCKET, overlap_comm=False, prefetch_bucket_size=BUCKET // 4)


@dataclass
class Pair:
    """A family, a limit, the outcome of each candidate, and the plan's pick."""

    family: str
    limit: int
    outcomes: dict[str, Outcome]
    pick: str | None
    estimates: dict[str, int]


def trace_profile(family: str, batch_size: int, precision: str = "32-true") -> ModelProfile:
    """The profile that `launcher.planning.profile` makes of a user's module."""
    import torch

    entry = LARGE[family]
    half = torch.bfloat16 if precision.startswith("bf16") else None
    mixed = precision == "bf16-mixed"
    plain, model = trace_step(entry.make, entry.batch(batch_size), batch_size,
                              types=TraceTypes(None if mixed else half, half if mixed else None))  # fmt: skip
    sharded, _ = trace_step(entry.make, entry.batch(batch_size), batch_size, types=TraceTypes(half))
    gathered = plain
    if mixed:
        types = TraceTypes(None, half, parameters=half)
        gathered, _ = trace_step(entry.make, entry.batch(batch_size), batch_size, types=types)
    return ModelProfile(model, (plain, plain), (sharded, sharded), "traced", gathered=(gathered, gathered))


def plan(profile: ModelProfile, limit: int, precision: str = "32-true") -> Comparison:
    """The plan for ranks with a limit of `limit` bytes each."""
    split = BatchSplit(RANKS, profile.plain[1].batch_size, 1)
    machine = cpu_machine(RANKS, RANKS, limit)
    return compare_strategies(profile, machine, Precision(precision), [split], ComparisonOptions(settings=SETTINGS))


def measure(context: ForkServerContext, case: Case) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        return run_case(context, case, Path(folder), ranks=RANKS)


def deepspeeds_estimate(family: str, stage: int) -> int:
    """Bytes on the device by DeepSpeed's own estimators."""
    module = LARGE[family].make()
    shape = describe_model(module, find_optimizer(module.configure_optimizers()))
    if stage == 3:
        largest = max(p.numel for p in shape.parameters)
        return estimate_zero3_model_states_mem_needs(shape.numel, largest, RANKS, 1, cpu_offload=False)[1]
    return estimate_zero2_model_states_mem_needs(shape.numel, RANKS, 1, cpu_offload=False)[1]


def compare_memory(context: ForkServerContext, options: argparse.Namespace) -> None:
    """Every candidate of every family once, without a limit."""
    errors: dict[bool, list[float]] = {False: [], True: []}
    theirs: dict[bool, list[float]] = {False: [], True: []}
    for family in options.families:
        found = plan(trace_profile(family, options.batch, options.precision), 1 << 40, options.precision)
        for candidate in CANDIDATES:
            case = Case(family, candidate, options.batch, precision=options.precision, steps=3)
            outcome = measure(context, case)
            assert outcome.lives, f"{family} with {candidate.name} fails without a limit: {outcome.reason}"
            assessed = found.of(candidate.name)
            assert assessed is not None
            error = assessed.memory.total / outcome.peak_bytes - 1
            errors[family in UNSEEN].append(error)
            line = f"{family:16} {candidate.name:18} real {format_bytes(outcome.peak_bytes)}, estimate {error:+.1%}"
            if isinstance(candidate, Zero):
                their = deepspeeds_estimate(family, candidate.variant.stage) / outcome.peak_bytes - 1
                theirs[family in UNSEEN].append(their)
                line += f", DeepSpeed's {their:+.0%}"
            print(f"{line} ({assessed.memory.phase})", flush=True)
    for unseen, name in ((False, "seen"), (True, "never looked at")):
        if errors[unseen]:
            print(f"{name}: {_summary(errors[unseen], theirs[unseen])}")


def _summary(ours: list[float], theirs: list[float]) -> str:
    under = sum(error < -0.02 for error in ours)
    return (
        f"median error {statistics.median(map(abs, ours)):.2%} (target at most 3 %), "
        f"{min(ours):+.1%} to {max(ours):+.1%}; {under} of {len(ours)} cases under by more than 2 % (target at most "
        f"1 %); DeepSpeed's estimators: median error {statistics.median(map(abs, theirs)):.0%}"
    )


def limits(needs: Sequence[int]) -> list[int]:
    """Three limits, a constant factor apart, from 1.2 times the largest need to 1.05 times the smallest."""
    most, least = max(needs) * 1.2, min(needs) * 1.05
    return [int(most * (least / most) ** (i / 2)) for i in range(3)]


def run_pairs(context: ForkServerContext, family: str, batch_size: int) -> list[Pair]:
    """All pairs of a family."""
    profile = trace_profile(family, batch_size)

    def case(candidate: StrategyEntry, limit: int | None) -> Case:
        return Case(family, candidate, batch_size, limit_bytes=limit, steps=3)

    free = [measure(context, case(candidate, None)) for candidate in CANDIDATES]
    for candidate, outcome in zip(CANDIDATES, free, strict=True):
        assert outcome.lives, f"{family} with {candidate.name} fails without a limit: {outcome.reason}"
    pairs: list[Pair] = []
    for limit in limits([outcome.peak_bytes for outcome in free]):
        found = plan(profile, limit)
        estimates = {a.name: a.memory.total for a in found.assessments}
        outcomes = {candidate.name: measure(context, case(candidate, limit)) for candidate in CANDIDATES}
        pairs.append(Pair(family, limit, outcomes, found.pick, estimates))
        lives = ", ".join(f"{name} {'lives' if o.lives else 'fails'}" for name, o in outcomes.items())
        print(f"{family}, {format_bytes(limit)}: {lives}; pick {found.pick}; load {os.getloadavg()[0]:.1f}", flush=True)
        for name, outcome in outcomes.items():
            if not outcome.lives and "memory" not in outcome.reason:
                print(f"  {name}: {outcome.reason}")
    return pairs


def steps_of(context: ForkServerContext, family: str, batch_size: int, rounds: int) -> dict[str, float]:
    """By candidate: median seconds of a step, of runs in turns."""
    steps: dict[str, list[float]] = {candidate.name: [] for candidate in CANDIDATES}
    for _ in range(rounds):
        for candidate in CANDIDATES:
            outcome = measure(context, Case(family, candidate, batch_size, steps=8, timed=True))
            steps[candidate.name] += outcome.step_seconds
    return {name: statistics.median(seconds) for name, seconds in steps.items()}


def compare_choice(context: ForkServerContext, options: argparse.Namespace) -> None:
    """Pairs of family and limit, then the time of a step of every candidate."""
    every: list[Pair] = []
    regrets: list[float] = []
    for family in options.families:
        pairs = run_pairs(context, family, options.batch)
        steps = steps_of(context, family, options.batch, options.rounds)
        print("  " + ", ".join(f"{n} {s:.3f} s a step" for n, s in steps.items()))
        for pair in pairs:
            living = [steps[name] for name, outcome in pair.outcomes.items() if outcome.lives]
            if pair.pick is not None and pair.outcomes[pair.pick].lives:
                regrets.append(1 - min(living) / steps[pair.pick])
        every += pairs
        if options.json is not None:
            options.json.write_text(json.dumps([asdict(pair) for pair in every], indent=1))
    living_pairs = [pair for pair in every if any(o.lives for o in pair.outcomes.values())]
    picked = [p for p in every if p.pick is not None]
    failed = [p for p in picked if p.pick is not None and not p.outcomes[p.pick].lives]
    print(
        f"{len(every)} pairs, {sum(len(p.outcomes) for p in every)} runs under a limit, "
        f"{sum(not o.lives for p in every for o in p.outcomes.values())} of them out of memory\n"
        f"picks that fail: {len(failed)} of {len(picked)} (target 0); refused where something lives: "
        f"{sum(p.pick is None for p in living_pairs)} of {len(living_pairs)}\n"
        f"regret: median {statistics.median(regrets):.1%} (target at most 5 %), worst {max(regrets):.1%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["memory", "choice"])
    parser.add_argument("--families", nargs="+", default=list(LARGE), choices=list(LARGE))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--precision", default="32-true", choices=["32-true", "bf16-mixed", "bf16-true"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with ranks_ready() as context:
        (compare_memory if options.what == "memory" else compare_choice)(context, options)


if __name__ == "__main__":
    main()
