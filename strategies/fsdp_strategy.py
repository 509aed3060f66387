"""Lightning's ModelParallelStrategy with FSDP2 applied to any module: the LightningModule is the root."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from typing_extensions import override

from strategies.base import BuildOptions, StrategyChoice
from strategies.environment import FixedClusterEnvironment, devices_of
from strategies.fsdp_blocks import find_blocks
from strategies.sharded_restore import ShardedRestore, save_sharded
from strategies.sharding import ShardVariant

_COMPUTE_TYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class FullyShardedStrategy(ModelParallelStrategy):
    """FSDP2 over the existing process group of the ranks.

    Args:
        variant: what is sharded, and when parameters are freed.
        choice: names the backend of the process group.
        options: the devices, and the config's `fsdp`.
    """

    def __init__(self, variant: ShardVariant, choice: StrategyChoice, options: BuildOptions) -> None:
        super().__init__(process_group_backend=choice.backend, timeout=timedelta(seconds=options.timeout))
        self.parallel_devices = devices_of(options)
        self.cluster_environment = FixedClusterEnvironment(options.location)
        self._variant, self._options, self._hooks = variant, options.sharding, options.checkpoint
        self._restore = ShardedRestore(options.checkpoint)
        self._shard_mesh: DeviceMesh | None = None

    @override
    def setup_environment(self) -> None:
        self._setup_distributed()
        if self.root_device.type == "cuda":
            torch.cuda.set_device(self.root_device)
        kind, world = self.root_device.type, self.world_size
        self._device_mesh = init_device_mesh(kind, (world, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
        self._module._device_mesh = self._device_mesh
        if self._variant.hybrid:
            shard = self._options.shard_ranks or self.num_processes
            names = ("replicate", "shard")
            self._shard_mesh = init_device_mesh(kind, (world // shard, shard), mesh_dim_names=names)
        else:
            self._shard_mesh = self._device_mesh["data_parallel"]

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    @override
    def setup(self, trainer: Trainer) -> None:
        assert self.accelerator is not None  # noqa: S101 -- Lightning connects it first
        self.accelerator.setup(trainer)
        self._shard()
        self.model = self.precision_plugin.convert_module(self._module)
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def _shard(self) -> None:
        model = self._module
        if any(isinstance(module, FSDPModule) for module in model.modules()):
            return
        offload = (
            CPUOffloadPolicy(pin_memory=self.root_device.type == "cuda") if self._variant.offload else OffloadPolicy()
        )
        shared: dict[str, Any] = {"mesh": self._shard_mesh, "mp_policy": self._policy(), "offload_policy": offload}
        for block in find_blocks(model, self._options.wrap):
            self._share_values(block)
            fully_shard(block, reshard_after_forward=self._variant.reshard, **shared)
        self._share_values(model)
        fully_shard(model, reshard_after_forward=False, **shared)

    def _share_values(self, module: nn.Module) -> None:
        """Give all ranks rank zero's values, as DDP does."""
        for tensor in [*module.parameters(), *module.buffers()]:
            if not isinstance(tensor, DTensor):
                tensor.data = tensor.data.to(self.root_device)
                dist.broadcast(tensor.detach(), 0)

    def _policy(self) -> MixedPrecisionPolicy:
        precision = self.precision_plugin.precision
        in_fp32 = torch.float32 if self._options.reduce_dtype == "fp32" else None
        if precision in _COMPUTE_TYPES:
            return MixedPrecisionPolicy(_COMPUTE_TYPES[precision], in_fp32, cast_forward_inputs=False)
        return MixedPrecisionPolicy(reduce_dtype=in_fp32 if precision in ("bf16-true", "16-true") else None)

    def _run(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Run a method of the LightningModule as its forward pass, so that FSDP2's hooks run."""
        return self._forward_redirection(self._module, self._module, name, *args, **kwargs)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.train_step_context():
            return self._run("training_step", *args, **kwargs)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.val_step_context():
            return self._run("validation_step", *args, **kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.test_step_context():
            return self._run("test_step", *args, **kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.predict_step_context():
            return self._run("predict_step", *args, **kwargs)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        save_sharded(self, checkpoint, Path(self.broadcast(str(filepath))), self._hooks)

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        return self._restore.load(self, Path(checkpoint_path), weights_only)

    @override
    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        self._restore.load_weights(self._module, checkpoint, strict=strict)

    @override
    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        self._restore.load_optimizers(self.optimizers, checkpoint)

    @property
    def _module(self) -> LightningModule:
        assert self.lightning_module is not None  # noqa: S101 -- Lightning connects it first
        return self.lightning_module
