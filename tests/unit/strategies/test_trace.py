"""`strategies.trace`: a step on fake tensors allocates the same bytes as a real step."""

from __future__ import annotations

import contextlib
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from strategies import cpu_workspaces
from strategies.cpu_workspaces import CpuWorkspaces, lstm_workspace, product_code
from strategies.fake_mode import FakeMode
from strategies.memory import estimate_memory
from strategies.model_shape import OptimizerError, describe_model, find_optimizer, probe_optimizer
from strategies.model_states import OptimizerShape
from strategies.precision import Precision
from strategies.registry import SINGLE_DEVICE
from strategies.step_trace import at_batch_size
from strategies.trace import PlannedTrainer, TraceOptions, TraceTypes, attach, trace_step
from tests.support.allocator_peak import peak_of
from tests.support.model_families import SMALL
from tests.support.model_zoo import MODELS, Net, adamw

TYPES = {
    "32-true": TraceTypes(),
    "bf16-true": TraceTypes(module=torch.bfloat16),
    "bf16-mixed": TraceTypes(autocast=torch.bfloat16),
}


def _real_peak(name: str, types: TraceTypes, batch_size: int) -> int:
    """Peak of the second step in Lightning's order, with all live bytes."""
    entry = MODELS[name]

    def step(made: Any) -> None:
        module, optimizer, batch = made
        autocast = torch.autocast("cpu", types.autocast) if types.autocast else contextlib.nullcontext()
        with autocast:
            loss = module.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def prepare() -> Any:
        module = entry.make()
        if types.module is not None:
            module.to(types.module)
        attach(module, PlannedTrainer())
        made = (
            module,
            find_optimizer(module.configure_optimizers()),
            entry.batch(batch_size, types.module or torch.float32),
        )
        step(made)
        return made

    return peak_of(prepare, step)


