"""What a W&B run answers code that takes it for another tracker's."""

from __future__ import annotations

from typing import Any


def say_what_it_lacks(run: Any) -> None:
    """Let an attribute that the run lacks be an error that says what to write.

    Args:
        run: W&B's; it stays the same object, and of W&B's class.
    """

    def lacks(self: Any, name: str) -> Any:
        raise AttributeError(
            f"the W&B run, which self.logger.experiment is here, has no {name!r}: for TensorBoard's methods set "
            "trainer.logger to true or to a TensorBoardLogger",
            name=name,
            obj=self,
        )

    kind: type[Any] = type(run)

    def reduce(self: Any, protocol: Any) -> Any:
        # Pickled as W&B's own class, which another process has.
        return object.__new__, (kind,), self.__getstate__()

    if not hasattr(kind, "__getattr__"):
        # W&B's own setter takes known names alone.
        object.__setattr__(
            run, "__class__", type(kind.__name__, (kind,), {"__getattr__": lacks, "__reduce_ex__": reduce})
        )
