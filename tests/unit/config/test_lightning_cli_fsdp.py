"""Lightning's FSDPStrategy and ModelParallelStrategy: what becomes of them, or what to write instead."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from launcher.config.lightning_cli_strategy import translate_strategy
from launcher.config.loading import find_notices, load_config
from launcher.config.suggestions import NO_COMMAND

_PATH = "trainer.strategy"
_BLOCK = "torch.nn.TransformerEncoderLayer"


def of_class(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"lightning.pytorch.strategies.{name}", "init_args": arguments}


def read_defaults(kind: type) -> dict[str, Any]:
    """The defaults that LightningCLI writes out."""
    found = {n: p.default for n, p in inspect.signature(kind.__init__).parameters.items()
             if p.default is not p.empty}  # fmt: skip
    return {**found, "timeout": "0:30:00"}


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        ({}, {"strategy": "fsdp2"}),
        ({"sharding_strategy": "FULL_SHARD"}, {"strategy": "fsdp2"}),
        ({"sharding_strategy": "SHARD_GRAD_OP"}, {"strategy": "fsdp2_grad_op"}),
        ({"sharding_strategy": "HYBRID_SHARD"}, {"strategy": "hsdp"}),
        ({"sharding_strategy": "ShardingStrategy.NO_SHARD"}, {"strategy": "ddp"}),
        ({"sharding_strategy": "NO_SHARD", "auto_wrap_policy": [_BLOCK]}, {"strategy": "ddp"}),
        (
            {"sharding_strategy": "NO_SHARD", "activation_checkpointing_policy": [_BLOCK]},
            {"strategy": "ddp", "activation_checkpointing": True, "fsdp": {"wrap": ["TransformerEncoderLayer"]}},
        ),
        (
            {"sharding_strategy": "HYBRID_SHARD", "device_mesh": [2, 4]},
            {"strategy": "hsdp", "fsdp": {"shard_ranks": 4}},
        ),
        ({"cpu_offload": True}, {"strategy": "fsdp2_offload"}),
        (
            {"cpu_offload": {"class_path": "torch.distributed.fsdp.CPUOffload", "init_args": {"offload_params": True}}},
            {"strategy": "fsdp2_offload"},
        ),
        ({"auto_wrap_policy": [_BLOCK]}, {"strategy": "fsdp2", "fsdp": {"wrap": ["TransformerEncoderLayer"]}}),
        (
            {"auto_wrap_policy": {"class_path": "torch.distributed.fsdp.wrap.ModuleWrapPolicy",
                                  "init_args": {"module_classes": [_BLOCK, "my.Block"]}}},
            {"strategy": "fsdp2", "fsdp": {"wrap": ["TransformerEncoderLayer", "Block"]}},
        ),
        (
            {"activation_checkpointing_policy": [_BLOCK]},
            {"strategy": "fsdp2", "activation_checkpointing": True, "fsdp": {"wrap": ["TransformerEncoderLayer"]}},
        ),
        (
            {"activation_checkpointing": _BLOCK, "auto_wrap_policy": [_BLOCK]},
            {"strategy": "fsdp2", "activation_checkpointing": True, "fsdp": {"wrap": ["TransformerEncoderLayer"]}},
        ),
        ({"timeout": "0:10:00", "process_group_backend": "nccl"},
         {"strategy": "fsdp2", "process_group_timeout": 600.0}),
        ({"use_orig_params": True, "limit_all_gathers": True, "state_dict_type": "sharded"}, {"strategy": "fsdp2"}),
    ],
)  # fmt: skip
def test_the_class_of_fsdp(arguments: dict[str, Any], settings: dict[str, Any]) -> None:
    given = of_class("FSDPStrategy", **{**read_defaults(FSDPStrategy), "timeout": None, **arguments})
    found, problems = translate_strategy(given, _PATH, None)
    assert (found, problems) == (settings, [])
    # It is a config that the launcher takes.
    assert load_config([], ["--model", "a.B", "--trainer.strategy", json.dumps(given)]).strategy == settings["strategy"]


def test_the_class_of_model_parallelism() -> None:
    given = {**read_defaults(ModelParallelStrategy), "tensor_parallel_size": 1}
    for more in ({}, {"save_distributed_checkpoint": False}, {"data_parallel_size": "auto"}):
        settings, problems = translate_strategy(of_class("ModelParallelStrategy", **{**given, **more}), _PATH, None)
        assert (settings, problems) == ({"strategy": "fsdp2", "process_group_timeout": 1800.0}, [])


@pytest.mark.parametrize(
    ("name", "arguments", "argument", "advice"),
    [
        ("FSDPStrategy", {"sharding_strategy": "_HYBRID_SHARD_ZERO2"}, "sharding_strategy", "write one of FULL_SHARD"),
        ("FSDPStrategy", {"sharding_strategy": "HYBRID_SHARD", "cpu_offload": True}, "cpu_offload", "fsdp2_offload"),
        ("FSDPStrategy", {"mixed_precision": {"class_path": "torch.distributed.fsdp.MixedPrecision"}},
         "mixed_precision", "`precision: bf16-mixed`"),
        ("FSDPStrategy", {"auto_wrap_policy": "torch.distributed.fsdp.wrap.size_based_auto_wrap_policy"},
         "auto_wrap_policy", "name the classes of the blocks in `fsdp.wrap`"),
        ("FSDPStrategy", {"auto_wrap_policy": ["a.B"], "activation_checkpointing_policy": ["a.C"]},
         "activation_checkpointing_policy", "name the same classes"),
        ("FSDPStrategy", {"device_mesh": [2, 4]}, "device_mesh", "`fsdp.shard_ranks`, and `strategy: hsdp`"),
        ("FSDPStrategy", {"ignored_modules": ["a"]}, "ignored_modules", "FSDP2 has no such argument"),
        ("ModelParallelStrategy", {}, "tensor_parallel_size", "tensor parallelism is not available; write 1"),
        ("ModelParallelStrategy", {"tensor_parallel_size": 2}, "tensor_parallel_size", "write 1"),
        ("ModelParallelStrategy", {"tensor_parallel_size": 1, "data_parallel_size": 4}, "data_parallel_size",
         "write auto, and set `devices`"),
        ("FSDPStrategy", {"process_group_backend": "mpi"}, "process_group_backend", "nccl for GPUs"),
        ("FSDPStrategy", {"cluster_environment": "a.B"}, "cluster_environment", "the launcher sets it itself"),
    ],
)  # fmt: skip
def test_arguments_without_an_equivalent_are_rejected(
    name: str, arguments: dict[str, Any], argument: str, advice: str
) -> None:
    _, problems = translate_strategy(of_class(name, **arguments), _PATH, None)
    (problem,) = problems
    assert problem.path == f"{_PATH}.init_args.{argument}"
    assert advice in problem.message


@pytest.mark.parametrize(
    ("strategy", "notices"),
    [
        ("fsdp", ["strategy fsdp is fsdp2 here (FSDP2 replaces FSDP1)"]),
        (of_class("FSDPStrategy", sharding_strategy="SHARD_GRAD_OP"),
         ["FSDPStrategy is `strategy: fsdp2_grad_op` here (FSDP2 replaces FSDP1)"]),
        (of_class("FSDPStrategy", state_dict_type="full", use_orig_params=True),
         ["FSDPStrategy is `strategy: fsdp2` here (FSDP2 replaces FSDP1)",
          "checkpoints are sharded here; `launcher convert` writes one file",
          "use_orig_params of FSDPStrategy has no effect on FSDP2"]),
        (of_class("ModelParallelStrategy", tensor_parallel_size=1),
         ["ModelParallelStrategy is `strategy: fsdp2` here (it shards any module)"]),
        (of_class("FSDPStrategy", mixed_precision=3), []),
        (of_class("DDPStrategy"), []),
    ],
)  # fmt: skip
def test_another_effect_gets_a_notice(strategy: Any, notices: list[str], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(json.dumps({"trainer": {"strategy": strategy}}))
    assert find_notices([tmp_path / "run.yaml"], [], NO_COMMAND) == notices
    assert all(len(f"notice: {text}") <= 80 for text in notices)
