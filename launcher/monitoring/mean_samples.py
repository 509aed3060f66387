"""What the ranks' samples say over a whole run: who was slow for a moment does not count, who always is does."""

from __future__ import annotations

from collections.abc import Sequence

from launcher.monitoring.samples import RankSample


class MeanSamples:
    """Each rank's mean times over the steps seen so far."""

    def __init__(self) -> None:
        self._sums: dict[int, tuple[float, float, float]] = {}
        self.steps = 0

    def add(self, samples: Sequence[RankSample], steps: int) -> None:
        """Take one interval's samples.

        Args:
            samples: one per rank.
            steps: optimizer steps that they are the means of; 0 adds nothing.
        """
        self.steps += steps
        for s in samples:
            step, data, own = self._sums.get(s.rank, (0.0, 0.0, 0.0))
            self._sums[s.rank] = (
                step + s.step_seconds * steps,
                data + s.data_seconds * steps,
                own + s.own_seconds * steps,
            )

    def means(self) -> list[RankSample]:
        """One sample per rank, in their order; none before the first step."""
        if self.steps == 0:
            return []
        return [
            RankSample(rank, step_seconds=step / self.steps, data_seconds=data / self.steps,
                       own_seconds=own / self.steps)
            for rank, (step, data, own) in sorted(self._sums.items())
        ]  # fmt: skip
