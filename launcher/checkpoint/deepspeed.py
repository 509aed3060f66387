"""DeepSpeed's checkpoints: a folder with files of every rank, read with the same safety as other checkpoints.

For the layout see deepspeed/utils/zero_to_fp32.py, whose functions consolidate the partitions here too.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launcher.checkpoint.precision import RESTORED_SCALER_KEYS
from launcher.checkpoint.reader import Trust, as_mapping, guarded_loads, read_file
from launcher.core.errors import ResumeError, first_line
from strategies.empty_groups import EMPTY_GROUPS, GROUP_NAMES, with_empty_groups, with_frozen

# DeepSpeed's own keys in a file; Lightning saves the others.
_DEEPSPEED_KEYS = ("module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params",
                 "frozen_param_fragments", "lr_scheduler", "data_sampler", "random_ltd", "sparse_tensor_module_names",
                 "skipped_steps", "global_steps", "global_samples", "dp_world_size", "mp_world_size",
                 "checkpoint_parallel_dimensions", "ds_config", "ds_version")  # fmt: skip


@dataclass(frozen=True, slots=True)
class ZeroLayout:
    """How a checkpoint is partitioned. DeepSpeed loads only checkpoints with the layout of the running training."""

    stage: int
    world_size: int
    dtype: str  # 'fp16', 'bf16' or 'fp32'
    settings: tuple[Any, ...]  # other settings that the layout depends on

    def __str__(self) -> str:
        ranks = f"{self.world_size} rank{'s' if self.world_size > 1 else ''}"
        return f"ZeRO stage {self.stage} in {self.dtype} on {ranks}"

    @classmethod
    def of(cls, config: Mapping[str, Any], world_size: int) -> ZeroLayout:
        """The layout for a DeepSpeed config and `world_size` ranks."""
        zero = config.get("zero_optimization", {})
        dtypes = [name for name in ("fp16", "bf16") if config.get(name, {}).get("enabled")]
        stage = zero.get("stage", 0)
        offload = (zero.get("offload_optimizer") or {}).get("device", "none")
        # DeepSpeed then chooses its optimizer for bf16 weights with fp32 gradients.
        has_fp32_gradients = (config.get("data_types", {}).get("grad_accum_dtype") == "fp32" and stage == 1
                              and offload == "none" and config.get("bf16", {}).get("enabled") is True)  # fmt: skip
        settings = (zero.get("sub_group_size"), zero.get("round_robin_gradients", False), offload, has_fp32_gradients)
        return cls(stage, world_size, dtypes[0] if dtypes else "fp32", settings)


def zero_layout(path: Path) -> ZeroLayout:
    """The layout of a checkpoint; a `ResumeError` if it is not a DeepSpeed checkpoint, or damaged."""
    content = _model_file(path)
    return ZeroLayout.of(content["ds_config"], content["dp_world_size"])


def read_zero_outline(path: Path, trust: Trust | None = None, *, outline: bool = False) -> Mapping[str, Any]:
    """The part that Lightning saved, with meta tensors of the right shapes instead of the weights.

    Raises:
        ResumeError: not a DeepSpeed checkpoint, a damaged one, or one without the files of a rank.
    """
    content = _model_file(path, trust, outline=outline)
    folder = _folder(path)
    pieces = len(list(folder.glob("*_optim_states.pt")))
    if pieces != content["dp_world_size"]:
        raise ResumeError(
            f"resume: {path} has the optimizer files of {pieces} ranks, but {content['dp_world_size']} saved it; "
            "either the ranks do not share the folder, or the save was interrupted; give another checkpoint"
        )
    shapes: dict[str, Any] = {}
    for group in content["param_shapes"]:
        shapes.update(group)
    shapes.update(content.get("frozen_param_shapes") or {})
    shapes.update({name: content["module"][name].shape for name in content["buffer_names"]})
    shapes.update({name: shapes[other] for name, other in content["shared_params"].items() if other in shapes})
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    state.update({name: value.to("meta") for name, value in _unpartitioned(content).items() if name not in state})
    return {**_lightning_part(content), "state_dict": state, "optimizer_states": []}


def read_consolidated(path: Path, trust: Trust | None = None) -> dict[str, Any]:
    """A DeepSpeed checkpoint as Lightning saves one without DeepSpeed, with fp32 weights.

    `optimizer_states` has one state dict of a torch optimizer, with the parameters in the order of `parameter_names`.

    Raises:
        ResumeError: not a DeepSpeed checkpoint, a damaged one, or one whose loading would run untrusted code.
    """
    from deepspeed.utils import zero_to_fp32

    content = _model_file(path, trust)
    folder = str(_folder(path))
    try:
        # DeepSpeed's functions print their progress.
        with (
            guarded_loads(path, trust),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            models = zero_to_fp32.parse_model_states(zero_to_fp32.get_model_state_files(folder))
            pieces = [read_file(Path(file), trust, of=path)["optimizer_state_dict"]
                      for file in zero_to_fp32.get_optim_files(folder)]  # fmt: skip
            partitions = _Partitions(models, pieces)
            state = partitions.join(partitions.fp32_weights(), with_buffers=True)
            optimizer, names = partitions.optimizer_state()
        if groups := content.get(GROUP_NAMES):
            optimizer, names = with_frozen(optimizer, names, groups), [name for group in groups for name in group]
        settings = content.get(EMPTY_GROUPS, {})
        optimizer["param_groups"] = with_empty_groups(optimizer["param_groups"], settings)
    except (RuntimeError, OSError, ValueError, KeyError, EOFError) as error:
        raise ResumeError(
            f"resume: {path} cannot be consolidated: {first_line(error)}; give another checkpoint"
        ) from error
    state.update({name: value for name, value in _unpartitioned(content).items() if name not in state})
    return {**_loss_scale(content, pieces[0]), **_lightning_part(content), "state_dict": state,
            "optimizer_states": [optimizer], "parameter_names": names}  # fmt: skip


class _Partitions:
    """Consolidates the ranks' partitions of weights and optimizer states, which have the same layout."""

    def __init__(self, models: Sequence[Any], pieces: Sequence[Mapping[str, Any]]) -> None:
        self._models = models
        self._pieces = pieces
        # DeepSpeed's optimizer for bf16 weights with fp32 gradients in stage 1 does not save the stage.
        self._stage = int(pieces[0].get("zero_stage", 1))
        self._shapes = [dict(group) for group in models[0].param_shapes]

    def fp32_weights(self) -> list[list[Tensor]]:
        """Each rank's partition of each group of fp32 weights."""
        key = "fp32_flat_groups" if self._stage == 3 else "single_partition_of_fp32_groups"
        return [list(piece[key]) for piece in self._pieces]

    def join(self, pieces: list[list[Tensor]], *, with_buffers: bool) -> dict[str, Tensor]:
        """Consolidate the groups of each rank; buffers and frozen parameters are not partitioned."""
        from deepspeed.utils import zero_to_fp32 as tools

        count = len(self._pieces)
        frozen_too = not with_buffers
        if self._stage == 3:
            joined = tools._get_fp32_state_dict_from_zero3_checkpoint(count, pieces, self._models, frozen_too)
        else:
            paddings = self._pieces[0].get("param_alignment_paddings")
            joined = tools._get_fp32_state_dict_from_zero2_checkpoint(count, pieces, self._models, frozen_too, paddings)
        # A storage for each: saving a view would save its group.
        full = {name: tensor.clone() for name, tensor in tools.to_torch_tensor(joined).items()}
        return full if with_buffers else {name: full[name] for group in self._shapes for name in group}

    def optimizer_state(self) -> tuple[dict[str, Any], list[str]]:
        """The state dict of an optimizer without partitions, and the names of its parameters in their order."""
        key = "optimizer_state_dict" if self._stage == 3 else "base_optimizer_state"
        states = [piece[key] for piece in self._pieces]
        weights = self.fp32_weights()
        # In stage 3 DeepSpeed may split a parameter group of the user.
        groups = [dict(group) for group in states[0]["param_groups"]]
        names: list[str] = []
        state: dict[int, dict[str, Any]] = {}
        for group in groups:
            own = [name for index in group["params"] for name in self._shapes[index]]
            group["params"] = list(range(len(names), len(names) + len(own)))
            names += own
        index_of = {name: index for index, name in enumerate(names)}
        full: dict[str, dict[str, Tensor]] = {}
        for key in self._partitioned_keys(states[0], weights[0]):
            pieces = [
                [own["state"][n][key].flatten()[: len(weight)] for n, weight in enumerate(weights[rank])]
                for rank, own in enumerate(states)
            ]
            full[key] = self.join(pieces, with_buffers=False)
        for n, shapes in enumerate(self._shapes):
            for name in shapes:
                # A copy for each parameter: each parameter would increment a shared step counter.
                scalars = {k: copy.deepcopy(v) for k, v in states[0]["state"].get(n, {}).items() if k not in full}
                state[index_of[name]] = {**scalars, **{key: full[key][name] for key in full}}
        return {"state": state, "param_groups": groups}, names

    def _partitioned_keys(self, own: Mapping[str, Any], weights: Sequence[Tensor]) -> list[str]:
        """The states with one number for each weight, such as Adam's moments."""
        first = own["state"].get(0, {})
        return [key for key, value in first.items() if isinstance(value, Tensor) and value.numel() >= len(weights[0])
                and value.dim() > 0]  # fmt: skip


