"""Settings that DeepSpeed runs with (batch, accumulation, clipping, precision), and models that it rejects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from tests.support.processes import Finished, launcher, run_warm
from tests.support.runs import REPOSITORY, TOY, events_of, toy_env, train_on
from tests.support.toy import Toy
from tests.support.warm import DEEPSPEED

pytestmark = pytest.mark.slow
PRETEND_FP16 = {"LAUNCHER_TEST_DEEPSPEED_CPU_FP16": "1"}


class EngineProbe(pl.Callback):
    """Rank zero prints the settings of DeepSpeed's engine after the training."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        engine: Any = trainer.model
        engine = {
            "stage": engine.zero_optimization_stage(),
            "batch": [engine.train_batch_size(), engine.train_micro_batch_size_per_gpu(),
                      engine.gradient_accumulation_steps()],
            "clipping": engine.gradient_clipping(),
            "steps": [engine.global_steps, trainer.global_step],
            "dtype": str(next(iter(engine.module.parameters())).dtype),
            "scale": float(engine.optimizer.cur_scale),
            "optimizer": type(engine.optimizer.optimizer).__name__,
            "statistics": sorted({str(b.dtype) for b in engine.module.buffers() if b.is_floating_point()}),
        }  # fmt: skip
        if trainer.is_global_zero:
            print("ENGINE " + json.dumps(engine), flush=True)


