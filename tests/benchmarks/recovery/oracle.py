"""The acceptance test of recovery: kills of random ranks, compared to the bit with undisturbed runs."""

from __future__ import annotations

import json
import random
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.recovery.cases import CASES, Validated, config
from tests.benchmarks.recovery.rounds import Kill, Launch, Outcome, random_kill, run, step_seconds

# Three epochs of 14 batches, nearly: kills happen in two of them, and the rest shows whether the curve stays the same.
LENGTH, WINDOW, EVERY = 38, (2, 22), 10
TAIL = 12


@dataclass(frozen=True)
class OracleOptions:
    """Options of the acceptance test.

    Attributes:
        rounds: kills of each case and number of ranks.
        dead: ranks that are killed at once.
        seed: of victims and moments.
        moments: of `self_kill.MOMENTS`, instead of random ones.
        extra: additional arguments of `launcher fit`.
        verbose: print all rounds.
        keep_redone: keep the folder of rounds whose only fault is steps done again.
    """

    rounds: int
    dead: int
    seed: int
    moments: Sequence[str]
    extra: Sequence[str]
    verbose: bool
    keep_redone: bool


def launch_of(case: str, ranks: int, folder: Path, extra: Sequence[str] = (), every: int = EVERY) -> Launch:
    """The launcher's command for a case."""
    file = folder / f"{case}-{ranks}.yaml"
    file.write_text(json.dumps(config(CASES[case], ranks, LENGTH, every)))
    command = [sys.executable, "-m", "launcher", "fit", "--nproc-per-node", str(ranks), "--max-restarts", "3",
               "--config", str(file), *extra]  # fmt: skip
    return Launch(command, ranks, warm=True)


def _kills(case: str, ranks: int, step: float, options: OracleOptions) -> Iterator[Kill]:
    """The kills of a case: random ones, or one for each moment and rank."""
    chance = random.Random(f"{options.seed} {case} {ranks}")  # noqa: S311 -- no secret
    if options.moments:
        needs_validation = ("validation", "validated")
        for moment in options.moments:
            if CASES[case].model is Validated or moment not in needs_validation:
                yield from (Kill((rank,), chance.randint(*WINDOW), 0.0, moment) for rank in range(ranks))
        return
    order = list(range(ranks))
    for number in range(options.rounds):
        if number % ranks == 0:
            chance.shuffle(order)
        # Each rank is killed equally often.
        victims = tuple(order[(number + n) % ranks] for n in range(options.dead))
        yield random_kill(chance, victims, WINDOW, step * CASES[case].within)


def check_case(case: str, ranks: int, folder: Path, options: OracleOptions) -> list[Outcome]:
    """All rounds of a case. Prints each round that is not perfect; keeps its folder."""
    launch = launch_of(case, ranks, folder, options.extra)
    reference = folder / f"{case}-{ranks}-reference"
    reference.mkdir()
    undisturbed = run(launch, reference, None)
    if not undisturbed.goes_on:
        print(f"{case}, {ranks} ranks: the undisturbed run failed: {undisturbed.problem}")
        _show_output(reference)
        return []
    outcomes = []
    for number, kill in enumerate(_kills(case, ranks, step_seconds(reference, ranks), options)):
        own = folder / f"{case}-{ranks}-{number}"
        own.mkdir()
        began = time.monotonic()
        outcome = run(launch, own, kill, reference)
        outcomes.append(outcome)
        moment = f"moment {kill.moment}," if kill.moment else f"{kill.delay * 1e3:.0f} ms"
        what = f"{case}, {ranks} ranks, round {number}: rank {kill.victims}, {moment} after {kill.after}"
        if options.verbose or not perfect(outcome):
            print(f"{what}: {describe(outcome)} ({time.monotonic() - began:.0f} s)", flush=True)
        if not perfect(outcome):
            for name, text in outcome.differences.items():
                print(f"    {name}: {text}")
            _show_output(own, only="restart " if outcome.goes_on else "")
            if outcome.goes_on and not outcome.differences and not options.keep_redone:
                shutil.rmtree(own)
            else:
                print(f"    kept: {own}", flush=True)
        else:
            shutil.rmtree(own)
    return outcomes


def perfect(outcome: Outcome) -> bool:
    """Whether the run went on, did no step again, and equals the undisturbed run to the bit."""
    return outcome.goes_on and outcome.redone == 0 and not outcome.differences


def describe(outcome: Outcome) -> str:
    """One line about a round."""
    if not outcome.goes_on:
        return f"FAILED: {outcome.problem}"
    same = "equal" if not outcome.differences else "DIFFERS"
    return f"{outcome.seconds or 0:.2f} s, {outcome.redone} steps redone, {same}"


def _show_output(folder: Path, only: str = "") -> None:
    """Print the last lines of the run's output, or of those that begin with a text."""
    lines = (folder / "output").read_text(errors="replace").splitlines()
    for line in [line for line in lines if line.lstrip().startswith(only)][-TAIL:]:
        print(f"    | {line}")


def table_row(case: str, ranks: int, outcomes: Sequence[Outcome]) -> str:
    """A row of the result in Markdown."""
    total = len(outcomes)
    if not total:
        return f"| {case} | {ranks} | 0 | the undisturbed run failed | | | | | |"
    good = [outcome for outcome in outcomes if outcome.goes_on]
    redone = [outcome.redone for outcome in good]
    seconds = [outcome.seconds for outcome in good if outcome.seconds is not None]
    cells = [
        case,
        ranks,
        f"{len(good)} of {total}",
        f"{min(redone)}-{max(redone)}" if redone else "",
        f"{statistics.median(seconds):.2f} ({min(seconds):.2f}-{max(seconds):.2f})" if seconds else "",
        f"{sum(outcome.same('loss') for outcome in good)} of {total}",
        f"{sum(outcome.same('parameters') for outcome in good)} of {total}",
        f"{sum(not outcome.differences for outcome in good)} of {total}",
        f"{sum(map(perfect, outcomes))} of {total}",
    ]
    return f"| {' | '.join(map(str, cells))} |"


HEADER = (
    "| case | ranks | go on | steps redone | kill to new step, s: median (range) | losses equal | parameters equal "
    "| all states equal | perfect |\n|---|---|---|---|---|---|---|---|---|"
)


def check(cases: Sequence[str], ranks: Sequence[int], folder: Path, options: OracleOptions) -> bool:
    """Run the acceptance test and print its table; returns whether all rounds are perfect."""
    rows, everything = [], True
    for case in cases:
        for number in ranks:
            outcomes = check_case(case, number, folder, options)
            rows.append(table_row(case, number, outcomes))
            everything = everything and bool(outcomes) and all(map(perfect, outcomes))
            print(rows[-1], flush=True)
    print("\n".join(["", HEADER, *rows]))
    print("all perfect" if everything else f"not all perfect; kept folders are in {folder}")
    return everything
