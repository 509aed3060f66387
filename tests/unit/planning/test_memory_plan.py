"""The plan with memory: profiles of real modules, choices on described ranks, and the printed output."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from launcher.agreement.facts import Agreement
from launcher.config.schema import RunConfig, TrainerOptions
from launcher.core.errors import PlanError
from launcher.planning.dry_run import DryRun, plan_here
from launcher.planning.first_batch import count_samples, read_first_batch, resize_batch
from launcher.planning.fit_plan import plan_for_fit
from launcher.planning.memory import list_splits, machine_of, plan_with_memory, zero_settings
from launcher.planning.oom import is_out_of_memory, out_of_memory
from launcher.planning.plan import Plan, make_plan
from launcher.planning.profile import profile_model
from launcher.planning.table import print_plan
from launcher.process.activity import current_activity
from launcher.user_code.classes import import_classes
from launcher.user_code.objects import UserObjects
from strategies.precision import Precision
from strategies.step_trace import ModelProfile, Unprofiled
from strategies.trace import PlannedTrainer
from tests.support.rank_threads import CPU, H100, facts
from tests.support.toy import Toy, ToyData

TOY: dict[str, Any] = {
    "model": {"class_path": "tests.support.toy.Toy"},
    "data": {"class_path": "tests.support.toy.ToyData"},
}


NCCL = """NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.hpp:275, unhandled cuda error, NCCL version 2.20.5
ncclUnhandledCudaError: Call to CUDA function failed.
Last error:
{}"""


class ReadsNumbers(Toy):
    """A step that reads values, which fake tensors do not have."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * (2.0 if float(loss.detach()) > 1e9 else 1.0)


class Broken(Toy):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        raise ValueError("not today")


