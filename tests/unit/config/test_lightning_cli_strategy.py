"""LightningCLI's strategies, by name and by class: what becomes of them, or what to write instead."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.strategies.deepspeed import DeepSpeedStrategy
from torch.nn.parallel import DistributedDataParallel

from launcher.config.lightning_cli_strategy import DEEPSPEED_DEFAULTS, translate_strategy
from launcher.config.loading import find_notices, load_config
from launcher.config.suggestions import NO_COMMAND
from launcher.core.errors import ConfigError
from strategies.ddp import DDP_OPTIONS
from strategies.registry import list_strategy_names

_PATH = "trainer.strategy"


def of_class(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": name, "init_args": arguments}


def translated(given: Any, accelerator: str | None = None) -> dict[str, Any]:
    settings, problems = translate_strategy(given, _PATH, accelerator)
    assert problems == []
    return settings


def message_of(given: Any, accelerator: str | None = None) -> tuple[str, str]:
    _, (problem,) = translate_strategy(given, _PATH, accelerator)
    return problem.path, problem.message


@pytest.mark.parametrize("name", sorted(StrategyRegistry.available_strategies()))
def test_every_name_of_lightning_is_translated_or_rejected_with_advice(name: str) -> None:
    settings, problems = translate_strategy(name, _PATH, None)
    if problems:
        assert problems[0].message.startswith(f"given {name!r}; ")
    elif settings["strategy"] not in list_strategy_names():
        with pytest.raises(ConfigError, match="expected one of auto, single_device, ddp"):
            load_config([], ["--model", "a.B", "--trainer.strategy", name])
        assert name.startswith(("xla", "single_")), "no Lightning strategy that trains on these devices"


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("ddp", "ddp"),
        ("ddp_spawn", "ddp"),
        ("ddp_find_unused_parameters_false", "ddp"),
        ("ddp_notebook_find_unused_parameters_true", "ddp_find_unused_parameters_true"),
        ("deepspeed", "deepspeed_stage_2"),
        ("deepspeed_stage_3_offload", "deepspeed_stage_3_offload"),
        ("fsdp", "fsdp2"),
        ("fsdp_cpu_offload", "fsdp2_offload"),
        ("auto", "auto"),
        (3, 3),
    ],
)
def test_a_name(name: Any, ours: Any) -> None:
    assert translated(name) == {"strategy": ours}


@pytest.mark.parametrize(
    ("text", "overrides", "ours"),
    [
        ("seed: 1", ["--trainer.strategy", "ddp_spawn"], "ddp"),
        ("trainer: {strategy: ddp_fork}", [], "ddp"),
        ("fit: {strategy: ddp_notebook}", [], "ddp"),
        ("seed: 1", ["--strategy=ddp_spawn_find_unused_parameters_true"], "ddp_find_unused_parameters_true"),
        ("trainer: {strategy: ddp_fork}", ["--strategy", "ddp"], None),
        ("trainer: {strategy: ddp}", [], None),
        ("strategy: deepspeed", [], None),
        ("seed: 1", [], None),
    ],
)
def test_a_name_that_asks_for_another_start_gets_a_notice(
    text: str, overrides: list[str], ours: str | None, tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text(text)
    notices = find_notices([tmp_path / "run.yaml"], overrides, NO_COMMAND)
    assert len(notices) == (ours is not None)
    assert all(f" is {ours} here: the launcher starts the processes itself" in notice for notice in notices)


@pytest.mark.parametrize(
    "class_path",
    ["DDPStrategy", "lightning.pytorch.strategies.DDPStrategy", "lightning.pytorch.strategies.ddp.DDPStrategy"],
)
def test_the_class_of_ddp_by_each_of_its_paths(class_path: str) -> None:
    assert translated({"class_path": class_path}) == {"strategy": "ddp"}
    assert translated(of_class(class_path, find_unused_parameters=True, static_graph=False)) == {
        "strategy": "ddp_find_unused_parameters_true",
        "static_graph": False,
    }


def test_other_arguments_of_ddp_are_kept() -> None:
    given = of_class(
        "DDPStrategy", gradient_as_bucket_view=False, bucket_cap_mb=5, ddp_comm_hook="a.b", timeout="0:10:00"
    )
    assert translated(given) == {
        "strategy": "ddp",
        "process_group_timeout": 600.0,
        "ddp": {"gradient_as_bucket_view": False, "bucket_cap_mb": 5, "ddp_comm_hook": "a.b"},
    }


@pytest.mark.parametrize(
    ("timeout", "seconds"),
    [("0:30:00", 1800.0), ("1 day, 0:00:01", 86401.0), ("2 days, 1:00:00", 176400.0), (60, 60.0)],
)
def test_a_timeout_in_each_of_its_forms(timeout: Any, seconds: float) -> None:
    assert translated(of_class("DDPStrategy", timeout=timeout))["process_group_timeout"] == seconds


def test_the_defaults_that_lightning_cli_writes_set_nothing() -> None:
    """All defaults of the class, and of DistributedDataParallel."""
    kinds = (DDPStrategy.__init__, DistributedDataParallel.__init__)
    defaults = {
        name: parameter.default
        for kind in kinds
        for name, parameter in inspect.signature(kind).parameters.items()
        if parameter.default is not parameter.empty
    }
    assert {*DDP_OPTIONS} <= {*defaults}
    del defaults["timeout"]
    found = translated(of_class("DDPStrategy", **{**defaults, "broadcast_buffers": None, "bucket_cap_mb": None}))
    assert {key: value for key, value in found.pop("ddp").items() if value} == {"init_sync": True}
    assert found == {"strategy": "ddp", "static_graph": False}
    parameters = inspect.signature(DeepSpeedStrategy.__init__).parameters
    assert {n: p.default for n, p in parameters.items() if n in DEEPSPEED_DEFAULTS} == DEEPSPEED_DEFAULTS
    assert translated(of_class("DeepSpeedStrategy", **DEEPSPEED_DEFAULTS)) == {"strategy": "deepspeed_stage_2"}


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        ({}, {"strategy": "deepspeed_stage_2"}),
        ({"stage": 3}, {"strategy": "deepspeed_stage_3"}),
        (
            {"stage": 3, "offload_optimizer": True, "offload_parameters": True},
            {"strategy": "deepspeed_stage_3_offload"},
        ),
        ({"offload_optimizer": True}, {"strategy": "deepspeed_stage_2_offload"}),
        (
            {"stage": 1, "reduce_bucket_size": 5, "overlap_comm": False},
            {
                "strategy": "deepspeed_stage_1",
                "deepspeed_config": {"zero_optimization": {"reduce_bucket_size": 5, "overlap_comm": False}},
            },
        ),
        (
            {"stage": 3, "offload_optimizer": True},
            {
                "strategy": "deepspeed_stage_3",
                "deepspeed_config": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            },
        ),
        (
            {"config": {"zero_optimization": {"stage": 1}, "gradient_clipping": 0.5}, "stage": 3},
            {
                "strategy": "deepspeed_stage_1",
                "deepspeed_config": {"zero_optimization": {"stage": 1}, "gradient_clipping": 0.5},
            },
        ),
    ],
)
def test_the_class_of_deepspeed(arguments: dict[str, Any], settings: dict[str, Any]) -> None:
    assert translated(of_class("DeepSpeedStrategy", **arguments)) == settings
    # It is a config that the launcher takes.
    config = load_config(
        [], ["--model", "a.B", "--trainer.strategy", json.dumps(of_class("DeepSpeedStrategy", **arguments))]
    )
    assert config.strategy == settings["strategy"]


def test_the_file_of_deepspeed(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}')
    settings = translated(of_class("DeepSpeedStrategy", config=str(file)))
    assert settings == {"strategy": "deepspeed_stage_3", "deepspeed_config": json.loads(file.read_text())}


@pytest.mark.parametrize(
    ("given", "path", "expected"),
    [
        ("dp", _PATH, "write ddp"),
        (of_class("my.OwnStrategy"), f"{_PATH}.class_path", "write one of its names, as in `strategy: ddp`"),
        (of_class("lightning.pytorch.strategies.Nope"), f"{_PATH}.class_path", "`strategy: ddp` or another"),
        ({"init_args": {"bucket_cap_mb": 3}}, f"{_PATH}.class_path", "given None"),
        (
            of_class("DDPStrategy", process_group_backend="mpi"),
            f"{_PATH}.init_args.process_group_backend",
            "given 'mpi'; the launcher uses nccl for GPUs and gloo for CPUs; remove it",
        ),
        (
            of_class("DDPStrategy", cluster_environment="a.B"),
            f"{_PATH}.init_args.cluster_environment",
            "the launcher sets it itself; remove it",
        ),
        (of_class("DDPStrategy", timeout="long"), f"{_PATH}.init_args.timeout", "expected H:MM:SS"),
        (
            of_class("DeepSpeedStrategy", pin_memory=True),
            f"{_PATH}.init_args.pin_memory",
            "write it under DeepSpeed's name in `deepspeed_config`",
        ),
        (of_class("DeepSpeedStrategy", stage=0), _PATH, "write `strategy: ddp`"),
        (of_class("SingleDeviceStrategy", device="cuda:1"), f"{_PATH}.init_args.device", "CUDA_VISIBLE_DEVICES=1"),
    ],
)
def test_unsupported_arguments_are_rejected_with_advice(given: Any, path: str, expected: str) -> None:
    found_path, message = message_of(given)
    assert found_path == path
    assert expected in message


@pytest.mark.parametrize(("accelerator", "backend"), [("cpu", "gloo"), ("gpu", "nccl"), (None, "nccl")])
def test_the_devices_own_backend_is_accepted(accelerator: str | None, backend: str) -> None:
    assert translated(of_class("DDPStrategy", process_group_backend=backend), accelerator) == {"strategy": "ddp"}