@pytest.mark.parametrize("precision", list(TYPES))
@pytest.mark.parametrize("name", ["gpt", "tied", "frozen", "odd"])
def test_estimate_matches_the_allocator_peak(name: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    types = TYPES[precision]
    trace, model = trace_step(MODELS[name].make, MODELS[name].batch(8), 8, types=types)
    estimate = estimate_memory(model, trace, SINGLE_DEVICE, 1, Precision(precision))
    # oneDNN allocates scratch memory from the same allocator, depending on this CPU's kernels.
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    # Scalars of the optimizer's step (bias corrections) are not counted.
    assert estimate.total == pytest.approx(_real_peak(name, types, 8), rel=0.0005)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_lstm_workspace_estimate_is_an_upper_bound(precision: str) -> None:
    # Without the correction the trace is 70 % too low: oneDNN's workspace is empty under fake tensors.
    entry = SMALL["deep_lstm"]
    real, fake = (
        trace_step(entry.make, entry.batch(8), 8, types=TYPES[precision], options=TraceOptions(is_fake=f))[0]
        for f in (False, True)
    )
    assert real.backward <= fake.backward <= 1.35 * real.backward


class _Workspaces(TorchDispatchMode):
    """Bytes of the real workspaces."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._schema.name == "aten::mkldnn_rnn_layer":
            self.sizes.append(out[3].nbytes)
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(1, 1, 8, 8), (5, 3, 7, 33), (20, 8, 16, 32), (7, 5, 300, 256), (12, 16, 9, 512), (10, 4, 512, 64)]
)
def test_lstm_workspace_bound_holds_on_this_cpu(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    steps, batch, width, hidden = shape
    with _Workspaces() as real:
        nn.LSTM(width, hidden, dtype=dtype)(torch.randn(steps, batch, width, dtype=dtype, requires_grad=True))
    # On a CPU without this type torch does not use oneDNN for an LSTM.
    for size in real.sizes:
        assert size <= lstm_workspace((steps, batch, width), hidden, dtype.itemsize) <= 1.1 * size + 9 * 4096


def test_product_code_is_measured_on_this_cpu() -> None:
    one = product_code(torch.bfloat16)
    before = cpu_workspaces._generated_code()
    for size in range(90, 98):
        torch.mm(torch.zeros(size, 113, dtype=torch.bfloat16), torch.zeros(113, 101, dtype=torch.bfloat16))
    assert 0.6 * 8 * one <= cpu_workspaces._generated_code() - before <= 1.6 * 8 * one


def test_product_with_another_result_type_is_counted() -> None:
    with FakeMode(), CpuWorkspaces() as onednn:
        left, right = torch.empty(2, 3, dtype=torch.bfloat16), torch.empty(3, 4, dtype=torch.bfloat16)
        torch.mm(left, right, out_dtype=torch.float32)
        torch.addmm(torch.empty(4, dtype=torch.bfloat16), left, right)
    # oneDNN receives the same product.
    assert onednn.kernels == product_code(torch.bfloat16)


def test_code_of_16_bit_products_is_counted_once_per_shape() -> None:
    def make() -> pl.LightningModule:
        # Forward: 3 shapes (two layers share one); backward: 3 for weights, 2 for inputs.
        return Net(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)), adamw)

    batch = torch.randn(4, 8), torch.zeros(4, 4)
    found = {name: trace_step(make, batch, 4, types=types)[0].kernels for name, types in TYPES.items()}
    eight = 8 * product_code(torch.bfloat16)
    assert found == {"32-true": 0, "bf16-true": eight, "bf16-mixed": eight}
    plain, _ = trace_step(make, batch, 4, types=TYPES["bf16-true"], options=TraceOptions(is_fake=False))
    assert plain.kernels == 0, "a real step has them in its process already"


def test_onednn_copies_for_convolutions_are_counted() -> None:
    entry = MODELS["conv"]
    real = trace_step(entry.make, entry.batch(8), 8, options=TraceOptions(is_fake=False))[0]
    fake = trace_step(entry.make, entry.batch(8), 8)[0]
    # Input, weight and output of the first one: the forward pass has its peak later, with less.
    first = 4 * (8 * 3 * 12 * 12 + 13 * 3 * 9 + 8 * 13 * 10 * 10)
    assert real.forward < fake.forward <= real.forward + first
    assert fake.backward > real.backward
    # They are freed after the op.
    assert fake.course[-1].live == real.course[-1].live


@pytest.mark.parametrize("name", ["gpt", "low_rank"])
def test_fake_and_real_steps_have_the_same_trace(name: str) -> None:
    entry = MODELS[name]
    fake, real = (
        trace_step(entry.make, entry.batch(4), 4, options=TraceOptions(is_fake=fake)) for fake in (True, False)
    )
    assert fake == real


def test_weights_of_copied_layers_are_not_activations() -> None:
    # nn.TransformerEncoder copies its layer `num_layers` times.
    def make() -> pl.LightningModule:
        layer = nn.TransformerEncoderLayer(16, 2, 64, 0.0, batch_first=True)
        return Net(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), adamw)

    batch = torch.randn(4, 5, 16), torch.zeros(4, 5, 16)
    fake, real = (trace_step(make, batch, 4, options=TraceOptions(is_fake=fake))[0] for fake in (True, False))
    assert fake == real


def test_trace_scales_with_the_batch_size() -> None:
    entry = MODELS["gpt"]
    four, nine, sixteen = (trace_step(entry.make, entry.batch(n), n)[0] for n in (4, 9, 16))
    found = at_batch_size(four, sixteen, 9)
    for part in ("forward", "backward", "inputs", "flops"):
        # A peak is the largest of several moments, each affine: between two sizes a straight line is never too low.
        assert getattr(nine, part) <= getattr(found, part) <= 1.02 * getattr(nine, part)
    assert at_batch_size(four, sixteen, 16) == sixteen


def test_flops_are_six_per_weight_and_token() -> None:
    entry = MODELS["sgd"]
    trace, _ = trace_step(entry.make, entry.batch(10), 10)
    # The first layer's input needs no gradient: its product is omitted.
    assert trace.flops == 10 * (6 * (31 * 500 + 500 * 7) - 2 * 31 * 500)


def test_tracing_a_7b_model_needs_no_memory() -> None:
    class Wide(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(60_000, 60_000), nn.Linear(60_000, 60_000))

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = self.net(batch).mean()
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            assert self.trainer.estimated_stepping_batches > 0
            return {"optimizer": torch.optim.AdamW(self.parameters())}

    trace, model = trace_step(Wide, torch.zeros(2, 60_000), 2)
    assert model.numel > 7e9
    assert trace.optimizer_states == 8 * model.numel + 4 * 4


def test_manual_optimization_cannot_be_traced() -> None:
    def make() -> pl.LightningModule:
        module = MODELS["tiny"].make()
        module.automatic_optimization = False
        return module

    with pytest.raises(TypeError, match="optimizes by hand"):
        trace_step(make, MODELS["tiny"].batch(1), 1)


def test_tracing_does_not_change_the_random_state() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    trace_step(MODELS["tiny"].make, MODELS["tiny"].batch(1), 1, options=TraceOptions(is_fake=False))
    assert torch.equal(torch.rand(2), expected)


def _parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(3, 2))]


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (torch.optim.SGD(_parameters(), 0.1), (0, 0)),
        (torch.optim.SGD(_parameters(), 0.1, momentum=0.9), (4, 0)),
        (torch.optim.AdamW(_parameters()), (8, 4)),
        (torch.optim.Adam(_parameters(), amsgrad=True), (12, 4)),
        (torch.optim.Adagrad(_parameters()), (4, 4)),
    ],
    ids=["sgd", "momentum", "adamw", "amsgrad", "adagrad"],
)
def test_optimizer_states_are_measured(optimizer: torch.optim.Optimizer, expected: tuple[int, int]) -> None:
    shape = probe_optimizer(optimizer)
    assert (shape.state_bytes_per_element, shape.state_bytes_per_tensor) == expected
    assert shape.name == type(optimizer).__name__


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, 4),
        (torch.optim.AdamW, {}, 8),
        (torch.optim.Adagrad, {}, 4),
        (torch.optim.RMSprop, {"momentum": 0.9}, 8),
    ],
)
def test_optimizer_states_are_those_of_fp32_whatever_the_model_has(
    kind: Any, options: dict[str, Any], expected: int, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    parameter = nn.Parameter(torch.ones(3, 2, dtype=dtype))
    optimizer = kind([parameter], **options)
    parameter.grad = torch.ones_like(parameter)
    # A plan traces a step first.
    optimizer.step()
    assert probe_optimizer(optimizer).state_bytes_per_element == expected
    assert not caplog.records


def test_probe_does_not_change_the_optimizer_or_scheduler() -> None:
    (parameter,) = _parameters()
    optimizer = torch.optim.AdamW([parameter])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    assert probe_optimizer(optimizer).state_bytes_per_element == 8
    assert not optimizer.state
    assert optimizer.param_groups[0]["params"] == [parameter]
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    scheduler.step()


def test_optimizer_with_closure_uses_the_numbers_of_adam() -> None:
    assert probe_optimizer(torch.optim.LBFGS(_parameters())) == OptimizerShape("LBFGS")


def test_multi_tensor_step_needs_more_temporary_memory() -> None:
    optimizer = torch.optim.AdamW(_parameters())
    one, all_at_once = probe_optimizer(optimizer), probe_optimizer(optimizer, foreach=True)
    assert all_at_once.temporary_bytes_per_element > 0
    assert one.state_bytes_per_element == all_at_once.state_bytes_per_element
    assert optimizer.param_groups[0]["foreach"] is None


@pytest.mark.parametrize("shape", ["one", "mapping", "list", "pair", "tuple"])
def test_all_forms_of_configure_optimizers_are_read(shape: str) -> None:
    optimizer = torch.optim.SGD(_parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    forms = {
        "one": optimizer,
        "mapping": {"optimizer": optimizer, "lr_scheduler": scheduler},
        "list": [optimizer],
        "pair": ([optimizer], [scheduler]),
        "tuple": ({"optimizer": optimizer},),
    }
    assert find_optimizer(forms[shape]) is optimizer


@pytest.mark.parametrize(("configured", "message"), [(None, "no optimizer"), ([1], "no optimizer")])
def test_missing_optimizer_is_an_error(configured: Any, message: str) -> None:
    with pytest.raises(OptimizerError, match=message):
        find_optimizer(configured)


def test_several_optimizers_are_an_error_with_their_number() -> None:
    several = [torch.optim.SGD(_parameters(), 0.1) for _ in range(2)]
    with pytest.raises(OptimizerError, match="2 optimizers"):
        find_optimizer(several)


def test_shape_counts_tied_weights_once_and_marks_frozen_weights() -> None:
    module = MODELS["tied"].make()
    shape = describe_model(module, find_optimizer(module.configure_optimizers()))
    assert shape.numel == sum(p.numel() for p in module.parameters())
    frozen = MODELS["frozen"].make()
    shape = describe_model(frozen, find_optimizer(frozen.configure_optimizers()))
    assert shape.numel - shape.trainable_numel == 40 * 300 + 300
    conv = MODELS["conv"].make()
    shape = describe_model(conv, find_optimizer(conv.configure_optimizers()))
    assert (shape.float_buffer_bytes, shape.other_buffer_bytes) == (52, 8)
