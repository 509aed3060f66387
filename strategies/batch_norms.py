"""Batch norms in a module that DeepSpeed has cast to 16 bits."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn


def compute_with_fp32_weights(module: nn.Module) -> int:
    """Make batch norms with fp32 running statistics compute with fp32 weights; return how many there are.

    DeepSpeed casts parameters and, since 0.19, leaves buffers as they are (`_cast_module_mixed_precision`). torch's
    batch norm accepts a 16-bit input with fp32 weights and statistics, as under autocast, but no mixture of the two.
    16-bit statistics would not help: bf16 loses the small steps of a running mean, fp16 overflows at 65,504.
    """
    norms = [layer for layer in module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    mixed = [n for n in norms if n.weight is not None and n.running_mean is not None
             and n.weight.dtype != n.running_mean.dtype]  # fmt: skip
    for layer in mixed:
        # A bound method could not be pickled.
        layer.forward = partial(_forward, layer)
    return len(mixed)


def _forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    return type(layer).forward(_InFp32(layer), *args, **kwargs)


class _InFp32:
    """A view of a norm with fp32 weights, for the forward code of its class."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        # Differentiable copies: autograd casts their gradients back to the type of the parameters.
        self.weight = layer.weight.float()
        self.bias = None if layer.bias is None else layer.bias.float()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)