class ByHand(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Unmakeable(Toy):
    def __init__(self) -> None:
        super().__init__()
        raise ValueError("no constructor")


class OwnLoaders(Toy):
    def __init__(self, batch_size: int = 3) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> Any:
        return ToyData(self.batch_size).train_dataloader()


class Large(pl.LightningModule):
    """7.2 billion parameters, and a short step."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(*(nn.Linear(8, 20_000_000) for _ in range(40)))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return torch.stack([layer(batch[1]).mean() for layer in self.net]).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())


def config(model: str = "tests.support.toy.Toy", **given: Any) -> RunConfig:
    return RunConfig(**{**TOY, "model": {"class_path": model}, **given})


def here(name: str) -> str:
    return f"{__name__}.{name}"


def ranks(count: int, device: Any = CPU, batch_size: int | None = 4) -> Agreement:
    alike = [facts(n, device, traits={"batch_size": batch_size, "static_graph": True}) for n in range(count)]
    return Agreement(tuple(dataclasses.replace(f, local_world_size=count, node_rank=0) for f in alike))


def profiled(given: RunConfig, kind: str = "cpu", precision: Precision = Precision.FP32_TRUE) -> ModelProfile:
    found = profile_model(given, import_classes(given), precision, 4, world_size=1, device_kind=kind)
    assert isinstance(found, ModelProfile)
    return found


def test_module_is_traced() -> None:
    found = profiled(config())
    assert (found.method, found.notes) == ("traced", ())
    assert found.model.numel == 8 * 16 + 16 + 16 + 1
    assert [trace.batch_size for trace in found.plain] == [2, 4]
    assert found.plain == found.sharded


def test_mixed_precision_is_traced_with_autocast_and_with_cast() -> None:
    found = profiled(config(), precision=Precision.BF16_MIXED)
    assert found.plain != found.sharded


def test_step_that_reads_values_is_measured_with_a_note() -> None:
    found = profiled(config(here("ReadsNumbers")))
    assert found.method == "probed"
    assert "could not be traced" in found.notes[0]


def test_failing_step_gives_an_upper_bound() -> None:
    found, traced = profiled(config(here("Broken"))), profiled(config())
    assert found.method == "bound"
    assert "not today" in found.notes[0]
    assert found.plain[1].forward > traced.plain[1].forward


def test_manual_optimization_gives_a_bound_and_excludes_zero() -> None:
    found = profiled(config(here("ByHand")))
    assert found.method == "bound"
    assert "by hand" in (found.zero_obstacle or "")


def test_module_that_cannot_be_created_is_planned_without_a_profile() -> None:
    given = config(here("Unmakeable"))
    found = profile_model(given, import_classes(given), Precision.FP32_TRUE, 4, world_size=1, device_kind="cpu")
    assert found == Unprofiled("ValueError: no constructor")
    plan, bare = plan_with_memory(given, ranks(2), found), make_plan(given, ranks(2))
    assert plan.memory is None
    assert dataclasses.replace(plan, notices=bare.notices) == bare
    notice = plan.notices[-1]
    assert notice.startswith("memory is not known, as the module could not be made without memory (ValueError: no con")
    assert notice.endswith("the strategy was chosen without it")
    ordered = plan_with_memory(dataclasses.replace(given, strategy="ddp"), ranks(2), found)
    assert "chosen" not in ordered.notices[-1]


def test_dry_run_states_why_memory_is_not_known() -> None:
    found = plan_here(config(here("Unmakeable"), accelerator="cpu", devices=1), "host")
    assert found.profile is None
    out = io.StringIO()
    print_plan(found.plan, Console(file=out, width=200))
    assert "notice: memory is not known" in out.getvalue()
    assert "ValueError: no constructor" in out.getvalue()


def test_batch_is_read_from_the_loader_of_the_data_or_the_model() -> None:
    given = config()
    index, x = read_first_batch(given, import_classes(given), 4, PlannedTrainer())
    assert (tuple(index.shape), tuple(x.shape)) == ((4,), (4, 8))
    own = config(here("OwnLoaders"), data=None)
    index, _ = read_first_batch(own, import_classes(own), 5, PlannedTrainer())
    assert len(index) == 5


def test_slow_planning_shows_the_current_activity(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, str] = {}
    monkeypatch.setattr(ToyData, "setup", lambda self, stage: seen.update(setup=current_activity()))
    step = Toy.training_step
    monkeypatch.setattr(
        Toy, "training_step", lambda self, *a: (seen.update(step=current_activity()), step(self, *a))[1]
    )
    given = config(on_oom="next")
    plan_for_fit(given, ranks(2), None)
    assert seen == {"setup": "setting up the data (its `setup`) and reading a batch", "step": "tracing a training step"}
    of_classes = dict(seen)
    seen.clear()
    plan_for_fit(given, ranks(2), None, given=UserObjects(Toy(), ToyData()))
    assert seen == of_classes
    assert current_activity() == ""


def test_batch_is_shortened_or_repeated_along_samples() -> None:
    batch = {"x": torch.arange(6).view(3, 2), "scale": torch.tensor(2.0), "name": "b"}
    assert count_samples(batch) == 3
    assert resize_batch(batch, 3, 2)["x"].tolist() == [[0, 1], [2, 3]]
    assert resize_batch(batch, 3, 4)["x"].tolist() == [[0, 1], [2, 3], [4, 5], [0, 1]]
    assert resize_batch(batch, 3, 2)["scale"] == 2.0


@pytest.mark.parametrize(("count", "expected"), [(1, "single_device"), (2, "ddp")])
def test_cpu_plan_keeps_the_choice_and_has_memory(count: int, expected: str) -> None:
    given = config()
    plan = plan_with_memory(given, ranks(count), profiled(given))
    assert plan.strategy.name == expected == make_plan(given, ranks(count)).strategy.name
    assert plan.memory is not None
    assert plan.memory["pick"] == expected
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert [r.name for r in plan.strategy.rejected] == [
        entry["name"] for entry in plan.memory["assessments"] if entry["name"] != expected
    ]


def test_ranks_share_cpu_memory_but_not_gpu_memory() -> None:
    one, four = (machine_of(ranks(n), Precision.FP32_TRUE).memory_bytes for n in (1, 4))
    assert four == one // 4
    gpus = machine_of(ranks(4, H100), Precision.BF16_MIXED, host_memory_bytes=400)
    assert gpus.memory_bytes == machine_of(ranks(1, H100), Precision.BF16_MIXED).memory_bytes
    assert (gpus.host_memory_bytes, gpus.known) == (100, True)
    assert gpus.flops > machine_of(ranks(4, H100), Precision.FP32_TRUE).flops


def test_model_too_large_for_ddp_is_sharded() -> None:
    given = config(here("Large"))
    plan = plan_with_memory(given, ranks(8, H100), profiled(given, "cuda", Precision.BF16_MIXED))
    assert plan.memory is not None
    assert plan.memory["pick"].startswith("deepspeed_stage")
    assert plan.strategy.name == plan.memory["pick"]
    assert plan.deepspeed is not None
    assert not any("requested" in reason for reason in plan.strategy.reasons)
    assert any(f"{plan.strategy.name} needs" in reason for reason in plan.strategy.reasons)


def test_bucket_sizes_of_the_user_are_used() -> None:
    own = {"zero_optimization": {"reduce_bucket_size": 7, "overlap_comm": False}}
    assert (zero_settings("cuda", own).reduce_bucket_size, zero_settings("cuda", own).overlap_comm) == (7, False)
    assert [zero_settings(kind).reduce_bucket_size for kind in ("cuda", "cpu")] == [200_000_000, 5_000_000]


def test_model_too_large_for_all_is_rejected_with_alternatives() -> None:
    given = config(here("Large"), memory_share=0.05)
    with pytest.raises(PlanError, match="no strategy fits") as caught:
        plan_with_memory(given, ranks(2, H100), profiled(given, "cuda"), host_memory_bytes=1 << 30)
    assert "what would do" in str(caught.value)
    assert "memory_share: 0.05" in str(caught.value)


def test_bound_gives_a_notice_not_an_error() -> None:
    given = config(here("Broken"), memory_share=1e-9)
    plan = plan_with_memory(given, ranks(1), profiled(given))
    assert plan.strategy.name == "single_device"
    assert "memory may not suffice" in plan.notices[-1]


def test_requested_strategy_is_kept_with_a_notice_if_it_does_not_fit() -> None:
    given = config(here("Large"), strategy="ddp")
    plan = plan_with_memory(given, ranks(8, H100), profiled(given, "cuda", Precision.BF16_MIXED))
    assert plan.strategy.name == "ddp"
    assert "ddp was requested, and it does not fit" in plan.notices[-1]


def test_micro_batch_is_reduced_to_fit_and_the_global_batch_stays() -> None:
    given = config(global_batch_size=64)
    agreement = ranks(1, batch_size=16)
    profile = profile_model(given, import_classes(given), Precision.FP32_TRUE, 16, world_size=1, device_kind="cpu")
    wide = plan_with_memory(given, agreement, profile)
    assert wide.memory is not None
    needs = wide.memory["assessments"][0]["memory"]["total"]
    assert (wide.batch.micro_batch_size, wide.batch.accumulate) == (16, 4)
    # Just not enough for 16 samples.
    share = (needs - 1) / wide.memory["memory_bytes"]
    plan = plan_with_memory(dataclasses.replace(given, memory_share=share), agreement, profile)
    assert (plan.batch.micro_batch_size, plan.batch.accumulate) == (8, 8)
    assert plan.batch.global_batch_size == 64
    assert "8 samples at once are the most that fit" in plan.batch_reasons[-1]


def test_fixed_batch_has_one_split() -> None:
    fixed = config(global_batch_size=64, trainer=TrainerOptions(accumulate_grad_batches=2))
    assert len(list_splits(fixed, make_plan(fixed, ranks(1)))) == 1
    free = config(global_batch_size=64)
    sizes = [split.micro_batch_size for split in list_splits(free, make_plan(free, ranks(2, batch_size=8)))]
    assert sizes == [8, 4, 2, 1]


def test_cpu_run_starts_without_a_trace_unless_states_are_large() -> None:
    assert plan_for_fit(config(), ranks(1), None).memory is None
    small = dataclasses.replace(CPU, memory_bytes=20_000)
    agreement = ranks(1, small)
    # Requested, as nothing fits.
    given = config(strategy="single_device")
    assert plan_for_fit(given, agreement, None).memory is not None


def _dry_run(given: RunConfig, count: int = 2) -> DryRun:
    agreement, profile = ranks(count, H100), profiled(given, "cuda", Precision.BF16_MIXED)
    return DryRun(plan_with_memory(given, agreement, profile), agreement, profile)


def test_dry_run_on_this_machine_has_memory() -> None:
    found = plan_here(config(accelerator="cpu", devices=2), "host")
    assert (found.plan.world_size, found.plan.assumed) == (2, True)
    assert found.plan.memory is not None


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB, max allowed: 9.07 GB)."), True),
        (RuntimeError("std::bad_alloc"), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), True),
        (RuntimeError("CUDA driver error: out of memory"), True),
        (RuntimeError("cuda runtime error (2) : out of memory at THC/THCCachingHostAllocator.cpp:278"), True),
        (torch.distributed.DistBackendError(NCCL.format("Cuda failure 2 'out of memory'")), True),
        (torch.distributed.DistBackendError(NCCL.format("Cuda failure 'out of memory'")), True),
        (torch.distributed.DistBackendError(NCCL.format("Cuda failure 1 'invalid argument'")), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("shape mismatch"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_out_of_memory_errors_are_recognized(error: Exception, is_one: bool) -> None:
    assert is_out_of_memory(error) is is_one
    wrapped = RuntimeError("in the data loader")
    wrapped.__cause__ = error
    assert is_out_of_memory(wrapped) is is_one


def test_out_of_memory_error_states_expected_and_allocated_bytes_and_next_candidate() -> None:
    plan = _dry_run(config()).plan
    assert plan.memory is not None
    error = out_of_memory(MemoryError("x"), plan, rank=1, host="n1", allocated_bytes=3 << 30, on_oom="next")
    text = str(error)
    assert "rank 1 (n1) is out of memory with ddp" in text
    assert "the plan expected" in text
    assert "optimizer states" in text
    assert "at most 3 GiB were allocated" in text
    assert error.next_strategy == plan.memory["next"]
    assert error.restarts is (error.next_strategy is not None)
    assert error.expected_bytes == plan.memory["assessments"][1]["memory"]["total"]
    stop = out_of_memory(MemoryError("x"), plan, rank=1, host="n1", allocated_bytes=None, on_oom="stop")
    assert not stop.restarts


def test_out_of_memory_error_without_an_estimate() -> None:
    error = out_of_memory(MemoryError("x"), make_plan(config(), ranks(1)), rank=0, host="h", allocated_bytes=None,
                         on_oom="next")  # fmt: skip
    assert (error.expected_bytes, error.next_strategy, error.restarts) == (None, None, False)
    assert "has no memory estimate" in str(error)
    assert "smaller micro batch" in str(error)
