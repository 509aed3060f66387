"""Parameter groups without parameters, as of biases where only matrices are trained: DeepSpeed drops them.

A learning rate schedule has a rate for each group that it was made with, so it keeps an optimizer with all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

# Under this key of a checkpoint their settings are kept, by their places among all groups.
EMPTY_GROUPS = "empty_param_groups"


class GroupsOfBoth:
    """An optimizer with all groups for the schedule, and one for DeepSpeed that lacks the empty ones.

    They share each group's settings, so that the schedule sets the rates of both.

    Args:
        optimizer: what `configure_optimizers` gave; the schedule's from now on.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._all = optimizer
        self._is_empty = [not group["params"] for group in optimizer.param_groups]
        self.optimizer = optimizer
        if any(self._is_empty):
            self.optimizer = _twin(optimizer)
            self.optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
            # The schedule asks whether its optimizer was stepped; the other one is.
            vars(optimizer)["_opt_called"] = True

    def settings(self) -> dict[int, dict[str, Any]]:
        """Those of the empty groups, by their places."""
        groups = zip(self._all.param_groups, self._is_empty, strict=True)
        return {n: _without_parameters(group) for n, (group, empty) in enumerate(groups) if empty}

    def restored(self, settings: Mapping[int, Mapping[str, Any]]) -> None:
        """Share the settings again after DeepSpeed's optimizer was restored, which makes them anew.

        Args:
            settings: what `settings` gave when the checkpoint was saved; empty if it has none.
        """
        if self.optimizer is self._all:
            return
        own = iter(list(self.optimizer.param_groups))
        groups = zip(self._all.param_groups, self._is_empty, strict=True)
        self._all.param_groups = [group if empty else next(own) for group, empty in groups]
        for n, values in settings.items():
            if n < len(self._is_empty) and self._is_empty[n]:
                self._all.param_groups[n].update(values)


def with_empty_groups(
    groups: Sequence[Mapping[str, Any]], settings: Mapping[int, Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """The groups of an optimizer's state dict, with the empty ones in their places."""
    own = iter(groups)
    count = len(groups) + len(settings)
    return [{**settings[n], "params": []} if n in settings else next(own) for n in range(count)]


def _twin(optimizer: Optimizer) -> Optimizer:
    """Another optimizer of the same class with the same states."""
    twin = object.__new__(type(optimizer))
    # A schedule has put a `step` of the first one there.
    vars(twin).update({name: value for name, value in vars(optimizer).items() if name != "step"})
    return twin


def _without_parameters(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}
