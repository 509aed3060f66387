"""What a rank is doing as seen by its agent: phases of a training, each from one of Lightning's hooks to the next."""

from __future__ import annotations

from enum import IntEnum


class Phase(IntEnum):
    """A phase of a rank; the numbers are in its heartbeat file.

    A phase begins before the user's callbacks of the same hook. A phase of its own has whatever may take much longer
    than its neighbours: the end of an evaluation is not the time between two of its batches.
    """

    SETUP = 0
    FIRST_STEP = 1
    STEP = 2
    BETWEEN_STEPS = 3
    EPOCH_END = 4
    EPOCH_START = 5
    EVALUATION_START = 6
    EVALUATION_STEP = 7
    BETWEEN_EVALUATION_STEPS = 8
    EVALUATION_END = 9
    CHECKPOINT = 10
    ENDING = 11
    ENDED = 12

    @property
    def text(self) -> str:
        """Its name for the user."""
        return _TEXTS[self]


_TEXTS = {
    Phase.SETUP: "set-up",
    Phase.FIRST_STEP: "first step",
    Phase.STEP: "step",
    Phase.BETWEEN_STEPS: "between two steps",
    Phase.EPOCH_END: "end of an epoch",
    Phase.EPOCH_START: "start of an epoch",
    Phase.EVALUATION_START: "start of an evaluation",
    Phase.EVALUATION_STEP: "evaluation step",
    Phase.BETWEEN_EVALUATION_STEPS: "between two evaluation steps",
    Phase.EVALUATION_END: "end of an evaluation",
    Phase.CHECKPOINT: "checkpoint",
    Phase.ENDING: "end of the training",
    Phase.ENDED: "after the training",
}
