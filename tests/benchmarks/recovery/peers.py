"""The tools side by side: all of them in each round, with the same kills."""

from __future__ import annotations

import random
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.benchmarks.recovery.contestants import CONTESTANTS, WINDOW, Settings
from tests.benchmarks.recovery.rounds import Kill, Outcome, largest_loss_difference, run, step_seconds

HEADER = (
    "| tool | goes on | kill to first new step, s: median (range) | steps redone | losses equal to the bit "
    "| parameters equal | largest difference of a loss |\n|---|---|---|---|---|---|---|"
)


def compare(names: Sequence[str], rounds: int, settings: Settings, seed: int) -> None:
    """Run `rounds` rounds of all tools in turns, and print the table and the ratios to the launcher."""
    references: dict[str, Path] = {}
    steps: dict[str, float] = {}
    missing = [name for name in names if not CONTESTANTS[name].installed(settings)]
    for name in names:
        if name in missing:
            continue
        reference = settings.folder / f"{name}-reference"
        reference.mkdir()
        undisturbed = run(CONTESTANTS[name].launch(settings), reference, None)
        if undisturbed.goes_on:
            references[name], steps[name] = reference, step_seconds(reference, settings.ranks)
            print(f"{name}: {steps[name] * 1e3:.0f} ms a step", flush=True)
        else:
            print(f"{name}: the undisturbed run failed: {undisturbed.problem}; kept: {reference}", flush=True)
    outcomes: dict[str, list[tuple[Outcome, float]]] = {name: [] for name in references}
    try:
        for number in range(rounds):
            _round(number, seed, references, steps, settings, outcomes)
    finally:
        # Also of a comparison that is ended early.
        _table(outcomes, missing)


def _round(
    number: int,
    seed: int,
    references: Mapping[str, Path],
    steps: Mapping[str, float],
    settings: Settings,
    outcomes: Mapping[str, list[tuple[Outcome, float]]],
) -> None:
    """One kill under each tool: the same step, share of a step and rank, except where rank zero may not die."""
    chance = random.Random(f"{seed} {number}")  # noqa: S311 -- no secret
    any_rank, not_zero = chance.randrange(settings.ranks), chance.randrange(1, settings.ranks)
    after, share = chance.randint(*WINDOW), chance.random()
    # The order rotates, so that no tool always follows the same one.
    first = number % len(references)
    for name in [*references][first:] + [*references][:first]:
        contestant = CONTESTANTS[name]
        victim = any_rank if contestant.kills_rank_zero else not_zero
        own = settings.folder / f"{name}-{number}"
        own.mkdir()
        kill = Kill((victim,), after, share * steps[name])
        outcome = run(contestant.launch(settings), own, kill, references[name])
        largest = largest_loss_difference(own, references[name], settings.ranks) if outcome.goes_on else 0.0
        outcomes[name].append((outcome, largest))
        seconds = "" if outcome.seconds is None else f"{outcome.seconds:.2f} s, {outcome.redone} redone, "
        text = outcome.problem or ("equal" if not outcome.differences else f"differs by up to {largest:.1e}")
        kept = "" if outcome.goes_on else f"; kept: {own}"
        print(f"round {number}, {name}, rank {victim} after step {after}: {seconds}{text}{kept}", flush=True)
        if outcome.goes_on:
            shutil.rmtree(own)


def _median(rows: Sequence[tuple[Outcome, float]]) -> float | None:
    seconds = [row.seconds for row, _ in rows if row.goes_on and row.seconds is not None]
    return statistics.median(seconds) if seconds else None


def _table(outcomes: Mapping[str, list[tuple[Outcome, float]]], missing: Sequence[str]) -> None:
    print("\n" + HEADER)
    for name, rows in outcomes.items():
        good = [(row, largest) for row, largest in rows if row.goes_on]
        seconds = [row.seconds for row, _ in good if row.seconds is not None]
        cells = [CONTESTANTS[name].name, f"{len(good)} of {len(rows)}"]
        if good:
            redone = [row.redone for row, _ in good]
            cells += [
                f"{statistics.median(seconds):.2f} ({min(seconds):.2f}-{max(seconds):.2f})",
                f"{min(redone)}-{max(redone)}",
                f"{sum(row.same('loss') for row, _ in good)} of {len(good)}",
                f"{sum(row.same('parameters') for row, _ in good)} of {len(good)}",
                f"{max(largest for _, largest in good):.1e}",
            ]
        print(f"| {' | '.join(cells)} |")
    for name in missing:
        print(f"| {CONTESTANTS[name].name} | not installed |")
    ours = _median(outcomes.get("launcher", []))
    for name, rows in outcomes.items():
        theirs = _median(rows)
        if ours is not None and theirs is not None and name != "launcher":
            print(f"launcher / {name}: {ours / theirs:.3f}")
