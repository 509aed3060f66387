"""Lightning's DeepSpeedStrategy over an existing process group, on CUDA devices and on CPUs.

On CPUs it is for debugging and tests: ZeRO's real optimizers over gloo.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import _init_optimizers_and_lr_schedulers
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, ParallelStrategy, Strategy
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from strategies.base import CheckpointHooks, StrategyError
from strategies.deepspeed_config import NOT_ELEMENTWISE
from strategies.deepspeed_patches import (
    compute_with_fp32_weights,
    keep_module_order,
    reset_process_groups,
    use_cpu_accelerator,
)
from strategies.deepspeed_restore import (
    parameter_names,
    remove_hooks,
    restore_consolidated,
    restore_weights,
    weights_only_loads,
)
from strategies.empty_groups import EMPTY_GROUPS, GROUP_NAMES, SplitOptimizer
from strategies.folder_save import saved_folder

# Lightning sets these for DeepSpeed; a later run in this process must not see them.
_RANK_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK")


class SharedGroupDeepSpeed(DeepSpeedStrategy):
    """DeepSpeed on the existing process group of the ranks.

    Args:
        config: a complete DeepSpeed config without 'auto'; copied.
        parallel_devices: the node's devices, in the order of the local ranks.
        timeout: seconds after which a collective fails; only used if there is no process group yet.
        hooks: the launcher's part in checkpoints; None loads with `weights_only` and checks nothing.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        parallel_devices: list[torch.device],
        cluster_environment: ClusterEnvironment,
        process_group_backend: str,
        timeout: float,
        hooks: CheckpointHooks | None = None,
    ) -> None:
        # Lightning sets the accumulation from the Trainer's, and refuses one in the config.
        own = {key: value for key, value in config.items() if key != "gradient_accumulation_steps"}
        super().__init__(
            config=own,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            process_group_backend=process_group_backend,
            timeout=timedelta(seconds=timeout),
            logging_level=logging.ERROR,
        )
        self._variables_before: dict[str, str | None] = {}
        self._names: list[str] = []
        self._group_names: list[list[str]] = []
        self._groups: SplitOptimizer | None = None
        self._order_hook: RemovableHandle | None = None
        self._hooks = hooks
        self._consolidated: Mapping[str, Any] | None = None

    @override
    def setup_distributed(self) -> None:
        self._variables_before = {name: os.environ.get(name) for name in _RANK_VARIABLES}
        reset_process_groups()
        super().setup_distributed()

    @override
    def _init_optimizers(self) -> tuple[Optimizer, LRSchedulerConfig | None]:
        name = type(self._module).__name__
        try:
            optimizers, schedulers = _init_optimizers_and_lr_schedulers(self._module)
        except RuntimeError as error:
            # Lightning's message suggests manual optimization, which DeepSpeed does not support.
            if "multiple optimizers" not in str(error):
                raise
            raise StrategyError(
                f"DeepSpeed takes one optimizer, but {name}.configure_optimizers returned several; return one"
            ) from error
        check_optimizers(optimizers, len(schedulers), name)
        self._names = parameter_names(self._module, optimizers[0].param_groups)
        groups = [group for group in optimizers[0].param_groups if group["params"]]
        if any(not parameter.requires_grad for group in groups for parameter in group["params"]):
            self._group_names = [parameter_names(self._module, [group]) for group in groups]
        self._groups = SplitOptimizer(optimizers[0])
        return self._groups.optimizer, schedulers[0] if schedulers else None

    @override
    def init_deepspeed(self) -> None:
        super().init_deepspeed()
        compute_with_fp32_weights(self._module)
        self._order_hook = keep_module_order(self.model)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Every rank saves its shards in one folder."""
        if self._groups is not None and (settings := self._groups.settings()):
            checkpoint[EMPTY_GROUPS] = settings
        if self._group_names:
            checkpoint[GROUP_NAMES] = self._group_names
        remove_hooks([checkpoint, self._module])
        with saved_folder(self, filepath, checkpoint, self._hooks) as fresh:
            super().save_checkpoint(checkpoint, fresh, storage_options)

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a folder of DeepSpeed's with the same shards as this training, or a file that Lightning saved."""
        if not Path(checkpoint_path).is_dir():
            # Its weights are loaded after the model's hooks have seen them.
            self._consolidated = checkpoint = Strategy.load_checkpoint(self, checkpoint_path, weights_only)
            return checkpoint
        self._check_model(None)
        hooks = self._hooks
        if self.zero_stage_3 and hooks is not None and not self._module.trainer.training:
            return restore_weights(self.model, hooks.read_consolidated, Path(checkpoint_path))
        with weights_only_loads() if hooks is None else hooks.reading(Path(checkpoint_path)):
            checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        if self._groups is not None:
            self._groups.share_settings(checkpoint.get(EMPTY_GROUPS, {}))
        # DeepSpeed has loaded the weights; a hook may add some.
        checkpoint.setdefault("state_dict", {})
        return checkpoint

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        if self._consolidated is None:
            return
        self._consolidated = None
        self._check_model(checkpoint["state_dict"])
        restore_consolidated(self.model, checkpoint, self._names, strict=strict)
        if self._groups is not None:
            saved = checkpoint["optimizer_states"][0]["param_groups"]
            empty = {n: group for n, group in enumerate(saved) if not group["params"]}
            self._groups.share_settings(empty)

    def _check_model(self, weights: Mapping[str, Any] | None) -> None:
        if self._hooks is not None and self._hooks.check_model is not None:
            self._hooks.check_model(self._module, weights)

    @property
    def _module(self) -> LightningModule:
        assert self.lightning_module is not None  # noqa: S101 -- Lightning connects it first
        return self.lightning_module

    @override
    def teardown(self) -> None:
        super().teardown()
        if self._order_hook is not None:
            self._order_hook.remove()
            self._order_hook = None
        for name, value in self._variables_before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._variables_before = {}


