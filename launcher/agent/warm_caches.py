"""Importing this module, in the fork server, fills caches that every rank would fill at its start.

Only what cannot change while the fork server lives: types of the config's fields, versions and entry points of
installed packages, and what jsonargparse and Lightning postpone to their first use. Each rank reads the config and the
user's files itself.
"""

from __future__ import annotations

import functools
from typing import Any

import lightning.fabric.utilities.registry as lightning_registry
import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.wandb import _WANDB_AVAILABLE
from lightning_utilities.core.apply_func import apply_to_collection

from launcher.config.schema import config_fields
from launcher.hardware.devices import library_versions
from launcher.user_code.arguments import argument_problems
from strategies.choice import AUTO
from strategies.registry import find_requested


def fill_caches() -> None:
    """Call what keeps its result. Starts no threads and reads no variable of a rank."""
    config_fields()
    library_versions()
    find_requested(AUTO)
    argument_problems(pl.LightningDataModule, "data", {})
    bool(_WANDB_AVAILABLE)
    _keep_entry_points()
    _check_types_of_logged_values()


def _keep_entry_points() -> None:
    """Lightning looks for callbacks in the metadata of all installed packages whenever a Trainer is created."""
    module: Any = lightning_registry
    module.entry_points = functools.cache(module.entry_points)
    module.entry_points(group="lightning.pytorch.callbacks_factory")


def _check_types_of_logged_values() -> None:
    """Python keeps for each abstract class which types are no subclass of it; a new type takes it 2 ms."""
    from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection

    results: Any = _ResultCollection(training=True)
    for value in (torch.zeros(1), {"loss": torch.zeros(1)}, [torch.zeros(1)]):
        apply_to_collection(value, torch.Tensor, torch.Tensor.clone)
    results.log("training_step", "loss", torch.zeros(1), on_step=True, on_epoch=True, batch_size=1)
    results.metrics(on_step=True)
    results.reset()


fill_caches()
