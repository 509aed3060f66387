"""Batch norms whose weights DeepSpeed has cast: they take statistics of one type with them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from strategies.batch_norms import statistics_in_the_type_of_weights


def _cast_as_deepspeed_does(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_batch_norm_trains(dtype: torch.dtype) -> None:
    net = _cast_as_deepspeed_does(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), dtype)
    batch = torch.randn(8, 4, dtype=dtype)
    with pytest.raises(RuntimeError, match="expected scalar type"):
        net(batch)
    assert statistics_in_the_type_of_weights(net) == 1
    net(batch).sum().backward()
    assert net[1].running_var.dtype == dtype
    assert "1.running_var" in net.state_dict()
    assert statistics_in_the_type_of_weights(net) == 0


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm1d(4, affine=False),
        nn.BatchNorm1d(4, track_running_stats=False),
        nn.InstanceNorm1d(4),
        nn.GroupNorm(2, 4),
        nn.LayerNorm(3),
    ],
)
def test_layers_that_take_their_input_as_they_are_stay_so(layer: nn.Module) -> None:
    _cast_as_deepspeed_does(layer, torch.bfloat16)
    before = {name: value.dtype for name, value in layer.named_buffers()}
    assert statistics_in_the_type_of_weights(layer) == 0
    assert {name: value.dtype for name, value in layer.named_buffers()} == before
    layer(torch.randn(8, 4, 3, dtype=torch.bfloat16))
