"""The choice of strategy against an oracle that has really run every candidate under the same limit of memory.

    python -m tests.benchmarks.oracle [--families mlp gpt ...] [--batch 16] [--steps 5] [--json FILE]

For each family every candidate trains once without a limit. Its resident bytes give three limits, a constant factor
apart: from a fifth above what the most needs to a twentieth above what the least needs. Then every candidate is really
run under every limit, in turns, by `tests.limited_runs`, and the plan, which knows the limit alone, picks one.

A pick fails if its run does. A refusal is wrong if some candidate lives. Regret is the share of throughput that the
pick loses against the best of those that live; a candidate's step is the median of all its steps in this program, as a
limit that is kept changes no speed. By processor time it is the same with the ranks' processor seconds, which other
processes on the machine move less. One device is no candidate for two ranks, and offload none on a CPU, whose memory is
the host's.
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

from launcher.memory_plan import cpu_machine
from strategies.batch import BatchSplit
from strategies.candidates import DDP, ZERO_1, ZERO_2, ZERO_3, Candidate
from strategies.comparison import Comparison, compare_strategies
from strategies.model_states import ZeroSettings
from strategies.precision import Precision
from strategies.step_trace import ModelProfile
from strategies.trace import trace_step
from strategies.units import gib
from tests.limited_runs import BUCKET, Case, Outcome, ranks_ready, run_case
from tests.model_families import LARGE

RANKS = 2
CANDIDATES = (DDP, ZERO_1, ZERO_2, ZERO_3)
SETTINGS = ZeroSettings(BUCKET, overlap_comm=False, prefetch_bucket_size=BUCKET // 4)


@dataclass
class Pair:
    """A family, a limit, what became of each candidate under it, and what the plan picked."""

    family: str
    limit: int
    outcomes: dict[str, Outcome]
    pick: str | None
    estimates: dict[str, int]


def profile_of(family: str, batch_size: int) -> ModelProfile:
    """As `launcher.memory_profile` makes it of a user's module in fp32."""
    entry = LARGE[family]
    trace, model = trace_step(entry.make, entry.batch(batch_size), batch_size)
    return ModelProfile(model, (trace, trace), (trace, trace), "traced")


def plan(profile: ModelProfile, limit: int) -> Comparison:
    """What the plan says for ranks that may use `limit` bytes each."""
    split = BatchSplit(RANKS, profile.plain[1].batch_size, 1)
    return compare_strategies(
        profile, cpu_machine(RANKS, RANKS, limit), Precision.FP32_TRUE, [split], settings=SETTINGS
    )


def limits(needs: Sequence[int]) -> list[int]:
    """Three, a constant factor apart, from a fifth above the largest need to a twentieth above the least."""
    most, least = max(needs) * 1.2, min(needs) * 1.05
    return [int(most * (least / most) ** (i / 2)) for i in range(3)]


def measure(context: ForkServerContext, case: Case) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        return run_case(context, case, Path(folder), ranks=RANKS)


def run_family(
    context: ForkServerContext, family: str, batch_size: int, steps: int
) -> tuple[list[Pair], list[Outcome]]:
    """All pairs of a family, and its runs without a limit in the order of `CANDIDATES`."""
    profile = profile_of(family, batch_size)

    def case(candidate: Candidate, limit: int | None) -> Case:
        return Case(family, candidate, batch_size, limit_bytes=limit, steps=steps)

    free = [measure(context, case(candidate, None)) for candidate in CANDIDATES]
    for candidate, outcome in zip(CANDIDATES, free, strict=True):
        assert outcome.lives, f"{family} with {candidate.name} fails without a limit: {outcome.reason}"
    pairs: list[Pair] = []
    for limit in limits([outcome.peak_bytes for outcome in free]):
        found = plan(profile, limit)
        estimates = {a.name: a.memory.total for a in found.assessments}
        outcomes = {candidate.name: measure(context, case(candidate, limit)) for candidate in CANDIDATES}
        pairs.append(Pair(family, limit, outcomes, found.pick, estimates))
        told = ", ".join(f"{name} {'lives' if o.lives else 'fails'}" for name, o in outcomes.items())
        print(f"{family}, {gib(limit)}: {told}; pick {found.pick}; load {os.getloadavg()[0]:.1f}", flush=True)
        for name, outcome in outcomes.items():
            if not outcome.lives and "memory" not in outcome.reason and "bad_alloc" not in outcome.reason:
                print(f"  {name}: {outcome.reason}")
    for candidate, outcome in zip(CANDIDATES, free, strict=True):
        estimate = pairs[0].estimates[candidate.name]
        error = estimate / outcome.peak_bytes - 1
        print(f"  {candidate.name}: resident {gib(outcome.peak_bytes)}, estimate {gib(estimate)} ({error:+.1%})")
    return pairs, free


def steps_of(pairs: Sequence[Pair], free: Sequence[Outcome]) -> dict[str, tuple[float, float]]:
    """By candidate: median seconds of a step, and median processor seconds, over all of a family's runs that lived."""
    found: dict[str, tuple[float, float]] = {}
    for candidate, alone in zip(CANDIDATES, free, strict=True):
        lived = [alone, *(o for p in pairs if (o := p.outcomes[candidate.name]).lives)]
        steps = [second for outcome in lived for second in outcome.step_seconds]
        found[candidate.name] = statistics.median(steps), statistics.median(o.cpu_seconds for o in lived)
    return found


def regret(pair: Pair, steps: dict[str, tuple[float, float]], which: int) -> float | None:
    """Share of throughput lost by the pick; None if it failed or there was nothing to pick."""
    living = [steps[name][which] for name, outcome in pair.outcomes.items() if outcome.lives]
    if pair.pick is None or not pair.outcomes[pair.pick].lives:
        return None
    return 1 - min(living) / steps[pair.pick][which]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(LARGE), choices=list(LARGE))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    every: list[Pair] = []
    wall: list[float] = []
    cpu: list[float] = []
    with ranks_ready() as context:
        for family in options.families:
            pairs, free = run_family(context, family, options.batch, options.steps)
            steps = steps_of(pairs, free)
            every += pairs
            for found, which in ((wall, 0), (cpu, 1)):
                found += [r for pair in pairs if (r := regret(pair, steps, which)) is not None]
            print("  " + ", ".join(f"{n} {s:.3f} s a step, {c:.3f} s of a processor" for n, (s, c) in steps.items()))
            if options.json is not None:
                options.json.write_text(json.dumps([asdict(pair) for pair in every], indent=1))
    living = [pair for pair in every if any(o.lives for o in pair.outcomes.values())]
    failed = [p for p in every if p.pick is not None and not p.outcomes[p.pick].lives]
    refused = [p for p in living if p.pick is None]
    print(
        f"{len(every)} pairs, {sum(len(p.outcomes) for p in every)} runs under a limit, "
        f"{sum(not o.lives for p in every for o in p.outcomes.values())} of them out of memory\n"
        f"picks that fail: {len(failed)} (target 0); refused where something lives: {len(refused)} of {len(living)}"
    )
    for name, values in (("wall time", wall), ("processor time", cpu)):
        print(f"regret by {name}: median {statistics.median(values):.1%} (target at most 5 %), worst {max(values):.1%}")


if __name__ == "__main__":
    main()
