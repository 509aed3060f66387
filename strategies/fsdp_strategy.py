"""Lightning's ModelParallelStrategy with FSDP2 applied to any module: the LightningModule is the root."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.device_dtype_mixin import _update_properties
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer, _MockOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from typing_extensions import override

from strategies import fsdp_problems
from strategies.base import BuildOptions, StrategyChoice, StrategyError
from strategies.dtensor_patches import patch_dtensors
from strategies.environment import FixedClusterEnvironment, devices_of
from strategies.fsdp_blocks import check_wrap, find_blocks
from strategies.fsdp_modules import ModuleSharding, check_shards, materialize, shard_module, sharded_modules
from strategies.fsdp_replicas import ReplicatedParameters
from strategies.fsdp_steps import NotCopied, ShardedSteps
from strategies.model_shape import use_foreach, use_fused
from strategies.sharded_restore import (
    ShardedRestore,
    load_optimizers,
    load_weights,
    optimizer_by_names,
    restore_finetuning,
    save_sharded,
)
from strategies.sharding import ShardVariant

# Of a training that are checked for what FSDP2 would lose.
_CHECKED_STEPS = 4
_COMPUTE_TYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}

# Attribute of a sharded model: a Trainer may fit, validate and test the same model; so may another Trainer.
_SHARDED = "_launcher_sharded"


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
        self._shares_buffers, self._is_blocked = True, False
        # Groups of optimizers whose step's implementation is not the user's choice.
        self._chosen: dict[int, set[int]] = {}
        self._steps_of: Counter[str] = Counter()

    @override
    def setup_environment(self) -> None:
        self._setup_distributed()
        patch_dtensors()
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
        fsdp_problems.check_callbacks(trainer)
        if trainer.state.fn == TrainerFn.FITTING and self._layer_sync is not None:
            self._layer_sync.apply(self._module)
        self.model = self._module
        self._shard()
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def _shard(self) -> None:
        model = self._module
        # torch moves tensors of other types, such as torchao's, only without weak references.
        plain = [(name, p) for name, p in model.named_parameters() if not is_traceable_wrapper_subclass(p)]
        held = [(weakref.ref(p), name) for name, p in plain]
        _update_properties(model, device=self.root_device)
        sharded = vars(model).get(_SHARDED)
        if sharded is None or not sharded.parts:
            replicated = self._shard_model(model)
            assert self._shard_mesh is not None  # noqa: S101 -- made in `setup_environment`
            replicas = ReplicatedParameters(model, replicated, self._shard_mesh)
            vars(model)[_SHARDED] = sharded = NotCopied(replicas, ShardedSteps(model))
        self._replicas, self._steps = sharded.parts
        new = dict(model.named_parameters())
        self._names = set(new)
        self._replaced = [(old, new[name]) for old, name in held if name in new]

    def _shard_model(self, model: LightningModule) -> list[nn.Parameter]:
        """Shard the model; return the parameters that every rank has completely."""
        is_users = bool(sharded_modules(model))
        if is_users:
            # Parts that `configure_model` has sharded stay as they are.
            fsdp_problems.check_own_shards(model, self._variant, self._options, self._shard_mesh)
            materialize(model, self.root_device)
        else:
            check_shards(model)
            check_wrap(model, self._options.wrap)
            self.precision_plugin.convert_module(model)
        if isinstance(model, FSDPModule):
            return []
        blocks = [] if is_users else find_blocks(model, self._options.wrap)
        sharding = ModuleSharding(self.root_device, self._variant.reshard, self._fully_shard_options())
        replicated = shard_module(model, blocks, sharding)
        if self._options.compile:
            for block in blocks:
                block.forward = torch.compile(block.forward)
        return replicated

    def _fully_shard_options(self) -> dict[str, Any]:
        pinned = self.root_device.type == "cuda"
        offload = CPUOffloadPolicy(pin_memory=pinned) if self._variant.offload else OffloadPolicy()
        return {"mesh": self._shard_mesh, "mp_policy": self._policy(), "offload_policy": offload}

    def _policy(self) -> MixedPrecisionPolicy:
        precision = self.precision_plugin.precision
        in_fp32 = torch.float32 if self._options.reduce_dtype == "fp32" else None
        if precision in _COMPUTE_TYPES:
            return MixedPrecisionPolicy(_COMPUTE_TYPES[precision], in_fp32, cast_forward_inputs=False)
        reduced = in_fp32 if precision in ("bf16-true", "16-true") else None
        return MixedPrecisionPolicy(reduce_dtype=reduced, cast_forward_inputs=False)

    @override
    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            fsdp_problems.check_optimizer(optimizer)
            # One that was made of a list from before the parameters were sharded would train nothing.
            replaced = {id(old()): new for old, new in self._replaced if old() is not None}
            for group in optimizer.param_groups:
                group["params"] = [replaced.get(id(p), p) for p in group["params"]]
        self._use_faster_steps()

    def _use_faster_steps(self) -> None:
        """Set an implementation of the optimizers' steps for groups that set none."""
        for optimizer in self.optimizers:
            chosen = use_fused(optimizer) if self._variant.offload else []
            if self.root_device.type == "cuda":
                chosen += use_foreach(optimizer)
            self._chosen.setdefault(id(optimizer), set()).update(chosen)

    def _run(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Run a method of the LightningModule as its forward pass, so that FSDP2's hooks run."""
        if self._shares_buffers:
            self._steps.share_buffers()
        self._steps.before_step()
        self._steps.order.is_checked = self._steps_of[name] < _CHECKED_STEPS
        self._steps_of[name] += 1
        with self._replicas.plain(), fsdp_problems.explain_unsharded(self._module):
            output = self._steps.redirection(self._module, self._module, name, *args, **kwargs)
            self._steps.order.end_step()
        # As DDP: not after a pass without a backward pass that sums gradients.
        self._shares_buffers = self._module.automatic_optimization and torch.is_grad_enabled() and not self._is_blocked
        return output

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.train_step_context():
            output = self._run("training_step", *args, **kwargs)
        if self._steps_of["training_step"] <= _CHECKED_STEPS:
            fsdp_problems.check_new_parameters(self._module, self._names)
            fsdp_problems.check_changed_parameters(self._module, self._steps.find_changed())
        return output

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

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return True

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        return self._module.state_dict()

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        plain = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        if type(plain) is _MockOptimizer:
            return plain.state_dict()
        state = optimizer_by_names(self._module, plain)
        # A resume may be on another device, or under another strategy.
        for number in self._chosen.get(id(plain), ()):
            state["param_groups"][number].update(dict.fromkeys(("foreach", "fused")))
        return state

    @override
    def pre_backward(self, closure_loss: Tensor) -> None:
        super().pre_backward(closure_loss)
        self._steps.before_backward(closure_loss)
        # A block may be computed again.
        self._replicas.enter()

    @override
    def post_backward(self, closure_loss: Tensor) -> None:
        super().post_backward(closure_loss)
        self._replicas.leave()
        self._replicas.reduce()

    @override
    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        def close() -> Any:
            result = closure()
            if self._steps.has_unreduced():
                name = type(self._module).__name__
                raise StrategyError(
                    f"{name} calls `loss.backward()`, after which FSDP2 does not sum gradients over the ranks; call "
                    "`self.manual_backward(loss)`"
                )
            self._steps.reshard()
            return result

        with fsdp_problems.explain_step(getattr(optimizer, "_optimizer", optimizer)):
            return super().optimizer_step(optimizer, close, model, **kwargs)

    @contextmanager
    @override
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Within it gradients are not summed over the ranks, unless each micro batch does that."""
        self._is_blocked = True
        if not self._options.reduce_every_batch:
            self._steps.set_reduces(is_last=False)
        try:
            yield
        finally:
            self._is_blocked = False
            self._steps.set_reduces(is_last=True)

    @override
    def on_exception(self, exception: BaseException) -> None:
        fsdp_problems.explain_elsewhere(exception)
        super().on_exception(exception)

    @override
    def on_validation_end(self) -> None:
        self._steps.reshard()

    @override
    def on_test_end(self) -> None:
        self._steps.reshard()

    @override
    def on_predict_end(self) -> None:
        self._steps.reshard()

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        save_sharded(self, checkpoint, filepath, self._hooks)

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        return self._restore.load(self, Path(checkpoint_path), self._shard_mesh, weights_only)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        load_weights(self._module, checkpoint, strict=strict)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        restore_finetuning(self._module)
        load_optimizers(self.optimizers, checkpoint)
        self._use_faster_steps()

    @property
    def _module(self) -> LightningModule:
        assert self.lightning_module is not None  # noqa: S101 -- Lightning connects it first
        return self.lightning_module
