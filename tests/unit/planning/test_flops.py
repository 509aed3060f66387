"""The operations of a sample: as torch counts them in a real step, and by hand; and the share of the peak."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from launcher.planning.flops import ModelWork, find_peak_flops, format_flops
from launcher.planning.profile import TraceTarget, trace_profile
from strategies.precision import Precision
from strategies.step_trace import ModelProfile
from strategies.trace import CPU_FORMULAS, PlannedTrainer


class _Module(pl.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).float().square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 4))


def _conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.Flatten(),
                         nn.Linear(16 * 3 * 3, 2))  # fmt: skip


class _Gpt(nn.Module):
    def __init__(self, width: int = 16, heads: int = 2, layers: int = 2, vocabulary: int = 11) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        block = nn.ModuleDict
        self.heads = heads
        self.blocks = nn.ModuleList(
            block({"qkv": nn.Linear(width, 3 * width), "out": nn.Linear(width, width),
                   "up": nn.Linear(width, 4 * width), "down": nn.Linear(4 * width, width)})
            for _ in range(layers)
        )  # fmt: skip
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for each in self.blocks:
            layer: Any = each
            q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in layer["qkv"](x).chunk(3, -1))
            attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + layer["out"](attended.transpose(1, 2).flatten(-2))
            x = x + layer["down"](nn.functional.gelu(layer["up"](x)))
        return self.head(x)


def _raw(formula: Any) -> Any:
    """A formula that torch gives tensors, not shapes."""

    def count(*arguments: Any, **options: Any) -> int:
        return formula(*arguments, **options)

    vars(count)["_get_raw"] = True
    return count


_CASES: list[tuple[Any, Any]] = [
    (_mlp, lambda size: torch.randn(size, 8)),
    (_conv, lambda size: torch.randn(size, 3, 8, 8)),
    (_Gpt, lambda size: torch.randint(11, (size, 6))),
]


def _profile(
    make: Any, batch: Tensor, *, checkpointed: bool = False, precision: Precision = Precision.FP32_TRUE
) -> Any:
    target = TraceTarget("cpu", "cpu", checkpoint_activations=checkpointed)
    found = trace_profile(lambda: _Module(make()), batch, precision, PlannedTrainer(), target)
    assert isinstance(found, ModelProfile)
    return found


@pytest.mark.parametrize("size", [4, 7])
@pytest.mark.parametrize(("make", "batch"), _CASES, ids=["mlp", "conv", "gpt"])
def test_the_plan_counts_as_torch_does_in_a_real_step(make: Any, batch: Any, size: int) -> None:
    module = _Module(make())
    with FlopCounterMode(display=False, custom_mapping={op: _raw(f) for op, f in CPU_FORMULAS.items()}) as count:
        module.training_step(batch(size), 0).backward()
    profile = _profile(make, batch(size))
    assert profile.method == "traced"
    assert profile.flops_per_sample * size == count.get_total_flops()


def test_an_mlp_by_hand() -> None:
    # 2 operations for each weight forward; backward as many for the gradient of each weight, and as many for the
    # gradient of each input except that of the first layer, which is data.
    first, second = 8 * 32, 32 * 4
    assert _profile(_mlp, torch.randn(4, 8)).flops_per_sample == 2 * (first + second) + 2 * (first + 2 * second)


def test_a_gpt_by_hand() -> None:
    tokens, width, layers, vocabulary = 6, 16, 2, 11
    weights = layers * (3 + 1 + 4 + 4) * width * width + width * vocabulary
    # Forward: scores, and their product with the values. Backward: a fused kernel computes the scores again, and four
    # gradients, 5 products for the 2.
    attention = layers * 2 * 2 * tokens * tokens * width
    count = _profile(_Gpt, torch.randint(11, (4, tokens))).flops_per_sample
    assert count == 3 * 2 * tokens * weights + 3.5 * attention


def test_activation_checkpointing_adds_no_model_flops() -> None:
    batch = torch.randint(11, (4, 6))
    plain, again = _profile(_Gpt, batch), _profile(_Gpt, batch, checkpointed=True)
    assert again.flops_per_sample == plain.flops_per_sample


def test_mixed_precision_does_not_change_the_count() -> None:
    batch = torch.randn(4, 8)
    mixed = _profile(_mlp, batch, precision=Precision.BF16_MIXED)
    assert mixed.flops_per_sample == _profile(_mlp, batch).flops_per_sample


def test_the_peak_is_that_of_all_devices_in_this_precision() -> None:
    devices = {"NVIDIA H100 80GB HBM3": 2, "NVIDIA A100-SXM4-80GB": 1}
    assert find_peak_flops("cuda", devices, "bf16-mixed") == (2 * 989 + 312) * 1e12
    assert find_peak_flops("cuda", devices, "32-true") == (2 * 67 + 19.5) * 1e12
    for kind, names, precision in (
        ("cpu", {"Intel Xeon": 2}, "32-true"),
        ("cuda", {**devices, "Other GPU": 1}, "bf16-mixed"),
        ("cuda", devices, "64-true"),
        ("cuda", devices, "custom"),
    ):
        assert find_peak_flops(kind, names, precision) is None


def test_the_speed_is_known_if_a_step_was_traced() -> None:
    assert ModelWork().find_speed(10.0) is None
    assert ModelWork(3e9).find_speed(10.0) == 3e10


@pytest.mark.parametrize(("flops", "text"), [(1.5e12, "1.5 TFLOP"), (45.6e6, "45.6 MFLOP"), (800, "800 FLOP")])
def test_numbers_of_operations_are_readable(flops: float, text: str) -> None:
    assert format_flops(flops) == text