class OrderProbe(pl.Callback):
    """Rank zero prints whether stage 3 still had its module order in each step."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        engine: Any = trainer.model
        if trainer.is_global_zero:
            kept = engine.optimizer.parameter_offload.get_param_coordinator().is_complete_trace()
            print(f"ORDER {trainer.global_step} {kept}", flush=True)


class CallsItself(Toy):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return ((self(batch[1]).squeeze(-1) - batch[1].sum(-1)) ** 2).mean()


class BatchNormed(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))


class TwoOptimizers(Toy):
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), 0.1) for part in (self.net[0], self.net[2])]


class ByHand(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


def _train(folder: Path, *arguments: str, env: dict[str, str] | None = None) -> Finished:
    probe = ("--trainer.callbacks", "[{class_path: tests.distributed.test_deepspeed_run.EngineProbe}]")
    environment = {**toy_env(folder / "trace"), **(env or {})}
    return train_on(2, (*TOY, *probe, *arguments), folder, environment, preloaded=DEEPSPEED)


def _engine(finished: Finished) -> dict[str, Any]:
    (line,) = [line for line in finished.output.splitlines() if line.startswith("ENGINE ")]
    return json.loads(line.removeprefix("ENGINE "))


def test_the_engine_uses_the_plan_and_the_users_file(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_optimization": {"stage": "auto", "reduce_bucket_size": 1e5, "allgather_bucket_size": "auto"},
        "bf16": {"enabled": "auto"},
    }))  # fmt: skip
    before = file.read_bytes()
    arguments = ("--strategy", "deepspeed_stage_2", "--deepspeed_config", "ds.json", "--global_batch_size", "16",
                 "--trainer.gradient_clip_val", "0.7", "--precision", "bf16-mixed", "--name", "it",
                 "--trainer.max_epochs", "1")  # fmt: skip
    engine = _engine(_train(tmp_path, *arguments).check())
    # 16 samples over 2 ranks, at most 4 at once: accumulated twice; 64 samples are 4 steps.
    assert engine == {
        "stage": 2, "batch": [16, 4, 2], "clipping": 0.7, "steps": [4, 4], "dtype": "torch.bfloat16", "scale": 1.0,
        "optimizer": "AdamW", "statistics": [],
    }  # fmt: skip
    assert file.read_bytes() == before
    (planned,) = events_of(tmp_path / "runs" / "it", "planned")
    kept = json.loads((tmp_path / "runs" / "it" / "plan.json").read_text())["deepspeed"]
    assert kept == planned["plan"]["deepspeed"]
    assert kept["zero_optimization"]["reduce_bucket_size"] == 1e5


def test_fp16_has_a_real_loss_scale_if_a_test_enables_it(tmp_path: Path) -> None:
    arguments = ("--strategy", "deepspeed_stage_2", "--precision", "16-mixed", "--trainer.max_epochs", "1",
                 "--deepspeed_config", "{fp16: {enabled: auto, initial_scale_power: 8}}")  # fmt: skip
    engine = _engine(_train(tmp_path, *arguments, env=PRETEND_FP16).check())
    assert (engine["dtype"], engine["scale"]) == ("torch.float16", 256.0)


def test_stage_3_keeps_its_module_order_if_a_step_calls_the_module(tmp_path: Path) -> None:
    arguments = ("--model", "tests.distributed.test_deepspeed_run.CallsItself", *TOY[2:], "--strategy",
                 "deepspeed_stage_3", "--trainer.callbacks",
                 "[{class_path: tests.distributed.test_deepspeed_run.OrderProbe}]", "--trainer.max_steps",
                 "5")  # fmt: skip
    output = train_on(2, arguments, tmp_path, toy_env(tmp_path / "trace"), preloaded=DEEPSPEED).check().output
    order = [line.split()[1:] for line in output.splitlines() if line.startswith("ORDER ")]
    # The first step is recorded.
    assert order == [["1", "False"], ["2", "True"], ["3", "True"], ["4", "True"], ["5", "True"]]


@pytest.mark.parametrize("stage", [2, 3])
def test_a_batch_norm_trains_in_16_bits_with_its_statistics_in_fp32(tmp_path: Path, stage: int) -> None:
    arguments = ("--model", "tests.distributed.test_deepspeed_run.BatchNormed", "--strategy",
                 f"deepspeed_stage_{stage}", "--precision", "bf16-mixed", "--trainer.max_steps", "2")  # fmt: skip
    engine = _engine(_train(tmp_path, *arguments).check())
    assert engine["dtype"] == "torch.bfloat16"
    assert engine["statistics"] == ["torch.float32"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            "TwoOptimizers",
            "DeepSpeed takes one optimizer, but TwoOptimizers.configure_optimizers returned several; return one",
        ),
        (
            "ByHand",
            "ByHand optimizes by hand (automatic_optimization is False), which deepspeed_stage_1 does not",
        ),
    ],
)
def test_a_model_that_deepspeed_cannot_train_is_reported_in_one_line(tmp_path: Path, model: str, message: str) -> None:
    path = f"tests.distributed.test_deepspeed_run.{model}"
    arguments = ("--model", path, "--data", "tests.support.toy.ToyData", "--wandb.mode", "disabled", "--devices", "2",
                 "--strategy", "deepspeed_stage_1")  # fmt: skip
    finished = run_warm(launcher(*arguments), tmp_path, env=toy_env(tmp_path / "trace")).check(2)
    assert f"error: {message}" in finished.output
    assert not list(tmp_path.glob("trace-*")), "nothing was trained"


def test_every_problem_is_reported_before_ranks_start(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 3}, "train_batch_size": 7}')
    arguments = (*TOY, "--strategy", "deepspeed_stage_2", "--global_batch_size", "8")
    env = {"PYTHONPATH": str(REPOSITORY)}
    alone = run_warm(launcher("plan", *arguments), tmp_path, env=env).check(2).output
    assert "there is one rank; start several (`devices: 2`, or torchrun)" in alone
    both = run_warm(launcher("plan", *arguments, "--devices", "2", "--deepspeed_config", "ds.json"), tmp_path, env=env)
    for part in ("train_batch_size: given 7, but the plan has 8", "use `strategy: deepspeed_stage_3`"):
        assert part in both.check(2).output
    fp16 = run_warm(launcher("plan", *arguments, "--devices", "2", "--precision", "16-mixed"), tmp_path, env=env)
    if not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        assert "only with AVX512-FP16" in fp16.check(2).output
