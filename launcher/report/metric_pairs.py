"""Groups the metrics that belong in one plot, as `train_loss` and `val_loss`, by their names. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Stage = Literal["train", "validation", "test", ""]
_STAGES: dict[str, Stage] = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "dev", "eval"), "validation"),
    **dict.fromkeys(("test", "testing", "tst"), "test"),
}  # fmt: skip
_ORDER: tuple[Stage, ...] = ("train", "", "validation", "test")
# Lightning's suffixes: of a metric for each of several data loaders, and of one logged by step and by epoch.
_LOADER = re.compile(r"/dataloader_idx_\d+$")
_BY_STEP = re.compile(r"(?<=[^_])_(step|epoch)$")
# `time_per_step` and `time_per_epoch` are different quantities, and so are a number and the last value of a step.
_NO_SUFFIX = re.compile(r"(^|[/_.\- ])(per|global|num|n|max|this|last|each)_(step|epoch)$", re.IGNORECASE)
# Tokens are separated by these, or begin with a capital letter after a small one.
_SEPARATOR = re.compile(r"[/_.\- ]+|(?<=[a-z])(?=[A-Z])")


@dataclass(frozen=True, slots=True)
class MetricGroup:
    """Metrics of one plot: training first, then validation; `title` is what their names have in common."""

    title: str
    names: tuple[str, ...]


def group_metrics(names: Sequence[str]) -> list[MetricGroup]:
    """Every metric in exactly one group; groups with a training and a validation metric first, then by title."""
    stems: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        stems.setdefault(split_stage(name)[1].lower(), []).append(name)
    groups: list[MetricGroup] = []
    for members in stems.values():
        ordered = sorted(members, key=lambda name: (_ORDER.index(split_stage(name)[0]), sort_naturally(name)))
        title = split_stage(ordered[0])[1] if len(ordered) > 1 else ordered[0]
        groups.append(MetricGroup(title, tuple(ordered)))
    return sorted(groups, key=lambda group: (not has_pair(group), sort_naturally(group.title)))


def has_pair(group: MetricGroup) -> bool:
    """Whether the group has metrics of two stages, as of training and validation."""
    return len({split_stage(name)[0] for name in group.names}) > 1


def split_stage(name: str) -> tuple[Stage, str]:
    """A metric's stage ('' if its name has none), and its name without the stage and Lightning's suffixes."""
    stem = _LOADER.sub("", name)
    if not _NO_SUFFIX.search(stem):
        stem = _BY_STEP.sub("", stem)
    for start, end in _find_tokens(stem):
        stage = _STAGES.get(stem[start:end].lower())
        if stage is not None:
            before, after = stem[:start], stem[end:]
            # One separator is removed too: `train/my_loss` becomes `my_loss`, `a/val/b` becomes `a/b`.
            rest = before + after.lstrip("/_.- ") if after else before.rstrip("/_.- ")
            if rest:
                return stage, rest
    return "", stem


def _find_tokens(name: str) -> list[tuple[int, int]]:
    """Start and end of the first and last token of each part between slashes: a stage is not in the middle."""
    found: list[tuple[int, int]] = []
    offset = 0
    for part in name.split("/"):
        edges = [0, *(edge for match in _SEPARATOR.finditer(part) for edge in match.span()), len(part)]
        tokens = [(offset + a, offset + b) for a, b in zip(edges[::2], edges[1::2], strict=True) if b > a]
        found += dict.fromkeys([*tokens[:1], *tokens[-1:]])
        offset += len(part) + 1
    return found


def sort_naturally(name: str) -> list[tuple[bool, int, str]]:
    """A key for sorting in which `layer_2` comes before `layer_10`."""
    parts = re.split(r"([0-9]+)", name.lower())
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]
