"""Batch norms with weights cast by DeepSpeed compute and keep statistics as in fp32."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from strategies.deepspeed_patches import compute_with_fp32_weights


def _cast_as_deepspeed_does(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(4),
        nn.BatchNorm1d(4, momentum=0.003),
        nn.SyncBatchNorm(4),
        nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
    ],
)
def test_cast_batch_norm_matches_fp32_output_and_statistics(norm: nn.Module, dtype: torch.dtype) -> None:
    # Inputs whose variance overflows fp16.
    batches = [(300 * torch.randn(16, 4, 8)).to(dtype) for _ in range(20)]
    exact, layer = copy.deepcopy(norm), _cast_as_deepspeed_does(copy.deepcopy(norm), dtype)
    if not isinstance(norm, nn.InstanceNorm1d):  # refused before torch 2.13 only
        with pytest.raises(RuntimeError, match="expected scalar type"):
            layer(batches[0])
        layer = _cast_as_deepspeed_does(copy.deepcopy(norm), dtype)
    assert compute_with_fp32_weights(nn.Sequential(layer)) == 1
    for batch in batches:
        layer(batch).sum().backward()
        exact(batch.float())
    assert layer.weight.grad.dtype == dtype
    assert layer.running_var.dtype == torch.float32
    torch.testing.assert_close(layer.state_dict()["running_var"], exact.running_var)
    layer.eval()
    exact.eval()
    torch.testing.assert_close(layer(batches[0]).float(), exact(batches[0].float()), rtol=0.02, atol=0.02)


def test_patched_norm_can_be_copied_and_pickled() -> None:
    layer = _cast_as_deepspeed_does(nn.BatchNorm1d(4), torch.bfloat16)
    compute_with_fp32_weights(layer)
    batch = torch.randn(8, 4, dtype=torch.bfloat16)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):  # noqa: S301 -- our own, of this moment
        copied(batch)
        assert copied.num_batches_tracked == 1
    assert layer.num_batches_tracked == 0, "the forward of a copy uses the copy"


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm1d(4, affine=False),
        nn.BatchNorm1d(4, track_running_stats=False),
        nn.GroupNorm(2, 4),
        nn.LayerNorm(3),
    ],
)
def test_layers_without_mixed_types_are_not_patched(layer: nn.Module) -> None:
    _cast_as_deepspeed_does(layer, torch.bfloat16)
    assert compute_with_fp32_weights(layer) == 0
    layer(torch.randn(8, 4, 3, dtype=torch.bfloat16))
