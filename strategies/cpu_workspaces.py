"""Memory of oneDNN on a CPU, besides tensors: workspaces of LSTMs and convolutions, code of 16-bit products.

Sizes of workspaces are upper bounds for every CPU; the size of the code is measured on this CPU. Under fake tensors
`aten::mkldnn_rnn_layer` returns an empty workspace; torch keeps the real one from forward to backward
(ATen/native/mkldnn/RNN.cpp).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

_LINE = 64  # bytes
_FP32 = 4
_FORWARD, _BACKWARD = "aten::mkldnn_rnn_layer", "aten::mkldnn_rnn_layer_backward"
_PRODUCTS = ("aten::mm", "aten::addmm")
# Each part of an LSTM's workspace begins on a new page. torch 2.10 has oneDNN 3.7, with more parts and rows.
_PAGE, _FEWER_ROWS = 4096, (3, 8)
_CONVOLUTION, _CONVOLUTION_BACKWARD = "aten::convolution", "aten::convolution_backward"


class CpuWorkspaces(TorchDispatchMode):
    """Allocates what oneDNN would, so that a `StorageTracker` outside of this mode counts it."""

    def __init__(self) -> None:
        super().__init__()
        self._products: set[tuple[torch.dtype, Hashable]] = set()

    @property
    def kernels(self) -> int:
        """Bytes of code for the 16-bit matrix products so far; the process keeps it."""
        return sum(product_code(dtype) for dtype, _ in self._products)

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name
        if name in (_CONVOLUTION, _CONVOLUTION_BACKWARD):
            out = func(*args, **(kwargs or {}))
            reordered = torch.empty(_reordered(name, args, out), dtype=torch.uint8)
            del reordered
            return out
        if name in _PRODUCTS:
            left, right = args[:2] if name == "aten::mm" else args[1:3]
            if left.element_size() < _FP32:
                self._products.add((left.dtype, (left.shape, left.stride(), right.shape, right.stride())))
        if name not in (_FORWARD, _BACKWARD):
            return func(*args, **(kwargs or {}))
        # Input and the two weights have the same positions in both.
        packed = torch.empty(2 * sum(weight.nbytes for weight in args[1:3]), dtype=torch.uint8)
        out = func(*args, **(kwargs or {}))
        del packed
        if name == _FORWARD and out[3].numel() == 0:
            size = lstm_workspace(args[0].shape, args[2].shape[1], args[0].element_size())
            return (*out[:3], torch.empty(size, dtype=torch.uint8))
        return out


def lstm_workspace(inputs: Sequence[int], hidden: int, element_size: int = 4) -> int:
    """Upper bound of the bytes that oneDNN keeps for one LSTM layer in one direction.

    For each step the gates and a row of states; for each step and the one before the first, states and their
    gradients in rows as wide as the layer's input or states, and the states of cells (oneDNN's `rnn_utils.cpp`,
    `set_workspace_sizes`); in 16 bits gradients and the states of cells are still in fp32, with one row less. The
    layout does not depend on the instruction set.

    Args:
        inputs: steps, batch and width.
        hidden: the width of the states.
        element_size: of the inputs and weights.
    """
    steps, batch, width = inputs
    wide = max(width, hidden)
    is_old = _onednn_version() < _FEWER_ROWS
    gates = _row(4 * hidden, element_size) + _row(hidden, element_size)
    states = (6 if is_old else 2) * _row(wide, element_size) + 4 * _row(wide, _FP32)
    cells = (4 if element_size >= _FP32 else 3) * _row(hidden, _FP32)
    return batch * (steps * gates + (steps + 1) * (states + cells)) + (9 if is_old else 7) * _PAGE


@functools.cache
def _onednn_version() -> tuple[int, ...]:
    found = re.search(r"v(\d+)\.(\d+)", torch.__config__.show().partition("MKL-DNN")[2])
    return (0,) if found is None else tuple(map(int, found.groups()))


@functools.cache
def product_code(dtype: torch.dtype) -> int:
    """Bytes of code that oneDNN generates on this CPU for one shape of a matrix product, and keeps.

    Runs two small products: the first creates what all shapes share. 0 if oneDNN has no kernel for this type, or if
    there is no `/proc`.
    """
    found = 0
    for rows, inner, columns in ((61, 67, 71), (73, 79, 83)):
        left, right = (torch.zeros(s, dtype=dtype, device="cpu") for s in ((rows, inner), (inner, columns)))
        before = _generated_code()
        torch.mm(left, right)
        found = _generated_code() - before
    return max(0, found)


def _generated_code() -> int:
    """Bytes of this process's executable memory that is not mapped from a file."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return 0
    mapped = [line.split() for line in lines]
    ranges = [fields[0].split("-") for fields in mapped if "x" in fields[1] and len(fields) == 5]
    return sum(int(end, 16) - int(begin, 16) for begin, end in ranges)


def _reordered(name: str, args: tuple[Any, ...], out: Any) -> int:
    """Upper bound of a convolution's tensors in oneDNN's own layout: some kernels need no copies.

    Backward computes the input's gradient first and the weight's after it (ATen/native/mkldnn/Conv.cpp).
    """
    if name == _CONVOLUTION:
        return sum(tensor.nbytes for tensor in (*args[:2], out))
    arriving, inputs, weight = args[:3]
    of_input, of_weight = (0 if found is None else found.nbytes for found in out[:2])
    return arriving.nbytes + max(weight.nbytes + of_input if of_input else 0, inputs.nbytes + of_weight)


def _row(width: int, element_size: int) -> int:
    """Bytes of a row: whole cache lines, and one more for each multiple of 256 elements (`get_good_ld`)."""
    size = -(-width * element_size // _LINE) * _LINE
    return size + _LINE if size // element_size % 256 == 0 else size
