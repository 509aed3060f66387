"""Batch norms in a module that DeepSpeed has cast to 16 bits."""

from __future__ import annotations

from torch import nn


def statistics_in_the_type_of_weights(module: nn.Module) -> int:
    """Cast running statistics to their layer's weights' type; returns the number of layers that were changed.

    DeepSpeed casts parameters and, since 0.19, leaves buffers in fp32 (`_cast_module_mixed_precision`); torch's batch
    norm refuses weights in 16 bits beside statistics in 32, on CPUs and on GPUs.
    """
    changed = 0
    for layer in module.modules():
        # Instance norms that keep statistics are of this class too.
        if not isinstance(layer, nn.modules.batchnorm._NormBase) or layer.weight is None:
            continue
        statistics = {name: getattr(layer, name) for name in ("running_mean", "running_var")}
        if any(value is not None and value.dtype != layer.weight.dtype for value in statistics.values()):
            for name, value in statistics.items():
                setattr(layer, name, value.to(layer.weight.dtype))
            changed += 1
    return changed
