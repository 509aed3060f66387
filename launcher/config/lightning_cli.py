"""Translate the keys of a LightningCLI config (`--print_config`) to the launcher's keys."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from launcher.config.lightning_cli_strategy import translate_strategy
from launcher.core.errors import Problem

# Under `trainer` in LightningCLI, at the top level here, with the values that count as not given.
_MOVED = {"accelerator": "auto", "devices": "auto", "num_nodes": 1, "precision": None}
# Unsupported keys of LightningCLI: ignored if null, otherwise an error with the right key.
_REJECTED = {
    "trainer.default_root_dir": "a run's files are in its run directory; set `runs_dir` and `name`",
    "trainer.model_registry": "checkpoints are in the run directory",
    "weights_only": "checkpoints are always loaded with weights_only",
}
# Arguments of Lightning 1's Trainer; LightningCLI rejects them too.
_REMOVED = {
    **dict.fromkeys(
        ("gpus", "num_processes", "tpu_cores", "ipus", "num_gpus"),
        "write `accelerator` and `devices`, as in `accelerator: gpu` and `devices: 2`",
    ),
    "auto_select_gpus": "write `devices: auto`, or CUDA_VISIBLE_DEVICES before the command",
    "distributed_backend": "write `strategy`",
    **dict.fromkeys(("amp_backend", "amp_level"), "write `precision: 16-mixed` or bf16-mixed"),
    "replace_sampler_ddp": "write `use_distributed_sampler`",
    "multiple_trainloader_mode": "return a CombinedLoader(loaders, mode) from train_dataloader",
    "checkpoint_callback": "write `enable_checkpointing`",
    "weights_save_path": "write `runs_dir` and `name`",
    "resume_from_checkpoint": "write `resume` at the top level",
    "weights_summary": "write `enable_model_summary`",
    "progress_bar_refresh_rate": "write `enable_progress_bar`, or the callback TQDMProgressBar with `refresh_rate`",
    "process_position": "write the callback TQDMProgressBar with `process_position`",
    "terminate_on_nan": "write `detect_anomaly`",
    "stochastic_weight_avg": "write the callback StochasticWeightAveraging",
    **dict.fromkeys(("log_gpu_memory", "gpu_monitor"), "write the callback DeviceStatsMonitor"),
    "track_grad_norm": "log lightning.pytorch.utilities.grad_norm in the model's on_before_optimizer_step",
    "flush_logs_every_n_steps": "write it as the logger's own argument",
    "reload_dataloaders_every_epoch": "write `reload_dataloaders_every_n_epochs: 1`",
    "truncated_bptt_steps": "split the sequence in the model's training_step",
    "prepare_data_per_node": "set it in the LightningDataModule",
    "move_metrics_to_cpu": "move them in the model's training_step",
    "auto_lr_find": "write the callback LearningRateFinder",
    "auto_scale_batch_size": "write the callback BatchSizeFinder",
}
# Lightning's number for all devices.
_ALL = -1
# Lightning's seed for `seed_everything: true`.
_DEFAULT_SEED = 0
_SUBCOMMANDS = ("fit", "validate", "test", "predict")


def translate_lightning_cli(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """New values with the launcher's keys, and a problem for each contradicting or unsupported key of LightningCLI."""
    result = _select_fit(values)
    trainer = dict(result["trainer"]) if isinstance(result.get("trainer"), Mapping) else None
    problems = _reject(result, trainer)
    for place, path in ((result, "devices"), (trainer or {}, "trainer.devices")):
        if "devices" in place:
            place["devices"], found = _read_devices(place["devices"], path)
            problems += found
    if result.get("devices") == _ALL:
        result["devices"] = "auto"
    problems += _move_strategy(result, result, "strategy")
    if trainer is not None:
        for key, default in _MOVED.items():
            given = trainer.pop(key, default)
            if given != default and given is not None:
                problems += _move(result, f"trainer.{key}", key, "auto" if given == _ALL else given)
        problems += _move_strategy(result, trainer, "trainer.strategy")
        # W&B is the default logger here; true requests Lightning's default, false no logger.
        if trainer.get("logger") is None:
            trainer.pop("logger", None)
        elif trainer["logger"] is False:
            trainer["logger"] = []
            problems += _turn_wandb_off(result)
        result["trainer"] = trainer
    seed = result.pop("seed_everything", None)
    if seed is False:
        problems.append(
            Problem("seed_everything", "given False, but every run has a seed; give a number, or remove it")
        )
    elif seed is True:
        result.setdefault("seed", _DEFAULT_SEED)
    elif seed is not None:
        problems += _move(result, "seed_everything", "seed", seed)
    checkpoint = result.pop("ckpt_path", None)
    if checkpoint is not None:
        problems += _move(result, "ckpt_path", "resume", checkpoint)
    return result, problems


def _select_fit(values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy; if the file has several subcommands of LightningCLI, only the part for `fit`."""
    own = values.get("fit")
    if not isinstance(own, Mapping):
        return dict(values)
    return {**{key: each for key, each in values.items() if key not in _SUBCOMMANDS}, **own}


def _read_devices(given: Any, path: str) -> tuple[Any, list[Problem]]:
    """The number of devices; Lightning also accepts a list of GPU indices."""
    if given == str(_ALL):
        return _ALL, []
    if isinstance(given, str) and re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*,?\s*", given) and "," in given:
        return _read_devices([int(part) for part in given.split(",") if part.strip()], path)
    if not isinstance(given, list) or not given or not all(isinstance(number, int) for number in given):
        return given, []
    if given == [*range(len(given))]:
        return len(given), []
    numbers = ",".join(map(str, given))
    advice = f"write `devices: {len(given)}`, and CUDA_VISIBLE_DEVICES={numbers} before the command"
    return len(given), [Problem(path, f"given {given!r}; {advice}")]


def _move_strategy(result: dict[str, Any], place: dict[str, Any], path: str) -> list[Problem]:
    """Translate a strategy of Lightning, a name or a class."""
    given = place.pop("strategy", None)
    if given is None or (given == "auto" and place is not result):
        return []
    settings, problems = translate_strategy(given, path, result.get("accelerator"))
    for key, value in settings.items():
        problems += _move(result, path, key, value)
    return problems


def _turn_wandb_off(result: dict[str, Any]) -> list[Problem]:
    wandb = result.get("wandb") or {}
    if not isinstance(wandb, Mapping):
        return []  # reported by the type check
    result["wandb"] = {**wandb, "mode": wandb.get("mode", "disabled")}
    if result["wandb"]["mode"] != "disabled":
        return [Problem("trainer.logger", f"given False, but wandb.mode is {wandb['mode']!r}; remove one of them")]
    return []


def _move(result: dict[str, Any], old: str, new: str, value: Any) -> list[Problem]:
    if new in result and result[new] != value:
        return [Problem(old, f"given {value!r}, but {new} is {result[new]!r}; remove one of them")]
    result[new] = value
    return []


def _reject(result: dict[str, Any], trainer: dict[str, Any] | None) -> list[Problem]:
    problems: list[Problem] = []
    for path, advice in _REJECTED.items():
        group, _, key = path.rpartition(".")
        place = trainer if group else result
        if place is not None and place.pop(key, None) is not None:
            problems.append(Problem(path, f"not supported here; {advice}"))
    for key, advice in _REMOVED.items():
        if trainer is not None and key in trainer and trainer.pop(key) is not None:
            problems.append(Problem(f"trainer.{key}", f"Lightning 2 has no such setting; remove it, and {advice}"))
    return problems
