"""The moments of a training at which no hook is running, so that a rank can record its state."""

from __future__ import annotations

import enum
from typing import Protocol


class StepMoment(enum.IntEnum):
    """When within a step a record was written; a later one of the same step is more exact.

    Attributes:
        FORWARD: the forward pass is done; the other ranks can finish the step with this rank's gradients.
        BATCH: the hooks of the batch's end are done.
        VALIDATED: a validation that follows the batch is done too.
        EPOCH: the end of the epoch is done.
    """

    FORWARD = 0
    BATCH = 1
    VALIDATED = 2
    EPOCH = 3


class MomentObserver(Protocol):
    """Follows a training from moment to moment."""

    def reach(self, moment: StepMoment, *, has_validated: bool = False) -> None:
        """The training is at this moment; `has_validated`: a validation has run since the one before."""
        ...

    def leave(self) -> None:
        """A validation or the end of the epoch begins, whose hooks may change the states of callbacks."""
        ...
