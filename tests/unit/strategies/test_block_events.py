"""The order in which a traced step reaches the blocks that FSDP2 gathers."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from launcher.planning.profile import TraceTarget, trace_profile
from strategies.fsdp import FSDP2
from strategies.machine import MachineModel
from strategies.model_shape import describe_model, describe_parameters, find_optimizer
from strategies.precision import Precision
from strategies.step_trace import ModelProfile, StepTrace, at_batch_size
from strategies.trace import PlannedTrainer, TraceOptions, TraceTypes, trace_step
from tests.support.model_families import SMALL
from tests.support.model_zoo import MODELS, Net, adamw


def blocks_of(trace: StepTrace) -> list[tuple[str, int | None]]:
    return [(event.kind, event.index) for event in trace.events if event.kind != "gradient"]


def test_blocks_are_entered_in_order_and_completed_in_reverse() -> None:
    entry = MODELS["gpt"]
    found = [trace_step(entry.make, entry.batch(n), n) for n in (2, 4)]
    trace, model = found[0]
    assert blocks_of(trace) == [
        ("enter", 0), ("leave", 0), ("enter", 1), ("leave", 1), ("loss", None),
        # A block's gradients are complete before the previous block's outputs are reached.
        ("outputs", 1), ("inputs", 1), ("outputs", 0), ("inputs", 0), ("end", None),
    ]  # fmt: skip
    order = [e.index for e in trace.events if e.kind == "gradient"]
    assert sorted(i for i in order if i is not None) == list(range(len(model.parameters)))
    kinds = [e.kind for e in trace.events]
    last_block = {e.index for e in trace.events[kinds.index("outputs") : kinds.index("inputs")] if e.kind == "gradient"}
    assert last_block == set(model.blocks[1])
    # The peaks of the events are those of the passes.
    assert max(e.peak for e in trace.events[: kinds.index("loss") + 1]) == trace.forward
    assert max(e.peak for e in trace.events[kinds.index("loss") + 1 :]) == trace.backward
    between = at_batch_size(found[0][0], found[1][0], 3)
    assert blocks_of(between) == blocks_of(trace)
    assert all(a.live <= b.live <= c.live for a, b, c in zip(
        trace.events, between.events, found[1][0].events, strict=True))  # fmt: skip


def test_block_of_frozen_and_first_layers_has_no_gradients_of_inputs() -> None:
    entry = MODELS["frozen"]
    trace, _ = trace_step(entry.make, entry.batch(4), 4)
    backward = blocks_of(trace)[blocks_of(trace).index(("loss", None)) + 1 :]
    # The first layer is frozen: its outputs need no gradient, nor do the second one's inputs.
    assert backward == [("outputs", 2), ("inputs", 2), ("outputs", 1), ("end", None)]


def test_block_is_complete_although_another_input_gets_gradients_from_more_blocks() -> None:
    entry = SMALL["encoder_decoder"]
    trace, _ = trace_step(entry.make, entry.batch(2), 2)
    backward = blocks_of(trace)[blocks_of(trace).index(("loss", None)) + 1 :]
    # Both decoder layers read the encoder's output; the encoder's input needs a gradient.
    assert backward == [*((kind, i) for i in (3, 2, 1, 0) for kind in ("outputs", "inputs")), ("end", None)]


class Repeated(nn.Module):
    """Calls one layer twice, and one not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](torch.relu(self.layers[1](self.layers[0](x))))


def test_repeated_call_is_an_event_of_its_own() -> None:
    trace, _ = trace_step(lambda: Net(Repeated(), adamw), (torch.zeros(2, 8), torch.zeros(2, 8)), 2)
    assert blocks_of(trace) == [
        ("enter", 0), ("leave", 0), ("enter", 1), ("leave", 1), ("enter", 1), ("leave", 1), ("loss", None),
        ("outputs", 1), ("inputs", 1), ("outputs", 1), ("inputs", 1), ("outputs", 0), ("end", None),
    ]  # fmt: skip


