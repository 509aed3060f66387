"""Read the keys of a config that LightningCLI wrote (`--print_config`) as the launcher's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.errors import Problem

# Under `trainer` for LightningCLI, at the top level here: the launcher decides them. Lightning's defaults say nothing.
_MOVED = {"accelerator": "auto", "strategy": "auto", "devices": "auto", "num_nodes": 1, "precision": None}
# Known to LightningCLI, of no use here: fine while they say nothing, an error with the right place otherwise.
_REFUSED = {
    "trainer.default_root_dir": "a run's files lie in its run directory; set `runs_dir` and `name`",
    "trainer.model_registry": "checkpoints lie in the run directory",
    "optimizer": "return the optimizer from the model's configure_optimizers",
    "lr_scheduler": "return the scheduler from the model's configure_optimizers",
    "weights_only": "checkpoints are always loaded with weights_only",
}


def translate_lightning_cli(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Move LightningCLI's keys to the launcher's places.

    Returns:
        New values, and a problem for each key whose two places contradict or that has no meaning here.
    """
    result = dict(values)
    trainer = dict(result["trainer"]) if isinstance(result.get("trainer"), Mapping) else None
    problems = _refuse(result, trainer)
    if trainer is not None:
        for key, default in _MOVED.items():
            given = trainer.pop(key, default)
            if given != default and given is not None:
                problems += _move(result, f"trainer.{key}", key, "auto" if key == "devices" and given == -1 else given)
        # A bare true or null asks for the default logger, which is W&B here; false asks for none.
        logger = trainer.get("logger")
        if isinstance(logger, bool) or logger is None:
            trainer.pop("logger", None)
        if logger is False:
            trainer["logger"] = []
            problems += _turn_wandb_off(result)
        result["trainer"] = trainer
    if result.get("devices") in (-1, "-1"):
        result["devices"] = "auto"
    seed = result.pop("seed_everything", True)
    if seed is False:
        problems.append(
            Problem("seed_everything", "given False; every run is seeded here: give a number, or remove it")
        )
    elif seed is not True and seed is not None:
        problems += _move(result, "seed_everything", "seed", seed)
    checkpoint = result.pop("ckpt_path", None)
    if checkpoint is not None:
        problems += _move(result, "ckpt_path", "resume", checkpoint)
    return result, problems


def _turn_wandb_off(result: dict[str, Any]) -> list[Problem]:
    wandb = result.get("wandb") or {}
    if not isinstance(wandb, Mapping):
        return []  # told by the check of the types
    result["wandb"] = {**wandb, "mode": wandb.get("mode", "disabled")}
    if result["wandb"]["mode"] != "disabled":
        return [Problem("trainer.logger", f"given False, but wandb.mode is {wandb['mode']!r}; remove one of them")]
    return []


def _move(result: dict[str, Any], old: str, new: str, value: Any) -> list[Problem]:
    if new in result and result[new] != value:
        return [Problem(old, f"given {value!r}, but {new} is {result[new]!r}; remove one of them")]
    result[new] = value
    return []


def _refuse(result: dict[str, Any], trainer: dict[str, Any] | None) -> list[Problem]:
    problems: list[Problem] = []
    for path, advice in _REFUSED.items():
        group, _, key = path.rpartition(".")
        place = trainer if group else result
        if place is not None and place.pop(key, None) is not None:
            problems.append(Problem(path, f"has no meaning here: {advice}"))
    return problems
