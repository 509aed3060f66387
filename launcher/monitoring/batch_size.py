"""Counts the samples and the tokens of a batch by the shapes of its tensors, without waiting for the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

_DEEPEST = 4


def count_batch(batch: Any) -> tuple[int, int]:
    """Samples and tokens of a batch of tensors, in any nesting of mappings, lists and tuples; 0 if not known.

    Samples: the length of the first tensor that has a dimension, as Lightning counts them. Tokens: the elements of the
    first tensor of integers with two dimensions, (batch, sequence); padding counts too.
    """
    samples = tokens = 0
    for tensor in _list_tensors(batch, _DEEPEST):
        dimensions = tensor.ndim
        if not samples and dimensions:
            samples = tensor.shape[0]
        if dimensions == 2 and _is_integer(tensor):
            tokens = tensor.numel()
            break
    return samples, tokens


def _list_tensors(value: Any, depth: int) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, Mapping):
        for each in value.values():
            yield from _list_tensors(each, depth - 1)
    elif depth and isinstance(value, list | tuple):
        for each in value:
            yield from _list_tensors(each, depth - 1)


def _is_integer(tensor: Tensor) -> bool:
    kind = tensor.dtype
    return not kind.is_floating_point and not kind.is_complex and tensor.element_size() > 1  # bool and images have 1
