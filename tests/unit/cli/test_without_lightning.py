"""Without Lightning: modules that do not need it work, and the coordinator's error has the install command."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support.processes import run
from tests.support.runs import REPOSITORY

# Simulates a machine without it: every import fails in this process.
_BLOCK = """
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
"""
_LIGHTNING = ["lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities"]

_PURE = """
import strategies.precision, strategies.batch, strategies.choice, strategies.deepspeed_precision
import launcher, launcher.config.schema, launcher.core.errors, launcher.core.events
import launcher.hardware.topology, launcher.agreement.facts, launcher.checkpoint.precision
import launcher.runs.directory, launcher.monitoring.health, launcher.agreement.script_ranks
from launcher import RunConfig, Plan, build_wandb_config, compute_effective_precision, detect_model_type
from launcher.agreement.facts import Agreement, RankFacts
from launcher.hardware.devices import Device, Hardware
from launcher.planning.plan import make_plan

assert compute_effective_precision("16", True, True, True) == "16"
hardware = Hardware(Device("cpu", 0, "EPYC", 2**36, ("fp32", "fp64")), 1, {})
facts = RankFacts(0, local_rank=0, local_world_size=1, node_rank=0, host="here", hardware=hardware, config_digest="x")
plan = make_plan(RunConfig(use_amp=True), Agreement((facts,)))
assert (plan.precision, len(plan.notices)) == ("32-true", 1)

class TinyGPT:
    pass

values = build_wandb_config(TinyGPT(), {"n_embd": 8}, {"use_amp": True}, plan)
assert (detect_model_type(TinyGPT()), values["hidden_size"], values["precision"]) == ("gpt", 8, "32-true")
assert not {"lightning", "pytorch_lightning", "torch"} & set(sys.modules), "none was imported"
print("PURE")
"""

_COORDINATOR = """
from launcher import TrainingCoordinator
from launcher.core.errors import MissingLibraryError

coordinator = TrainingCoordinator(output_dir="runs", precision="bf16")
try:
    coordinator.train(object(), [], max_epochs=1)
except MissingLibraryError as error:
    print("ERROR", error.exit_code, error)
import os
assert not os.path.exists("runs"), "nothing was started"
"""


def without(missing: list[str], program: str, folder: Path) -> str:
    program = _BLOCK.format(missing=missing) + program
    return run([sys.executable, "-c", program], folder, env={"PYTHONPATH": str(REPOSITORY)}).check().output


@pytest.mark.case(17)
@pytest.mark.parametrize("missing", [_LIGHTNING, [*_LIGHTNING, "torch", "deepspeed", "wandb"]], ids=["it", "all"])
def test_the_pure_modules_import_and_work(missing: list[str], tmp_path: Path) -> None:
    assert without(missing, _PURE, tmp_path) == "PURE\n"


@pytest.mark.case(17)
def test_the_coordinator_can_be_created_and_its_error_has_the_install_command(tmp_path: Path) -> None:
    (line,) = without(_LIGHTNING, _COORDINATOR, tmp_path).splitlines()
    assert line.startswith("ERROR 2 cannot import Lightning, which training needs (No module named 'lightning")
    assert line.endswith("); pip install 'lightning>=2.6'")


@pytest.mark.case(17)
def test_help_works_without_lightning(tmp_path: Path) -> None:
    program = "from launcher.cli.main import run\nrun(['--help'])"
    assert "Train a PyTorch Lightning model" in without(_LIGHTNING, program, tmp_path)
