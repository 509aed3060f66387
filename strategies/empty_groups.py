"""Parameter groups without parameters, which DeepSpeed removes: biases, for example, if only matrices are trained.

A learning rate schedule has a rate for each group of its optimizer, so it keeps an optimizer with all groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

# Key in a checkpoint of their settings, by their indices among all groups.
EMPTY_GROUPS = "empty_param_groups"
# Key of the parameters' names in the other groups, if some are frozen: DeepSpeed removes these from the groups.
GROUP_NAMES = "param_group_names"


class SplitOptimizer:
    """An optimizer with all groups for the schedule, and one without the empty groups for DeepSpeed.

    Both share the settings of each group, so that the schedule sets the rates of both.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._all = optimizer
        self._is_empty = [not group["params"] for group in optimizer.param_groups]
        self.optimizer = optimizer
        if any(self._is_empty):
            self.optimizer = _twin(optimizer)
            self.optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
            # The schedule checks that its optimizer has stepped; the other one does.
            vars(optimizer)["_opt_called"] = True

    def settings(self) -> dict[int, dict[str, Any]]:
        """Settings of the empty groups, by their indices."""
        groups = zip(self._all.param_groups, self._is_empty, strict=True)
        return {n: _without_parameters(group) for n, (group, empty) in enumerate(groups) if empty}

    def share_settings(self, settings: Mapping[int, Mapping[str, Any]]) -> None:
        """Share the settings again after DeepSpeed has restored its optimizer, which replaces them.

        `settings` are those saved in the checkpoint; empty without one.
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
    """The groups of an optimizer's state dict, with the empty ones inserted."""
    own = iter(groups)
    count = len(groups) + len(settings)
    return [{**settings[n], "params": []} if n in settings else next(own) for n in range(count)]


def with_frozen(state: Mapping[str, Any], names: Sequence[str], groups: Sequence[Sequence[str]]) -> dict[str, Any]:
    """An optimizer's state dict whose groups have the frozen parameters again.

    `names` are of the parameters in `state`, `groups` those of each group before DeepSpeed.
    """
    states = {names[int(number)]: values for number, values in state["state"].items()}
    ordered = [name for group in groups for name in group]
    numbers = {name: number for number, name in enumerate(ordered)}
    pairs = zip(state["param_groups"], groups, strict=True)
    filled = [{**group, "params": [numbers[each] for each in own]} for group, own in pairs]
    return {"state": {numbers[name]: values for name, values in states.items()}, "param_groups": filled}


def _twin(optimizer: Optimizer) -> Optimizer:
    """Another optimizer of the same class with the same states."""
    twin = object.__new__(type(optimizer))
    # A schedule has replaced `step` by a wrapper bound to the first one.
    vars(twin).update({name: value for name, value in vars(optimizer).items() if name != "step"})
    return twin


def _without_parameters(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}