def _model_file(path: Path, trust: Trust | None = None, *, outline: bool = False) -> Mapping[str, Any]:
    folder = _folder(path)
    names = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
    found = [folder / name for name in names if (folder / name).exists()]
    if not found:
        raise ResumeError(
            f"resume: {path} is a folder, but not a DeepSpeed checkpoint: it has no {names[0]}; nor one of FSDP2: "
            "it has no .metadata; give another one"
        )
    content = as_mapping(read_file(found[0], trust, of=path, outline=outline), path)
    missing = [key for key in ("param_shapes", "dp_world_size", "ds_config", "module") if key not in content]
    if missing:
        raise ResumeError(
            f"resume: {found[0]} is not from a ZeRO training: it lacks {', '.join(missing)}; give another one"
        )
    return content


def _folder(path: Path) -> Path:
    """The folder of the files, which DeepSpeed writes to `latest`."""
    try:
        tag = (path / "latest").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        tag = "checkpoint"
    return path / Path(tag).name


def _loss_scale(content: Mapping[str, Any], piece: Mapping[str, Any]) -> dict[str, Any]:
    """DeepSpeed's dynamic loss scale as Lightning saves that of torch's scaler; empty without one."""
    scaler: Any = piece.get("loss_scaler")
    if not content["ds_config"].get("fp16", {}).get("enabled") or not getattr(scaler, "dynamic", False):
        return {}
    steps = scaler.cur_iter - scaler.last_overflow_iter - 1
    return {RESTORED_SCALER_KEYS[0]: {
        "scale": float(scaler.cur_scale), "growth_factor": scaler.scale_factor,
        "backoff_factor": 1 / scaler.scale_factor, "growth_interval": scaler.scale_window,
        "_growth_tracker": steps % scaler.scale_window,
    }}  # fmt: skip


def _unpartitioned(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights in a rank's file if they are complete; those of frozen parameters are nowhere else in stage 1."""
    if content["ds_config"].get("zero_optimization", {}).get("stage", 0) == 3:
        return {}
    return {name: value for name, value in content["module"].items() if isinstance(value, Tensor)}


def _lightning_part(content: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key not in _DEEPSPEED_KEYS}