class SingleScalingPrecision(DeepSpeedPrecision):
    """Lightning's DeepSpeed plugin without DeepSpeed's division of the loss by the number of accumulated batches.

    Lightning divides too: both would make gradients too small for clipping, SGD and Adam's moments.
    """

    @override
    def backward(self, tensor: Tensor, model: LightningModule, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        super().backward(tensor, model, optimizer, *args, scale_wrt_gas=False, **kwargs)


class CpuDeepSpeed(SharedGroupDeepSpeed):
    """DeepSpeed's ZeRO over gloo on CPUs, which Lightning does not support.

    Args:
        pretend_fp16: for tests: DeepSpeed's CPU accelerator claims to support fp16, so that there is a real loss scale.

    Raises:
        StrategyError: DeepSpeed was already imported for another kind of device.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        cluster_environment: ClusterEnvironment,
        local_world_size: int,
        timeout: float,
        hooks: CheckpointHooks | None = None,
        pretend_fp16: bool = False,
    ) -> None:
        use_cpu_accelerator(pretend_fp16)
        super().__init__(
            config,
            parallel_devices=[torch.device("cpu", n) for n in range(local_world_size)],
            cluster_environment=cluster_environment,
            process_group_backend="gloo",
            timeout=timeout,
            hooks=hooks,
        )

    @property
    @override
    def root_device(self) -> torch.device:
        # With an index, which Lightning passes to DeepSpeed; torch has only one CPU.
        return torch.device("cpu", 0)

    @override
    def setup_environment(self) -> None:
        # DeepSpeedStrategy's own accepts only CUDA.
        ParallelStrategy.setup_environment(self)
        self.setup_distributed()


def check_optimizers(optimizers: Sequence[Optimizer], schedulers: int, model: str) -> None:
    """Check that ZeRO supports what `configure_optimizers` returned: one elementwise optimizer.

    Raises:
        StrategyError: names the optimizer and the reason.
    """
    where = f"{model}.configure_optimizers"
    names = [type(optimizer).__name__ for optimizer in optimizers]
    if len(optimizers) != 1:
        given = ", ".join(names) or "none"
        raise StrategyError(f"DeepSpeed takes one optimizer, but {where} returned {given}; use one, or `strategy: ddp`")
    if schedulers > 1:
        raise StrategyError(f"DeepSpeed takes one learning rate scheduler, but {where} returned {schedulers}; use one")
    for base in type(optimizers[0]).__mro__:
        if base.__name__ in NOT_ELEMENTWISE:
            raise StrategyError(
                f"DeepSpeed cannot take {names[0]} of {where}: it {NOT_ELEMENTWISE[base.__name__]}; use an optimizer "
                "that updates each element separately, such as AdamW or SGD, or `strategy: ddp`"
            )
