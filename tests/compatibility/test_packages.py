"""Packages of the Lightning ecosystem: on one rank, on two ranks, resumed, restarted after a kill, and under ZeRO 2."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.support.processes import Finished, launcher, run_warm
from tests.support.runs import REPOSITORY, events_of
from tests.support.warm import DEEPSPEED

pytestmark = pytest.mark.slow
_PACKAGES = "tests.compatibility.packages"


@dataclass(frozen=True)
class Package:
    """A user's training with a package.

    Attributes:
        module: name in `tests.compatibility.packages`.
        imports: modules that are imported once for all its runs.
        model: class of the module.
        data: arguments of its data module.
    """

    module: str
    imports: Sequence[str]
    model: str = "Model"
    data: Mapping[str, Any] = field(default_factory=dict)

    def fit(
        self, folder: Path, *arguments: str, preloaded: Sequence[str] = (), code: int = 0, **settings: Any
    ) -> Finished:
        """`launcher fit` in `folder`, which ends with `code`."""
        if "CI" not in os.environ:
            for name in self.imports:
                pytest.importorskip(name.partition(".")[0], reason="extra `compatibility`")
        callbacks = settings.pop("callbacks", [])
        values = {
            "model": {"class_path": f"{_PACKAGES}.{self.module}.{self.model}"},
            "data": {"class_path": f"{_PACKAGES}.{self.module}.Data", "init_args": dict(self.data)},
            "trainer": {"max_epochs": 2, "callbacks": callbacks, "enable_model_summary": False},
            "accelerator": "cpu", "wandb": {"mode": "disabled"}, "checkpoint": {"every_n_steps": 1}, **settings,
        }  # fmt: skip
        file = folder / f"{settings['name']}.yaml"
        file.write_text(yaml.safe_dump(values))
        env = {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
        command = launcher("fit", "--config", str(file), *arguments)
        return run_warm(command, folder, env=env, timeout=240, preloaded=(*self.imports, *preloaded)).check(code)


PACKAGES = {
    "pytorch-forecasting": Package("forecasting", ("pytorch_forecasting",)),
    "torch_geometric": Package("graphs", ("torch_geometric.data.lightning", "torch_geometric.nn")),
    "chemprop": Package("molecules", ("chemprop.data", "chemprop.models")),
    "gpt2": Package("language", ("transformers.models.gpt2", "transformers.models.bert"), "Gpt2"),
    "bert": Package("language", ("transformers.models.gpt2", "transformers.models.bert"), "Bert", {"classes": True}),
}  # fmt: skip


DIE = {"class_path": "tests.compatibility.callbacks.DieOnce", "init_args": {"step": 2}}


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Weights of a run's last checkpoint, whose hyperparameters may contain objects of the package."""
    file = folder / "runs" / name / "checkpoints" / "last.ckpt"
    return torch.load(file, weights_only=False)["state_dict"]


def steps(folder: Path, name: str) -> int:
    (ended,) = events_of(folder / "runs" / name, "finished")[-1:]
    metrics = json.loads(json.dumps(ended["metrics"]))
    assert all(value == value for value in metrics.values()), metrics
    return ended["step"]


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_trains_alone_and_goes_on_where_it_was(name: str, tmp_path: Path) -> None:
    package = PACKAGES[name]
    package.fit(tmp_path, name="whole")
    package.fit(tmp_path, name="parts", callbacks=[DIE], code=-signal.SIGKILL)
    package.fit(tmp_path, "--resume", "auto", name="parts", callbacks=[DIE])
    assert steps(tmp_path, "parts") == steps(tmp_path, "whole")
    assert_same(weights(tmp_path, "parts"), weights(tmp_path, "whole"))


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_trains_on_two_ranks_and_survives_a_kill(name: str, tmp_path: Path) -> None:
    package = PACKAGES[name]
    package.fit(tmp_path, name="whole", devices=2)
    output = package.fit(tmp_path, "--max-restarts", "1", name="killed", devices=2, callbacks=[DIE]).output
    assert (tmp_path / "died").exists()
    assert steps(tmp_path, "killed") == steps(tmp_path, "whole"), output
    assert_same(weights(tmp_path, "killed"), weights(tmp_path, "whole"))


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_trains_under_zero(name: str, tmp_path: Path) -> None:
    output = PACKAGES[name].fit(tmp_path, name="zero", devices=2, strategy="deepspeed_stage_2", preloaded=DEEPSPEED)
    assert steps(tmp_path, "zero") > 0, output.output


def test_fp8_layers_train_under_fsdp2_as_under_ddp(tmp_path: Path) -> None:
    package = Package("fp8", ("torchao.float8",))
    for strategy in ("ddp", "fsdp2"):
        package.fit(tmp_path, name=strategy, devices=2, strategy=strategy, precision="bf16-mixed")
    losses = [events_of(tmp_path / "runs" / name, "finished")[-1]["metrics"]["train_loss"] for name in ("ddp", "fsdp2")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
