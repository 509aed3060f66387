"""The numbers and texts of a training's progress: speed, time left, and the metrics that fit on the screen. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from launcher.core.wrapping import escape_controls

# Batches of the recent speed.
_RECENT = 50
# Characters of the longest number in `.4g`, without a minus sign; texts below it do not move when a value changes.
_VALUE_WIDTH = 9
_NARROWEST_BAR = 4


class SpeedMeter:
    """Measures the speed of a training, without its first batch, validations and checkpoints.

    Called at the start and at the end of each batch, and before anything that is not training.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._mark: float | None = None
        self._paused_at: float | None = None
        self._is_warm = False
        self._recent = deque[tuple[float, int]](maxlen=_RECENT)
        self._seconds = self._paused_seconds = 0.0
        self._batches = self._steps = 0

    def batch_begins(self) -> None:
        """Continue to measure, if it was paused."""
        now = self._now()
        if self._paused_at is not None:
            self._paused_seconds += now - self._paused_at
            self._paused_at = None
        if self._mark is None:
            self._mark = now

    def batch_ends(self, steps: int) -> None:
        """Count a batch after which the optimizers made `steps` steps."""
        now, mark = self._now(), self._mark
        self._mark = now
        if mark is not None and self._is_warm:
            self._recent.append((now - mark, steps))
            self._seconds += now - mark
            self._batches += 1
            self._steps += steps
        self._is_warm = True

    def pause(self) -> None:
        """Leave out the time until the next batch begins."""
        if self._mark is not None and self._is_warm:
            self._paused_at = self._mark
        self._mark = None

    def recent(self) -> float | None:
        """Optimizer steps in a second of training, over the last 50 batches; None before the second batch."""
        seconds = sum(each for each, _ in self._recent)
        return sum(steps for _, steps in self._recent) / seconds if seconds > 0 else None

    def mean(self) -> float | None:
        """Optimizer steps in a second of training, since this process began to train."""
        return self._steps / self._seconds if self._seconds > 0 else None

    def seconds_left(self, length: TrainingLength) -> float | None:
        """Time until the first limit of the training is reached; None if it is not known.

        Each batch is expected to take as long as the recent ones, with its share of the validations and checkpoints so
        far.
        """
        left = [] if length.seconds_left is None else [length.seconds_left]
        if self._recent and self._batches:
            batch = sum(each for each, _ in self._recent) / len(self._recent) + self._paused_seconds / self._batches
            if length.batches_left is not None:
                left.append(length.batches_left * batch)
            if length.steps_left is not None and self._steps:
                left.append(length.steps_left * batch * self._batches / self._steps)
        return max(min(left), 0.0) if left else None


@dataclass(frozen=True, slots=True)
class TrainingLength:
    """How much of a training is left by each of its limits; None for a limit that it does not have.

    Attributes:
        steps: optimizer steps of the complete training.
        steps_left: until `max_steps`.
        batches_left: until `max_epochs`.
        seconds_left: until `max_time`.
    """

    steps: int | None = None
    steps_left: int | None = None
    batches_left: int | None = None
    seconds_left: float | None = None


def format_duration(seconds: float) -> str:
    """As in '0:01:12' or '2 days, 1:02:03'."""
    days, rest = divmod(round(seconds), 86400)
    clock = f"{rest // 3600}:{rest // 60 % 60:02}:{rest % 60:02}"
    return clock if not days else f"{days} day{'s' if days > 1 else ''}, {clock}"


def format_speed(steps_per_second: float) -> str:
    """As in '19.8 steps/s'; '2.5 s/step' if a step takes longer than a second."""
    if steps_per_second >= 1:
        return f"{_three_digits(steps_per_second)} steps/s"
    return f"{_three_digits(1 / steps_per_second)} s/step" if steps_per_second > 0 else "0 steps/s"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def format_mean(recent: float, mean: float) -> str:
    """The mean in the unit of the recent speed, which stands before it."""
    is_fast = recent >= 1 or mean <= 0
    return f"(mean {_three_digits(mean if is_fast else 1 / mean)})"


def order_metrics(
    in_bar: Mapping[str, float], logged: Mapping[str, float], most: int | None = None
) -> tuple[dict[str, float], int]:
    """The metrics to show and the number of the others: those with `prog_bar=True` first, then the rest as logged.

    `most` limits the rest, never those with `prog_bar=True`.
    """
    rest = {name: value for name, value in logged.items() if name not in in_bar and name != "epoch"}
    count = len(rest) if most is None else max(most - len(in_bar), 0)
    return {**in_bar, **dict(list(rest.items())[:count])}, max(len(rest) - count, 0)


def format_metrics(metrics: Mapping[str, float], hidden: int = 0) -> str:
    """All metrics on one line."""
    items = [f"{escape_controls(name)} {value:.4g}" for name, value in metrics.items()]
    return "  ".join([*items, *([f"and {hidden} more"] if hidden else [])])


def wrap_metrics(metrics: Mapping[str, float], width: int, lines: int) -> list[str]:
    """The metrics on at most `lines` lines, none longer than `width`; the last line counts those that do not fit.

    A metric is never divided between two lines; a name that is too long is shortened.
    """
    items = [_item(escape_controls(name), value, width) for name, value in metrics.items()]
    for shown in range(len(items), -1, -1):
        more = [f"and {len(items) - shown} more"] if shown < len(items) else []
        wrapped = wrap_items([*items[:shown], *more], width)
        if len(wrapped) <= lines:
            return [line[:width] for line in wrapped]
    return []


def _item(name: str, value: float, width: int) -> str:
    text = f"{value:.4g}".ljust(_VALUE_WIDTH)
    room = width - len(text) - 1
    return f"{name if len(name) <= room else name[: max(room - 1, 0)] + '…'} {text}"


def wrap_items(items: Sequence[str], width: int) -> list[str]:
    """Lines of items, two spaces between them, not longer than `width` unless an item is."""
    lines: list[str] = []
    for item in items:
        if lines and len(lines[-1]) + 2 + len(item) <= width:
            lines[-1] += f"  {item}"
        else:
            lines.append(item)
    return [line.rstrip() for line in lines]


@dataclass(frozen=True, slots=True)
class BarTexts:
    """The texts beside a progress bar, empty if unknown."""

    name: str
    count: str
    speed: str = ""
    mean: str = ""
    time_left: str = ""


def fit_bar(texts: BarTexts, width: int) -> tuple[str, int, str]:
    """The text before the bar, the width of the bar (0 for none) and the text after it, on one line of `width`.

    What does not fit beside a bar is left out, in this order: the mean, the speed, the time left. Then the bar is left
    out, then the rest is cut.
    """
    optional = ((texts.speed, texts.mean, texts.time_left), (texts.speed, "", texts.time_left),
                ("", "", texts.time_left), ("", "", ""))  # fmt: skip
    for speed, mean, time_left in optional:
        speeds = " ".join(filter(None, (speed, mean)))
        after = "  ".join(filter(None, (texts.count, speeds, time_left)))
        bar = width - len(texts.name) - len(after) - 2
        if bar >= _NARROWEST_BAR:
            return texts.name, bar, after
    return f"{texts.name} {texts.count}"[:width], 0, ""
