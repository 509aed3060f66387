"""Memory of model and data objects: traced on copies, without changing the objects."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from launcher.config.schema import RunConfig
from launcher.planning.fit_plan import plan_for_fit
from launcher.planning.object_profile import profile_objects
from launcher.user_code.objects import Loaders, UserObjects
from strategies.fake_mode import FakeMode, fake_copy
from strategies.precision import Precision
from strategies.step_trace import ModelProfile
from tests.support.rank_threads import CPU
from tests.support.toy import Numbers, Toy, ToyData
from tests.unit.planning.test_memory_plan import config, profiled, ranks


class Drawing(Toy):
    """Draws from every generator, counts its steps, and has a buffer that a step changes."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = [0]
        self.norm = nn.BatchNorm1d(8)
        self.tied = self.net[0]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.steps[0] += 1
        noise = torch.rand(8) + random.random() + np.random.rand()  # noqa: S311 -- no secret
        self.log("noise", noise.sum())
        return self.net(self.norm(batch[1] + noise)).square().mean()


class DrawingNumbers(Numbers):
    """A data set with a random generator, which counts reads."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.generator = np.random.default_rng(0)
        self.read: list[int] = []

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.read.append(index)
        number, x = super().__getitem__(index)
        return number, x + float(self.generator.random()) + torch.rand(8)


class SetUp(ToyData):
    def __init__(self) -> None:
        super().__init__()
        self.stages: list[str] = []

    def setup(self, stage: str) -> None:
        self.stages.append(stage)
        torch.rand(3)


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("it was read")


class Unreadable(Dataset[Any]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        raise OSError("no such file")


def profile(model: pl.LightningModule, data: Any, precision: Precision = Precision.FP32_TRUE) -> ModelProfile:
    return profile_objects(config(), UserObjects(model, data), precision, world_size=1, device_kind="cpu")


def loaders(dataset: Any, **options: Any) -> Loaders:
    return Loaders(DataLoader(dataset, batch_size=4, **options))


def generators() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]


def everything_of(module: pl.LightningModule) -> list[Any]:
    """Values and identities of all objects that a training starts from."""
    parts: list[Any] = [
        [(name, id(p), p._version, p.grad, p.requires_grad, p.tolist()) for name, p in module.named_parameters()],
        [(name, id(b), b._version, b.tolist()) for name, b in module.named_buffers()],
        [(name, id(part), part.training, [len(v) for k, v in vars(part).items() if k.endswith("_hooks")])
         for name, part in module.named_modules()],
        sorted(vars(module)),
        module._trainer,
    ]  # fmt: skip
    return parts


@pytest.mark.parametrize("precision", [Precision.FP32_TRUE, Precision.BF16_MIXED, Precision.BF16_TRUE])
def test_objects_and_generators_of_the_caller_are_not_changed(precision: Precision) -> None:
    model, numbers = Drawing(), DrawingNumbers(64)
    data = loaders(numbers, shuffle=True)
    order = iter(data.train_dataloader())
    before, drawn = everything_of(model), generators()
    found = profile(model, data, precision)
    assert (found.method, model.steps, numbers.read) == ("traced", [0], [])
    assert everything_of(model) == before
    assert generators() == drawn
    assert numbers.generator.random() == np.random.default_rng(0).random()
    assert len(list(order)) == 16, "the iterator of the caller still has all batches"
    # Tied parts stay tied in the copy.
    assert found.model.numel == sum(p.numel() for p in model.parameters())


def test_profile_of_objects_matches_profile_from_config() -> None:
    assert profile(Toy(), ToyData()) == profiled(config())
    assert profile(Toy(), loaders(Numbers(64))) == profiled(config())


def test_setup_runs_on_a_copy_of_the_data() -> None:
    model, data = Toy(), SetUp()
    drawn = generators()
    assert profile(model, data).method == "traced"
    assert data.stages == []
    assert data.trainer is None
    assert generators() == drawn


def test_trained_model_and_data_are_copied_without_their_trainer() -> None:
    model, data = Toy(), ToyData()
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.lambda_of_its_own = lambda: model  # pyright: ignore[reportAttributeAccessIssue]
    model.trainer = data.trainer = trainer
    assert profile(model, data).method == "traced"
    assert model.trainer is trainer
    assert data.trainer is trainer


def test_loader_of_the_model_is_created_by_a_copy() -> None:
    class Own(Drawing):
        def train_dataloader(self) -> Any:
            self.steps.append(1)
            return DataLoader(Numbers(8), batch_size=4)

    model = Own()
    found = profile(model, None)
    assert (found.method, found.notes) == ("traced", ())
    assert model.steps == [0]


def _iterable(model: Toy) -> tuple[Toy, Any]:
    return model, Loaders(DataLoader(Endless(), batch_size=4))


def _iterator(model: Toy) -> tuple[Toy, Any]:
    return model, Loaders(iter([(torch.zeros(2), torch.zeros(2, 8))]))


def _transform(model: Toy) -> tuple[Toy, Any]:
    numbers, seen = Numbers(8), []
    numbers.transform = lambda x: seen.append(x)  # pyright: ignore[reportAttributeAccessIssue]
    return model, loaders(numbers)


def _large(model: Toy) -> tuple[Toy, Any]:
    numbers = Numbers(8)
    numbers.names = ["a"] * 200_000  # pyright: ignore[reportAttributeAccessIssue]
    return model, loaders(numbers)


@pytest.mark.parametrize(
    ("of", "reason"),
    [
        (_iterable, "reading an iterable might take samples from the training"),
        (_iterator, "reading an iterable might take samples from the training"),
        (_transform, "the dataset has a function (_transform.<locals>.<lambda>) that may hold your own objects"),
        (_large, "the dataset is too large to copy"),
        (lambda model: (model, loaders(Unreadable())), "OSError: no such file"),
    ],
)
def test_data_that_cannot_be_read_without_side_effects_is_not_read(
    of: Callable[[Toy], tuple[Toy, Any]], reason: str
) -> None:
    model, data = of(Toy())
    found = profile(model, data)
    assert found.method == "bound"
    assert found.notes == (f"no batch was read ({reason}); activations are not known, and not counted",)
    assert found.model.optimizer.name == "AdamW"
    assert found.model.numel == sum(p.numel() for p in model.parameters())


def test_module_that_can_reach_caller_objects_is_not_run() -> None:
    hooked, patched, large, locked = Toy(), Toy(), Toy(), Toy()
    outputs: list[Any] = []
    hooked.net[0].register_forward_hook(lambda *_: outputs.append(1))
    patched.net.forward = lambda x: patched.net[0](x)  # pyright: ignore[reportAttributeAccessIssue]
    large.table = np.zeros(300 << 20, dtype=np.uint8)  # pyright: ignore[reportAttributeAccessIssue]
    locked.lines = (line for line in "abc")  # pyright: ignore[reportAttributeAccessIssue]
    for model, reason in (
        (
            hooked,
            "its hook test_module_that_can_reach_caller_objects_is_not_run.<locals>.<lambda> may write",
        ),
        (patched, "it has a function (test_module_that_can_reach"),
        (large, "it is too large to copy"),
        (locked, "TypeError: cannot pickle 'generator' object"),
    ):
        before = everything_of(model)
        found = profile(model, ToyData())
        assert found.method == "bound"
        assert f"the module was not copied for a trace ({reason}" in found.notes[0]
        assert "Adam's states are assumed" in found.notes[0]
        assert found.model.numel == sum(p.numel() for p in model.parameters())
        assert everything_of(model) == before
    assert outputs == []


def test_step_that_reaches_caller_parameters_leaves_no_gradients() -> None:
    teacher = Toy()
    held = nn.Linear(8, 1)

    class Reaching(Toy):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            return (self.net(batch[1]) - GLOBALS["model"].net(batch[1])).square().mean()

    model = Reaching()
    GLOBALS["model"] = model
    held.weight.grad = torch.ones(1, 8)
    profile(model, ToyData())
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is None for p in teacher.parameters())


GLOBALS: dict[str, Any] = {}


class Collecting(Toy):
    losses: list[Tensor] = []  # noqa: RUF012 -- one for all objects is the fault that is looked for


class Noting(Toy):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        GLOBALS["loss"] = loss = super().training_step(batch, batch_idx)
        return loss


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Collecting, "its class attribute Collecting.losses is one for all objects"),
        (Noting, "Noting.training_step uses GLOBALS, which is outside of it"),
    ],
)
def test_step_that_may_change_shared_state_is_not_run(model: type[Toy], reason: str) -> None:
    GLOBALS.clear()
    found = profile(model(), ToyData())
    assert found.method == "bound"
    assert f"the module was not copied for a trace ({reason})" in found.notes[0]
    assert not GLOBALS


def test_torch_functions_and_sparse_buffers_can_be_copied() -> None:
    model = Toy()
    model.pool = nn.functional.max_pool2d  # pyright: ignore[reportAttributeAccessIssue]
    model.register_buffer("graph", torch.eye(3).to_sparse())
    assert profile_objects(
        config(), UserObjects(model, ToyData()), Precision.FP32_TRUE, world_size=1, device_kind="cpu"
    )
    model = Toy()
    model.pool = nn.functional.max_pool2d  # pyright: ignore[reportAttributeAccessIssue]
    assert profile(model, ToyData()).method == "traced"


def test_lazy_parameters_give_a_notice_not_an_error() -> None:
    class Lazy(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.LazyLinear(2)

    given = UserObjects(Lazy(), ToyData())
    plain = RunConfig(model={"class_path": "tests.support.toy.Toy"})
    assert plan_for_fit(plain, ranks(2), None, given=given).memory is None
    always = dataclasses.replace(plain, on_oom="next")
    (notice,) = [n for n in plan_for_fit(always, ranks(2), None, given=given).notices if "memory" in n]
    assert "parameters that get their shape with the first batch" in notice


def test_step_that_reads_values_is_not_run_on_real_tensors() -> None:
    class Looks(Toy):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            loss = self.net(batch[1]).mean()
            return loss * (2.0 if float(loss.detach()) > 1e9 else 1.0)

    found = profile(Looks(), ToyData())
    assert found.method == "bound"
    assert "could not be traced" in found.notes[0]
    assert "bounded by the layers' widths" in found.notes[0]


def test_run_of_objects_has_memory_in_its_plan() -> None:
    given = UserObjects(Drawing(), ToyData())
    plain = RunConfig(model={"class_path": "tests.support.toy.Toy"})
    assert plan_for_fit(plain, ranks(2), None, given=given).memory is None, "small on a CPU: starts without a trace"
    # Requested, as nothing fits.
    asked = dataclasses.replace(plain, strategy="ddp")
    small = plan_for_fit(asked, ranks(2, dataclasses.replace(CPU, memory_bytes=40_000)), None, given=given)
    with_next = plan_for_fit(dataclasses.replace(plain, on_oom="next"), ranks(2), None, given=given)
    for plan in (small, with_next):
        assert plan.memory is not None
        assert plan.memory["method"] == "traced"


def test_fake_copy_needs_a_fake_mode_and_no_memory() -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    with pytest.raises(RuntimeError, match="outside of a fake mode"):
        fake_copy(module)
    with FakeMode() as mode:
        twin = fake_copy(module)
    assert all(getattr(t, "fake_mode", None) is mode for t in twin.state_dict().values())
    assert not any(hasattr(t, "fake_mode") for t in module.state_dict().values())