def test_block_that_is_computed_again_is_entered_once() -> None:
    entry = SMALL["vit"]
    plain, again = (
        trace_step(entry.make, entry.batch(4), 4, options=TraceOptions(checkpoint_activations=is_on))[0]
        for is_on in (False, True)
    )
    assert blocks_of(again) == blocks_of(plain)
    assert again.forward < plain.forward / 2


def test_tracing_leaves_no_hooks() -> None:
    modules: list[pl.LightningModule] = []

    def make() -> pl.LightningModule:
        modules.append(MODELS["gpt"].make())
        return modules[-1]

    trace_step(make, MODELS["gpt"].batch(2), 2, options=TraceOptions(is_fake=False))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules[0].modules())


def test_wrapped_classes_are_the_blocks() -> None:
    module = MODELS["gpt"].make()
    optimizer = find_optimizer(module.configure_optimizers())
    model = describe_model(module, optimizer, wrap=("LayerNorm",))
    nested = describe_model(module, optimizer, wrap=("LayerNorm", "Block"))
    # Of nested blocks the inner one has the parameters.
    assert [len(block) for block in model.blocks[:-1]] == [2] * 5
    assert set(model.blocks[:-1]) <= set(nested.blocks)
    assert len(nested.blocks) == 2 + 5 + 1
    for shape in (model, nested, describe_parameters(module)):
        assert sorted(i for block in shape.blocks for i in block) == list(range(len(shape.parameters)))


class Mixed(pl.LightningModule):
    """Has a scalar, a batch norm, and an average of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
        self.average = nn.Parameter(torch.zeros(8, 8), requires_grad=False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.net(batch) * self.scale).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_parameters_that_fsdp2_leaves_whole_are_known() -> None:
    module = Mixed()
    names = [name for name, _ in module.named_parameters()]
    found = describe_parameters(module)
    whole = {name for name, p in zip(names, found.parameters, strict=True) if p.is_whole}
    in_mixed = {name for name, p in zip(names, found.parameters, strict=True) if p.is_whole_in_mixed}
    assert whole == {"scale", "average"}
    assert in_mixed == {*whole, "net.1.weight", "net.1.bias"}
    assert not any(p.is_whole and i in block for block in found.blocks for i, p in enumerate(found.parameters))


def profile_of(make: Any, batch: Any, precision: Precision) -> ModelProfile:
    found = trace_profile(make, batch, precision, PlannedTrainer(2), TraceTarget("cpu"))
    assert isinstance(found, ModelProfile)
    return found


def test_mixed_precision_gathers_parameters_in_16_bits_under_autocast() -> None:
    entry = MODELS["gpt"]
    full = profile_of(entry.make, entry.batch(4), Precision.FP32_TRUE)
    mixed = profile_of(entry.make, entry.batch(4), Precision.BF16_MIXED)
    assert full.gathered is None
    assert FSDP2.traces(full) is full.plain
    assert mixed.gathered is not None
    # Autocast keeps copies of weights; gathered ones have the type already.
    assert mixed.gathered[1].forward < mixed.plain[1].forward
    assert FSDP2.traces(mixed) is mixed.gathered
    batch_norm = trace_step(Mixed, torch.zeros(4, 8), 4, types=TraceTypes(autocast=torch.bfloat16,
                            parameters=torch.bfloat16), options=TraceOptions(is_fake=False))  # fmt: skip
    assert batch_norm[0].forward > 0


class Interpolating(Mixed):
    """An op that takes one type only, and that autocast does not know."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return torch.lerp(batch, batch + 1, self.net[0].weight[0].expand_as(batch)).mean()


def test_step_that_fails_with_gathered_parameters_is_an_obstacle() -> None:
    batch = torch.zeros(4, 8)
    machine = MachineModel("cuda", 2, 2, 1 << 40, 1e12, 1e9, 1e9, 1e9, 1e9)
    full = profile_of(Interpolating, batch, Precision.FP32_TRUE)
    assert FSDP2.obstacle(full, machine, Precision.FP32_TRUE) is None
    found = profile_of(Interpolating, batch, Precision.BF16_MIXED)
    assert found.method == "traced"
    assert "fails with parameters in 16 bits" in (FSDP2.obstacle(found, machine, Precision.BF16_MIXED) or "")
